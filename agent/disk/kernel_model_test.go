//go:build kernel

package disk

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// TestKernelCampaignModel does at random what a cloud, an operator and bad luck do
// to three disks, while the modules keep them; a model says which disk may be
// written to.
func TestKernelCampaignModel(t *testing.T) {
	episodes(t, "model", 20, func(e *episode) {
		steps := 25
		if e.whole {
			steps = 150
		}
		m := newModel(e)
		for i := range steps {
			m.said = append(m.said, fmt.Sprintf("%d: %s", i, m.step()))
		}
		m.recover()
		e.figures["steps"] = float64(steps)
	})
}

// model is what there is, and what has to be.
type model struct {
	*episode
	s           *storage
	sys, ledger string
	slots       []*slot
	modules     []*Disk
	said        []string
}

// slot is a disk as it lies in the data centre.
type slot struct {
	*sick
	id     string // that it has
	serial string // that it tells
	size   int64
	copy   string // a snapshot
	secret string // that a file on it has to hold, if it has a file system of a module's
	copied string // the secret of the snapshot
}

func newModel(e *episode) *model {
	m := &model{episode: e, s: newStorage(e.T)}
	m.sys, m.ledger = filepath.Join(m.s.dir, "sys"), filepath.Join(m.s.dir, "ledger")
	e.Cleanup(func() {
		if e.Failed() {
			e.Logf("what was done:\n%s", strings.Join(m.said, "\n"))
		}
	})
	for i := range 3 {
		size := int64(64 << 20)
		fs := node.Ext4
		if i == 2 {
			size, fs = 304<<20, node.XFS
		}
		id := fmt.Sprintf("disk-model00%d", i)
		file := filepath.Join(m.s.dir, id)
		clearFile(e.T, file, size)
		m.slots = append(m.slots, &slot{sick: m.s.disk(id+"-x", file, nil), id: id, serial: id, size: size, copy: file + ".copy"})
		want := node.DiskConfig{DiskID: id, FileSystem: fs, MountPoint: filepath.Join(m.s.dir, "mnt", id)}
		if i == 1 {
			want.WhenNotBlank = node.MountFound
		}
		m.modules = append(m.modules, m.module(want))
		e.Cleanup(func() {
			m.unmount(want.MountPoint)
			clearImmutable(want.MountPoint)
		})
	}
	m.plugAll()
	e.Cleanup(func() {
		for _, d := range m.modules {
			d.Close()
		}
		for _, s := range m.slots {
			s.heal()
		}
	})
	return m
}

func (m *model) module(want node.DiskConfig) *Disk {
	d := New(Options{Want: want, Ledger: m.ledger, Run: m.ledger + ".run", Log: slog.New(slog.DiscardHandler)})
	d.sys = m.sys
	d.patience = time.Minute
	return d
}

// plugAll makes sysfs what it has to be.
func (m *model) plugAll() {
	must(m.T, os.RemoveAll(m.sys))
	must(m.T, os.MkdirAll(filepath.Join(m.sys, "block"), 0o755))
	for _, s := range m.slots {
		m.plug(s)
	}
}

func (m *model) plug(s *slot) { sysfsEntry(m.T, m.sys, s.loop, s.serial) }

// sysfsEntry makes a loop device appear in a sysfs with a serial.
func sysfsEntry(t *testing.T, sys, loop, serial string) {
	t.Helper()
	dir := filepath.Join(sys, "block", loop)
	must(t, os.MkdirAll(dir, 0o755))
	for _, a := range []string{"dev", "size", "ro", "holders", "diskseq", "stat", "queue"} {
		must(t, os.Symlink(filepath.Join("/sys/block", loop, a), filepath.Join(dir, a)))
	}
	must(t, os.WriteFile(filepath.Join(dir, "serial"), []byte(serial), 0o644))
	byNumber := filepath.Join(sys, "dev", "block")
	must(t, os.MkdirAll(byNumber, 0o755))
	must(t, os.Symlink("../../block/"+loop, filepath.Join(byNumber, strings.TrimSpace(run(t, "cat", "/sys/block/"+loop+"/dev")))))
}

func (m *model) tell(s *slot, serial string) {
	s.serial = serial
	// At once, as a device answers.
	path := filepath.Join(m.sys, "block", s.loop, "serial")
	must(m.T, os.WriteFile(path+".new", []byte(serial), 0o644))
	must(m.T, os.Rename(path+".new", path))
}

func (m *model) unmount(target string) {
	for unix.Unmount(target, 0) == nil {
	}
}

// free unmounts a disk, so that what it holds can be changed.
func (m *model) free(s *slot) {
	all, err := mounts()
	must(m.T, err)
	for _, mnt := range all {
		if mnt.Source == "/dev/"+s.loop {
			m.unmount(mnt.Target)
		}
	}
	for _, d := range m.modules {
		d.Close() // a disk may be being read
	}
}

