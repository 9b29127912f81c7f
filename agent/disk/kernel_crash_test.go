//go:build kernel

package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// life is what a process of the agent is told about the disk that it keeps.
type life struct {
	Want             node.DiskConfig
	Sys, Ledger, Run string
	Boot             string // empty: this one
}

func (l life) disk() *Disk {
	d := New(Options{Want: l.Want, Ledger: l.Ledger, Run: l.Run, Log: slog.New(slog.DiscardHandler)})
	d.sys, d.patience = l.Sys, time.Minute
	if l.Boot != "" {
		d.boot = l.Boot
	}
	return d
}

// TestHelperLife is no test: it is the process that is killed.
func TestHelperLife(t *testing.T) {
	text := os.Getenv("TKENODE_DISK_LIFE")
	if text == "" {
		return
	}
	var l life
	must(t, json.Unmarshal([]byte(text), &l))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	d := l.disk()
	p, err := d.Plan(ctx)
	if err == nil {
		err = d.Apply(ctx, p)
	}
	must(t, err)
}

// killed runs a life of the agent that is killed when a thread of it, or of mkfs, has
// made so many calls of a system call. It says whether the life has got to its end.
func (l life) killed(t *testing.T, call string, when int) bool {
	t.Helper()
	text, err := json.Marshal(l)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace="+call,
		"-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", call, when), "/proc/self/exe", "-test.run=^TestHelperLife$")
	self, err := os.Executable()
	must(t, err)
	cmd.Args[len(cmd.Args)-2] = self
	cmd.Env = append(os.Environ(), "TKENODE_DISK_LIFE="+string(text))
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		t.Fatalf("%s %d: the life hangs: %s", call, when, out)
	}
	return err == nil
}

// kills are the system calls by which a life changes anything, or is about to.
var kills = []struct {
	call string
	most int // calls of one thread that are tried in the whole campaign
	few  []int
}{
	{"fsync", 40, []int{1, 3}},
	{"renameat", 10, []int{1, 2}},
	{"waitid", 4, []int{1}}, // mkfs has begun, and goes on without us
	{"pwrite64", 120, []int{7}},
	{"mount", 2, []int{1}},
	{"write", 30, nil},
	{"flock", 6, nil},
	{"execve", 3, nil},
	{"mkdirat", 6, nil},
	{"ioctl", 40, nil},
	{"openat", 200, nil},
	{"pread64", 80, nil},
}

// TestKernelCampaignKilled kills the agent, or its mkfs, between any two steps. The
// next life comes to the same end, or says that somebody has to decide, and has then
// not touched the disk.
func TestKernelCampaignKilled(t *testing.T) {
	for _, fs := range wholeOnly(node.Ext4, node.XFS) {
		episodes(t, "killed, "+string(fs), 1, func(e *episode) {
			for _, k := range kills {
				whens := k.few
				if e.whole {
					whens = nil
					for when := range k.most {
						whens = append(whens, when+1)
					}
				}
				for _, when := range whens {
					if e.killedAt(fs, k.call, when) && e.whole {
						break // no thread makes more
					}
				}
			}
		})
	}
}

// wholeOnly returns the second one only in the whole campaign.
func wholeOnly(always, whole node.FileSystem) []node.FileSystem {
	if *campaignFile == "" {
		return []node.FileSystem{always}
	}
	return []node.FileSystem{always, whole}
}

// killedAt returns whether the life had ended before it was killed.
func (e *episode) killedAt(fs node.FileSystem, call string, when int) (ended bool) {
	b := newBench(e.T, fs, nil)
	defer b.end(e.T)
	l := life{Want: b.want, Sys: b.sys, Ledger: string(b.ledger), Run: b.run}
	ended = l.killed(e.T, call, when)
	e.figures["lives"]++
	e.after(l, b.file, 0, nil, fmt.Sprintf("%s %d", call, when))
	return ended
}

// end gives up what a bench has before its test ends.
func (b *bench) end(t *testing.T) {
	b.Close()
	for unix.Unmount(b.want.MountPoint, 0) == nil {
	}
}

