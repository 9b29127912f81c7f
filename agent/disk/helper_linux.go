package disk

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/unit"
	"golang.org/x/sys/unix"
)

// What may block in the kernel for ever is done by a process of its own: a thread
// that hangs there keeps its whole process from ending, however it is killed, and
// the agent would not restart any more. One that is late is put into a transient
// scope, so that it belongs to nobody who is restarted; while that is there, no agent
// sends another. Of those that return in time systemd and its journal know nothing.

// helperProgram is that process: a program of its own, since it is started twice a
// minute for every disk, and the agent's own takes six times as long to start. A
// variable for tests.
var helperProgram = []string{"/usr/lib/tkenode/bin/tke-disk"}

// errand is what a helper is sent for.
type errand struct {
	Act    string `json:"act"`    // probe or unmount
	Target string `json:"target"` // the mount point
	Dev    string `json:"dev"`    // that has to be mounted there: 253:16
	Name   string `json:"name"`   // of the device: vdb
	// Disks are the names of those that the device is made of; of a disk, its own.
	Disks []string `json:"disks,omitempty"`
	Sys   string   `json:"sys"` // where sysfs is mounted
	// Doubtful says that the file system has noted errors: it is tried whether it still
	// takes writes.
	Doubtful bool `json:"doubtful,omitempty"`
}

// finding is one line of a helper's answer. One that says that a step begins has
// nothing but its name.
type finding struct {
	Step  string `json:"step"`
	Ended bool   `json:"ended,omitempty"`
	Value string `json:"value,omitempty"`
	Error string `json:"error,omitempty"`
}

// helperLate is when a helper is late: a disk answers in some milliseconds, and one
// that is throttled in some hundreds.
const helperLate = 2 * time.Second

const (
	stepSerial  = "read of its serial"
	stepStat    = "look at its root directory"
	stepRead    = "direct read of one block"
	stepWrite   = "creation of a file"
	stepUnmount = "unmount"
)

// Help is the whole of a helper: it waits for its errand, so that it is in its scope
// before it can hang, and says what it finds.
func Help(in io.Reader, out io.Writer) error {
	var e errand
	if err := json.NewDecoder(in).Decode(&e); err != nil {
		return fmt.Errorf("read errand: %w", err)
	}
	enc := json.NewEncoder(out)
	say := func(step string, do func() (string, error)) error {
		if err := enc.Encode(finding{Step: step}); err != nil {
			return err
		}
		f := finding{Step: step, Ended: true}
		var err error
		if f.Value, err = do(); err != nil {
			f.Error = err.Error()
		}
		return enc.Encode(f)
	}
	switch e.Act {
	case "probe":
		return errors.Join(
			say(stepSerial, e.serial),
			say(stepStat, e.stat),
			say(stepRead, e.read),
			say(stepWrite, e.write),
		)
	case "unmount":
		return say(stepUnmount, e.unmount)
	}
	return fmt.Errorf("unknown errand %q", e.Act)
}

// serial asks every disk who it is. One that does not tell leaves all untold.
func (e errand) serial() (string, error) {
	var all []string
	for _, name := range e.Disks {
		serial, err := readSerial(filepath.Join(e.Sys, "block", name))
		if err != nil || serial == "" {
			return "", err
		}
		all = append(all, serial)
	}
	return strings.Join(all, "+"), nil
}