// step does something, and says what.
func (m *model) step() string {
	i := m.IntN(len(m.slots))
	s := m.slots[i]
	other := m.slots[(i+1+m.IntN(len(m.slots)-1))%len(m.slots)]
	switch choice := m.IntN(100); {
	case choice < 45:
		said, _ := m.apply(m.modules[m.IntN(len(m.modules))])
		return said
	case choice < 52:
		said, _ := m.apply(m.modules[m.IntN(len(m.modules))], s, other)
		return said + ", while " + s.id + " and " + other.id + " exchange their serials"
	case choice < 72:
		return m.change(s, other)
	case choice < 80:
		serials := []string{s.id, "", "disk-other000", other.id}
		m.tell(s, serials[m.IntN(len(serials))])
		return fmt.Sprintf("%s says that it is %q", s.id, s.serial)
	case choice < 86:
		what := []string{"read", "write", "all"}[m.IntN(3)]
		sector := []int64{-1, 0, 2, s.size / 1024, s.size/512 - 1, m.Int64N(s.size / 512)}[m.IntN(6)]
		s.fail(what, sector)
		return fmt.Sprintf("%s fails: %s of sector %d", s.id, what, sector)
	case choice < 90:
		for _, s := range m.slots {
			s.heal()
			m.tell(s, s.id)
		}
		return "all disks are sound"
	case choice < 94:
		return m.reboot()
	case choice < 97:
		return m.ledgerLost(s)
	default:
		act := []string{actAdopt, actFormat}[m.IntN(2)]
		d := m.modules[m.IntN(len(m.modules))]
		err := d.Decide(m.T.Context(), Order{Act: act, DiskID: d.want.DiskID, Serial: d.want.DiskID})
		return fmt.Sprintf("an operator decides to %s %s: %v", act, d.want.DiskID, err)
	}
}

// change changes what a disk holds, behind the modules' back.
func (m *model) change(s, other *slot) string {
	m.free(s)
	switch m.IntN(7) {
	case 0, 1:
		clearFile(m.T, s.file, s.size)
		s.secret = ""
		return s.id + " is blank"
	case 2:
		at := []int64{0, 1024, s.size / 2, s.size - 1, m.Int64N(s.size)}[m.IntN(5)]
		poke(m.T, s.file, at, byte(1+m.IntN(255)))
		s.secret = "" // whoever writes there may have hit the file
		return fmt.Sprintf("%s is written to at %d", s.id, at)
	case 3:
		clearFile(m.T, s.file, s.size)
		tool := [][]string{{"mkfs.ext4", "-q", "-F"}, {"mkswap", "-q"}, {"mkfs.xfs", "-q", "-f"}}[m.IntN(3)]
		if tool[0] == "mkfs.xfs" && s.size < 300<<20 {
			tool = []string{"mkfs.ext4", "-q", "-F", "-b", "1024"}
		}
		if out, err := exec.Command(tool[0], append(tool[1:], s.file)...).CombinedOutput(); err != nil {
			m.Fatalf("%v: %s", err, out)
		}
		s.secret = ""
		return s.id + " has been through " + tool[0]
	case 4:
		run(m.T, "cp", "--sparse=always", s.file, s.copy)
		s.copied = s.secret
		return "a snapshot of " + s.id
	case 5:
		if _, err := os.Stat(s.copy); err != nil {
			return "no snapshot"
		}
		run(m.T, "cp", "--sparse=always", s.copy, s.file)
		s.secret = s.copied
		return s.id + " is rolled back to its snapshot"
	default:
		if _, err := os.Stat(other.copy); err != nil || other.size != s.size {
			return "no snapshot of that size"
		}
		run(m.T, "cp", "--sparse=always", other.copy, s.file)
		s.secret = other.copied
		return s.id + " is made from the snapshot of " + other.id
	}
}

// reboot gives every disk another name.
func (m *model) reboot() string {
	for _, s := range m.slots {
		m.free(s)
	}
	for _, s := range m.slots {
		detachLoop(m.T, s.loop)
	}
	for _, i := range m.Perm(len(m.slots)) {
		m.slots[i].loop = attachLoop(m.T, m.slots[i].path)
	}
	for i, d := range m.modules {
		m.modules[i] = m.module(d.want)
	}
	must(m.T, os.RemoveAll(m.ledger+".run"))
	m.plugAll()
	return "reboot"
}

func (m *model) ledgerLost(s *slot) string {
	path := filepath.Join(m.ledger, s.id+".json")
	b, err := os.ReadFile(path)
	switch {
	case err != nil:
		return "no ledger of " + s.id
	case m.IntN(2) == 0:
		must(m.T, os.Remove(path))
		return "the ledger of " + s.id + " is lost"
	default:
		must(m.T, os.WriteFile(path, b[:m.IntN(len(b)-1)], 0o600))
		return "the ledger of " + s.id + " is torn"
	}
}

// before is a disk before a module did anything.
type before struct {
	sum   [32]byte
	blank bool
	uuid  string
}

func (m *model) look(s *slot) before {
	if f, err := os.Open("/dev/" + s.loop); err == nil {
		unix.Fsync(int(f.Fd())) // it may be broken
		f.Close()
	}
	f, err := os.Open(s.file)
	must(m.T, err)
	defer f.Close()
	b := before{uuid: glance(f, s.size).UUID}
	b.sum, b.blank = hashFile(m.T, s.file, 0)
	return b
}