// after has a next life keep a disk, which is a file from an offset on, and judges how
// it ends. kept looks at the disk once it is mounted; nil: nothing is known of it.
func (e *episode) after(l life, file string, from int64, kept func(dir string) error, what string) {
	e.Helper()
	dev := "/dev/" + loopOf(e.T, l.Sys)
	f, err := os.Open(dev)
	must(e.T, err)
	must(e.T, errors.Join(unix.Fsync(int(f.Fd())), f.Close()))
	sum, blank := hashFile(e.T, file, from)
	d := l.disk()
	defer d.Close()
	ctx, cancel := context.WithTimeout(e.Context(), time.Minute)
	defer cancel()
	for {
		var planned string
		if planned, err = turn(ctx, e.T, d); err == nil && planned == "" {
			break
		}
		if node.ClassOf(err) == node.ClassTerminal {
			break
		}
		if ctx.Err() != nil {
			e.Fatalf("%s: no end: %v", what, err)
		}
		if err != nil {
			time.Sleep(20 * time.Millisecond)
		}
	}
	st := d.State()
	state := node.ReasonOf(err, st.State)
	e.figures["then "+state]++
	if state != Mounted {
		now, _ := hashFile(e.T, file, from)
		if blank || now != sum {
			e.Errorf("%s: the disk was blank: %v, and has been written to: %v; %s: %v", what, blank, now != sum, state, err)
		}
		if state != "FormatInterrupted" {
			past, damage := d.ledger.read()
			e.Errorf("%s: %s: %v; ledger %+v, %v", what, state, err, past, damage)
		}
		must(e.T, d.Decide(e.Context(), Order{Act: actFormat, DiskID: l.Want.DiskID, Serial: l.Want.DiskID}))
		if _, err := turn(ctx, e.T, d); err != nil {
			e.Errorf("%s: formatted by decision: %v", what, err)
		}
	} else if kept != nil {
		if err := kept(l.Want.MountPoint); err != nil {
			e.Errorf("%s: %v", what, err)
		}
	}
	must(e.T, unix.Unmount(l.Want.MountPoint, 0))
	sound(e.T, dev, l.Want.FileSystem, what)
}

// loopOf returns the only device of a sysfs.
func loopOf(t *testing.T, sys string) string {
	entries, err := os.ReadDir(filepath.Join(sys, "block"))
	must(t, err)
	if len(entries) != 1 {
		t.Fatalf("%d devices", len(entries))
	}
	return entries[0].Name()
}

// sound checks the file system on a device.
func sound(t *testing.T, dev string, fs node.FileSystem, what string) {
	t.Helper()
	check := []string{"e2fsck", "-fn", dev}
	if fs == node.XFS {
		check = []string{"xfs_repair", "-n", dev}
	}
	if out, err := exec.Command(check[0], check[1:]...).CombinedOutput(); err != nil {
		t.Errorf("%s: %s: %v: %s", what, check[0], err, out)
	}
}

// logEntry is a write, or a flush, in the log of a disk.
// Source: linux Documentation/admin-guide/device-mapper/log-writes.rst
type logEntry struct {
	sector int64
	data   []byte // empty: a flush alone
	flush  bool
}

func readLog(t *testing.T, path string) (all []logEntry) {
	t.Helper()
	const sector, flagFlush, flagFUA, flagDiscard = 512, 1, 2, 4
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	head := make([]byte, sector)
	_, err = io.ReadFull(f, head)
	must(t, err)
	le := binary.LittleEndian
	for range le.Uint64(head[16:]) {
		_, err = io.ReadFull(f, head)
		must(t, err)
		flags := le.Uint64(head[16:])
		e := logEntry{sector: int64(le.Uint64(head)), flush: flags&(flagFlush|flagFUA) != 0}
		e.data = make([]byte, le.Uint64(head[8:])*sector)
		if flags&flagDiscard == 0 {
			_, err = io.ReadFull(f, e.data)
			must(t, err)
		}
		all = append(all, e)
	}
	return all
}

// TestKernelCampaignPowerCut writes down every write of a machine whose ledger and
// whose new disk are formatted and used, and looks at what a loss of power at any of
// them would leave: all that was written up to there, or of what was not flushed only
// some. The next life comes to the same end, or says that somebody has to decide.
func TestKernelCampaignPowerCut(t *testing.T) {
	for _, fs := range wholeOnly(node.Ext4, node.XFS) {
		episodes(t, "power cut, "+string(fs), 2, func(e *episode) {
			c := newCut(e, fs)
			entries := c.record()
			e.figures["writes and flushes"] = float64(len(entries))
			flushed := 0 // entries before the last flush
			for i := range len(entries) + 1 {
				if e.whole || e.IntN(12) == 0 || i == len(entries) {
					c.cut(entries[:i], flushed, fmt.Sprintf("after write %d of %d", i, len(entries)))
				}
				if i < len(entries) && entries[i].flush {
					flushed = i + 1
				}
			}
		})
	}
}