// stat looks at the mounted file system: one that has shut itself down, as xfs does,
// answers with an error.
func (e errand) stat() (string, error) {
	if ok, err := e.mounted(); err != nil || !ok {
		return "", err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(e.Target, &st); err != nil {
		return "", err
	}
	dir, err := os.Open(e.Target)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	if _, err := dir.Stat(); err != nil {
		return "", err
	}
	if _, err := dir.Readdirnames(1); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	return "", nil
}

// write makes a file without a name, which a file system that takes no writes
// refuses, and which is gone at once. (A change of an inode alone ext4 takes, and
// drops.)
func (e errand) write() (string, error) {
	if ok, err := e.mounted(); err != nil || !ok || !e.Doubtful {
		return "", err
	}
	f, err := os.OpenFile(e.Target, unix.O_TMPFILE|unix.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	return "", f.Close()
}

// read reads one block past the page cache.
func (e errand) read() (string, error) {
	f, err := os.OpenFile("/dev/"+e.Name, unix.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	if devNumber(st.Rdev) != e.Dev {
		return "", errChanged
	}
	_, err = f.ReadAt(aligned(blockSize), 0)
	return "", err
}

func (e errand) mounted() (bool, error) {
	all, err := mounts()
	if err != nil {
		return false, err
	}
	m, ok := observed{Mounts: all}.at(e.Target)
	return ok && m.Dev == e.Dev, nil
}

// unmount takes the mount away, if it is the one that is meant: as usual if nobody
// uses it, else only from the tree of directories. Those who use it keep what is dead.
func (e errand) unmount() (string, error) {
	if ok, err := e.mounted(); err != nil || !ok {
		return "", err
	}
	err := unix.Unmount(e.Target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(e.Target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	return "", err
}

// errHangs says that a helper has not returned.
type errHangs struct{ step string }

func (e errHangs) Error() string { return "the " + e.step + " does not return" }

// errOut says that a helper of this disk is still out.
var errOut = errors.New("an earlier one has not returned")

// helper is the process that is out for a disk.
type helper struct {
	step  string
	began time.Time
	ended chan struct{} // closed when the process has

	cmd     *exec.Cmd
	errand  io.WriteCloser // its standard input
	answers *os.File       // its standard output
}

// start starts a helper, which waits for its errand. It goes on when the agent ends.
func (d *Disk) start() (*helper, error) {
	h := &helper{began: time.Now(), ended: make(chan struct{}), cmd: exec.Command(d.program[0], d.program[1:]...)}
	h.cmd.Stderr = os.Stderr
	var err error
	if h.errand, err = h.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	var theirs *os.File
	if h.answers, theirs, err = os.Pipe(); err != nil {
		return nil, err
	}
	h.cmd.Stdout = theirs
	if err := errors.Join(h.cmd.Start(), theirs.Close()); err != nil {
		return nil, errors.Join(err, h.answers.Close())
	}
	go func() { // it ends with the process, which is killed at the deadline
		defer close(h.ended)
		_ = h.cmd.Wait()
	}()
	return h, nil
}

// banish puts a helper that is late into a scope of its own.
func (d *Disk) banish(ctx context.Context, h *helper) {
	select {
	case <-h.ended:
		return
	default:
	}
	if d.systemd == nil {
		return
	}
	if err := d.systemd.Scope(ctx, d.scope(), "A look of tkenode at the disk of "+d.want.MountPoint+", which is late", h.cmd.Process.Pid); err != nil {
		d.log.Warn("a helper that is late stays with the agent", "mountPoint", d.want.MountPoint, "err", err)
	}
}

// scope is the name of the unit for a helper of this disk.
func (d *Disk) scope() string {
	return "tkenode-disk-helper-" + systemd.UnitNamePathEscape(d.want.MountPoint) + ".scope"
}

// send sends a helper out and returns what it has found. It is waited for until
// deadline; what hangs is killed, which may be in vain, and left behind.
func (d *Disk) send(ctx context.Context, e errand, deadline time.Duration) (found []finding, err error) {
	d.helping.Lock()
	defer d.helping.Unlock()
	if h := d.helper; h != nil {
		select {
		case <-h.ended:
		default:
			return nil, errOut
		}
	}
	if d.systemd != nil { // an earlier agent's
		if out, err := d.systemd.Running(ctx, d.scope()); err == nil && out {
			return nil, errOut
		}
	}
	h, err := d.start()
	if err != nil {
		return nil, fmt.Errorf("start helper: %w; if it is not there, install the package tkenode anew", err)
	}
	d.helper = h
	defer h.answers.Close()
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	if err := json.NewEncoder(h.errand).Encode(e); err != nil {
		_ = h.cmd.Process.Kill() // it waits for its errand, and so can be
		<-h.ended
		d.helper = nil
		return nil, fmt.Errorf("send helper: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = h.answers.SetReadDeadline(time.Now()) })()
	lines := bufio.NewScanner(h.answers)
	banished := make(chan struct{})
	late := time.AfterFunc(helperLate, func() { d.banish(ctx, h); close(banished) })
	defer func() {
		if !late.Stop() {
			<-banished
		}
	}()
	for lines.Scan() {
		var f finding
		if err := json.Unmarshal(lines.Bytes(), &f); err != nil {
			return found, fmt.Errorf("read helper's answer: %w", err)
		}
		if h.step = f.Step; f.Ended {
			found, h.step = append(found, f), ""
		}
	}
	if ctx.Err() == nil {
		<-h.ended // it has closed its end, so it is ending
		d.helper = nil
		return found, nil
	}
	_ = h.cmd.Process.Kill()
	select {
	case <-h.ended:
		d.helper = nil
	case <-time.After(dropPatience):
		d.log.Error("left behind, a helper does not return", "mountPoint", d.want.MountPoint, "step", h.step, "pid", h.cmd.Process.Pid)
	}
	return found, errHangs{h.step}
}