// apply has a module work once, and holds what it has done to every disk against what
// it may do. While it works, two disks exchange their serials all the time, if it is
// given two.
func (m *model) apply(d *Disk, restless ...*slot) (said string, _ error) {
	was := make([]before, len(m.slots))
	for i, s := range m.slots {
		was[i] = m.look(s)
	}
	past, damage := d.ledger.read()
	order := d.ledger.decision(d.want.DiskID)
	served := map[string]bool{}
	for _, s := range m.slots {
		served[s.id] = s.serial == d.want.DiskID || slices.Contains(restless, s)
	}
	mountsBefore, err := mounts()
	must(m.T, err)
	ctx, cancel := context.WithTimeout(m.T.Context(), time.Minute)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for len(restless) == 2 && ctx.Err() == nil {
			a, b := restless[0].serial, restless[1].serial
			m.tell(restless[0], b)
			m.tell(restless[1], a)
		}
	}()
	planned, err := turn(ctx, m.T, d)
	cancel()
	<-done
	said = fmt.Sprintf("%s: %q: %v", d.Name(), planned, err)
	all, merr := mounts()
	must(m.T, merr)
	on, mounted := (observed{Mounts: all}).at(d.want.MountPoint)
	_, mountedBefore := (observed{Mounts: mountsBefore}).at(d.want.MountPoint)
	for i, s := range m.slots {
		now := m.look(s)
		here := mounted && on.Source == "/dev/"+s.loop
		if here && !mountedBefore && !served[s.id] {
			m.Fatalf("%s\n%s is mounted on %s", said, s.id, d.want.MountPoint)
		}
		switch {
		case now.sum == was[i].sum:
		case !served[s.id] && !m.inUse(all, s):
			m.Fatalf("%s\n%s has been written to, %s", said, s.id, run(m.T, "sh", "-c", "od -A d -t x1z "+s.file+" | head -40; grep loop /proc/self/mountinfo; losetup -l"))
		case was[i].blank && damage == nil && past[d.want.DiskID].State != stateFormatted:
			s.secret = ""
			m.figures["formatted"]++
		case order != nil && order.Act == actFormat && order.Used.IsZero():
			s.secret = ""
			m.figures["formatted by decision"]++
		case was[i].uuid != "" && now.uuid == was[i].uuid && (m.inUse(all, s) || strings.Contains(planned, "mount "+d.want.DiskID)): // as mounting does
		default:
			m.Fatalf("%s\n%s has been written to; it was %+v and is %+v, ledger %+v %v, decision %+v", said, s.id, was[i], now, past, damage, order)
		}
		if here {
			m.secret(s, d.want.MountPoint, said)
		}
	}
	m.figures["turns"]++
	return said, err
}

func (m *model) inUse(all []mount, s *slot) bool {
	for _, mnt := range all {
		if mnt.Source == "/dev/"+s.loop {
			return true
		}
	}
	return false
}

// secret makes sure that a mounted disk holds what was written to it.
func (m *model) secret(s *slot, target, said string) {
	path := filepath.Join(target, "secret")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return // broken, or read-only
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	switch {
	case err != nil:
	case s.secret != "" && string(b) != s.secret:
		m.Fatalf("%s\n%s holds %q, not %q", said, s.id, b, s.secret)
	case s.secret == "":
		text := fmt.Sprintf("%s %d", s.id, m.Uint64())
		if err := f.Truncate(0); err != nil {
			return
		}
		if _, err := f.WriteAt([]byte(text), 0); err == nil && f.Sync() == nil {
			s.secret = text
		}
	}
}

// recover makes all well again: a blank disk is mounted then, and so is one that was
// formatted; of another it is said why not.
func (m *model) recover() {
	for _, s := range m.slots {
		s.heal()
		m.tell(s, s.id)
	}
	entries, err := os.ReadDir(m.ledger)
	if err == nil {
		for _, e := range entries {
			id, ok := strings.CutSuffix(e.Name(), ".json")
			b, err := os.ReadFile(filepath.Join(m.ledger, e.Name()))
			must(m.T, err)
			if _, err := decodeEntry(id, b); ok && err != nil {
				must(m.T, os.Remove(filepath.Join(m.ledger, e.Name())))
			}
		}
	}
	m.said = append(m.said, m.reboot())
	for i, d := range m.modules {
		s := m.slots[i]
		was := m.look(s)
		past := d.ledger.entryOf(s.id)
		var err error
		for range 4 {
			var said string
			said, err = m.apply(d)
			m.said = append(m.said, said)
		}
		st := d.State()
		switch {
		case st.State == Mounted:
			m.figures["mounted at the end"]++
		case was.blank && past.State != stateFormatted, s.secret != "" && was.uuid == past.UUID:
			m.Errorf("%s is %s: %v", s.id, st.State, err)
		case node.ClassOf(err) != node.ClassTerminal:
			m.Errorf("%s is %s, and nobody is told to act: %v", s.id, st.State, err)
		default:
			m.figures["refused at the end"]++
		}
	}
}

func (l ledger) entryOf(id string) entry {
	all, _ := l.read()
	return all[id]
}