// cut is a machine in a file: the system disk, and then the data disk.
type cut struct {
	*episode
	dir  string
	fs   node.FileSystem
	base string
}

const (
	systemSize = 64 * mib
	cutSize    = systemSize + 320*mib
	keptText   = "what a pod has written"
)

func newCut(e *episode, fs node.FileSystem) *cut {
	c := &cut{episode: e, dir: e.TempDir(), fs: fs}
	c.base = filepath.Join(c.dir, "base")
	clearFile(e.T, c.base, cutSize)
	run(e.T, "mkfs.ext4", "-q", "-F", c.base, fmt.Sprint(systemSize>>10))
	return c
}

// boot mounts the system disk of a machine and makes what keeps the other one.
func (c *cut) boot(file string) (l life, off func()) {
	c.Helper()
	mnt := filepath.Join(c.dir, "system")
	must(c.T, os.MkdirAll(mnt, 0o755))
	system := attachLoop(c.T, file, "--sizelimit", fmt.Sprint(systemSize))
	data := attachLoop(c.T, file, "--offset", fmt.Sprint(systemSize))
	sys := filepath.Join(c.dir, "sys")
	must(c.T, errors.Join(os.RemoveAll(sys), os.RemoveAll(filepath.Join(c.dir, "run"))))
	sysfsEntry(c.T, sys, data, serial)
	must(c.T, unix.Mount("/dev/"+system, mnt, "ext4", 0, ""))
	l = life{
		Want: node.DiskConfig{DiskID: serial, FileSystem: c.fs, MountPoint: filepath.Join(c.dir, "data")},
		Sys:  sys, Ledger: filepath.Join(mnt, "ledger"), Run: filepath.Join(c.dir, "run"),
	}
	return l, func() {
		for unix.Unmount(l.Want.MountPoint, 0) == nil {
		}
		clearImmutable(l.Want.MountPoint)
		must(c.T, unix.Unmount(mnt, 0))
		detachLoop(c.T, system)
		detachLoop(c.T, data)
	}
}

// record returns every write of a machine from its first start on.
func (c *cut) record() []logEntry {
	s := newStorage(c.T)
	file, log := filepath.Join(c.dir, "recorded"), filepath.Join(c.dir, "log")
	run(c.T, "cp", "--sparse=always", c.base, file)
	clearFile(c.T, log, 1<<30)
	d := s.disk("machine", file, args{"driver": "blklogwrites", "log": args{"driver": "file", "filename": log}})
	l, off := c.boot(d.path)
	keep := l.disk()
	if _, err := turn(c.Context(), c.T, keep); err != nil {
		c.Fatal(err)
	}
	f, err := os.Create(filepath.Join(l.Want.MountPoint, "kept"))
	must(c.T, err)
	_, err = f.WriteString(keptText)
	must(c.T, errors.Join(err, f.Sync(), f.Close()))
	must(c.T, os.WriteFile(filepath.Join(filepath.Dir(l.Ledger), "synced"), nil, 0o600))
	unix.Sync() // it says so only after the other has been written
	keep.Close()
	off()
	d.end()
	return readLog(c.T, log)
}

// cut starts the machine with what a loss of power has left of its writes: all before
// flushed, and of the rest each second one at random, or all.
func (c *cut) cut(entries []logEntry, flushed int, what string) {
	c.Helper()
	file := filepath.Join(c.dir, "cut")
	run(c.T, "cp", "--sparse=always", c.base, file)
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	must(c.T, err)
	some := c.IntN(2) == 0
	for i, e := range entries {
		if i < flushed || !some || c.IntN(2) == 0 {
			if nonZero(e.data) < 0 && len(e.data) > 1<<20 { // leave it thin
				must(c.T, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, e.sector*512, int64(len(e.data))))
				continue
			}
			_, err := f.WriteAt(e.data, e.sector*512)
			must(c.T, err)
		}
	}
	must(c.T, f.Close())
	l, off := c.boot(file)
	defer off()
	l.Boot = "the next"
	_, serr := os.Stat(filepath.Join(filepath.Dir(l.Ledger), "synced"))
	c.figures["cuts"]++
	c.after(l, file, systemSize, func(dir string) error {
		b, err := os.ReadFile(filepath.Join(dir, "kept"))
		if serr == nil && !bytes.Equal(b, []byte(keptText)) {
			return fmt.Errorf("the file holds %q: %w", b, err)
		}
		return nil
	}, strings.TrimSpace(what+map[bool]string{true: ", some lost"}[some]))
}
