package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/unit"
	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// Systemd is what this package asks of systemd.
type Systemd interface {
	// Running reports whether a unit runs, or is on its way to or from it.
	Running(ctx context.Context, unit string) (bool, error)
	// Stop returns when the unit has ended.
	Stop(ctx context.Context, unit string) error
	// Reload makes systemd read its unit files again.
	Reload(ctx context.Context) error
	// Current reports whether systemd has read the file of a unit that it knows.
	Current(ctx context.Context, unit, file string) (bool, error)
	// Scope puts a process into a new transient scope; an error if there is one of the name.
	Scope(ctx context.Context, name, description string, pid int) error
}

const (
	looksApart    = 50 * time.Millisecond // two looks for a device that seems to be gone
	podsCgroup    = "/sys/fs/cgroup/kubepods.slice"
	podsDeadline  = 20 * time.Second // for killed processes to be gone
	unmountLimit  = 20 * time.Second
	aliveAttempts = 5 // looks whether requests end, before a device is asked for its serial
	alivePause    = 20 * time.Millisecond
)

func (d *Disk) notePath() string { return notePath(d.run, d.want.MountPoint) }

func notePath(run, mountPoint string) string {
	return filepath.Join(run, systemd.UnitNamePathEscape(mountPoint)+".json")
}

// note returns what was noted of the disk's mount, or nil. One that is damaged tells
// nothing, and is written anew.
func (d *Disk) note() (*serving, error) {
	b, err := os.ReadFile(d.notePath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read note of the mount: %w", err)
	}
	var s serving
	if json.Unmarshal(b, &s) != nil || s.DiskID == "" || s.Dev == "" {
		return nil, nil
	}
	return &s, nil
}

// setNote replaces the note. It need not outlive a power cut: no mount does.
func (d *Disk) setNote(s serving) error {
	b, err := json.Marshal(s)
	if err == nil {
		err = os.MkdirAll(d.run, 0o700)
	}
	if err == nil {
		err = replaceFile(d.notePath(), b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("note the mount: %w", err)
	}
	return nil
}

func replaceFile(path string, b []byte, mode fs.FileMode) error {
	if err := os.WriteFile(path+".new", b, mode); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// observeServing reads what is known of the disk's mount in this boot, and whether
// its device is still there. The mounts have been read.
func (d *Disk) observeServing(ctx context.Context, have *observed) error {
	var err error
	if have.Was, err = d.note(); err != nil {
		return err
	}
	m, mounted := have.at(d.want.MountPoint)
	if have.Was == nil && mounted {
		have.Was = d.unnoted(ctx, m, *have)
	}
	was := have.Was
	if was == nil || !was.Gone.IsZero() {
		return nil
	}
	if have.Lost = d.lost(ctx, *was); have.Lost == "" || d.systemd == nil {
		return nil
	}
	for _, u := range users(d.want.MountPoint) {
		runs := false
		if u == pods {
			runs, err = populated(d.pods)
		} else {
			runs, err = d.systemd.Running(ctx, u)
		}
		if err != nil {
			return err
		}
		if runs {
			have.Users = append(have.Users, u)
		}
	}
	return nil
}

// unnoted returns the note that there should be of a mount whose device is gone: the
// agent was killed before it could write it. The ledger tells whose mount it is.
func (d *Disk) unnoted(ctx context.Context, m mount, have observed) *serving {
	var was *serving
	for id, e := range have.Ledger {
		switch {
		case e.MountPoint != d.want.MountPoint, e.DiskID != id: // a stripe's stands under each of its disks
		case was != nil, !strings.HasPrefix(m.Source, "/dev/"):
			return nil
		default:
			was = &serving{DiskID: id, Dev: m.Dev, Disks: d.beneath(filepath.Base(m.Source), e)}
		}
	}
	if was == nil || d.lost(ctx, *was) == "" {
		return nil
	}
	return was
}

// lost looks for the disk that was mounted, and once more if it is not there. An array or
// a mapping outlives its disks, and is there as long as it is mounted, so they are what is
// looked for; every plan sees whether what is mounted is made of them.
func (d *Disk) lost(ctx context.Context, was serving) string {
	for _, s := range was.disks() {
		first := d.sight(s.Dev)
		if lost(s, first) == "" {
			continue
		}
		select {
		case <-time.After(looksApart):
		case <-ctx.Done():
			return ""
		}
		switch why := lost(s, first, d.sight(s.Dev)); {
		case why != "" && len(was.Disks) > 0:
			return "of " + s.DiskID + " " + why
		case why != "":
			return why
		}
	}
	return another(was, d.tended.serials())
}

// sight looks for a block device by its number.
func (d *Disk) sight(dev string) sight {
	all, err := os.ReadDir(filepath.Join(d.sys, "dev", "block"))
	if err != nil || len(all) == 0 {
		return sight{}
	}
	if !slices.ContainsFunc(all, func(e fs.DirEntry) bool { return e.Name() == dev }) {
		return sight{sound: true}
	}
	seq, err := attribute(filepath.Join(d.sys, "dev", "block", dev), "diskseq")
	return sight{sound: err == nil || errors.Is(err, fs.ErrNotExist), there: true, seq: seq}
}

// populated reports whether there are processes in a cgroup or below it.
func populated(cgroup string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(cgroup, "cgroup.events"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // no pod ever ran
	}
	if err != nil {
		return false, fmt.Errorf("look for the processes of pods: %w", err)
	}
	return bytes.Contains(b, []byte("populated 1")), nil
}

// quell kills the processes of all pods, and waits until they are gone. Their shims
// are containerd's, which asks them when it is back.
func (d *Disk) quell(ctx context.Context) error {
	if err := os.WriteFile(filepath.Join(d.pods, "cgroup.kill"), []byte("1"), 0); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, podsDeadline)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if some, err := populated(d.pods); err != nil || !some {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return node.Waiting(Gone, "processes of pods do not end, as they do not while the kernel waits for a disk: systemd-cgls /kubepods.slice")
		}
	}
}

// unmount has a helper unmount what is left of the disk.
func (d *Disk) unmount(ctx context.Context, was serving) error {
	found, err := d.probes.send(ctx, errand{Act: toUnmount, Target: d.want.MountPoint, Dev: was.Dev}, unmountLimit, nil)
	if err == nil && (len(found) != 1 || found[0].Error != "") {
		err = fmt.Errorf("unmount %s: %v", d.want.MountPoint, found)
	}
	if err != nil {
		return node.Waiting(Gone, "the dead mount on %s cannot be taken away yet: %w", d.want.MountPoint, err)
	}
	return nil
}

// after carries out a step of what follows a mount.
func (d *Disk) after(ctx context.Context, s step, have observed) error {
	switch s.verb {
	case halt:
		return d.systemd.Stop(ctx, s.unit)
	case quell:
		return d.quell(ctx)
	case detach:
		return d.unmount(ctx, *have.Was)
	case bury:
		was := *have.Was
		was.Gone, was.Why = time.Now().UTC().Truncate(time.Second), have.Lost
		d.log.Error("the disk is gone", "disk", was.DiskID, "mountPoint", d.want.MountPoint, "evidence", was.Why)
		return d.setNote(was)
	case reload:
		defer d.tended.unitRead(true)
		return d.systemd.Reload(ctx)
	default: // publish
		at, err := raise(d.want, have)
		if err != nil {
			return err
		}
		m, _ := have.at(d.want.MountPoint)
		d.tended.unitRead(false) // until it is asked
		return d.publish(at.dev(), m.FSType, m.Source)
	}
}

// publish writes the file of the mount unit, if systemd is there to read it, and the
// note of the mount.
func (d *Disk) publish(dev device, fs, source string) error {
	if err := d.publishUnit(dev, fs, source); err != nil {
		return err
	}
	return d.setNote(noteOf(dev))
}

func (d *Disk) publishUnit(dev device, fs, source string) error {
	if d.systemd == nil {
		return nil
	}
	path, text := unitPath(d.want.MountPoint), []byte(unitText(dev.ids(), source, d.want.MountPoint, fs))
	if have, err := os.ReadFile(path); err == nil && bytes.Equal(have, text) {
		return nil // systemd would take it for changed
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("publish mount unit: %w", err)
	}
	if err := replaceFile(path, text, 0o644); err != nil {
		return fmt.Errorf("publish mount unit: %w", err)
	}
	return nil
}

// observeUnit reads the file of the mount unit.
func (d *Disk) observeUnit() (*mountUnit, error) {
	if d.systemd == nil {
		return nil, nil
	}
	u := &mountUnit{Path: unitPath(d.want.MountPoint), Stale: d.tended.unitStale()}
	b, err := os.ReadFile(u.Path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read mount unit: %w", err)
	}
	u.Text = string(b)
	return u, nil
}

// readSerial asks a device for its serial. virtio-blk asks the disk at each read, and
// answers with nothing on an error; of a disk that hangs the read hangs.
// Source: linux drivers/block/virtio_blk.c, serial_show
func readSerial(dir string) (string, error) {
	serial, err := attribute(dir, "serial")
	if errors.Is(err, fs.ErrNotExist) {
		serial, err = attribute(dir, "device/serial") // NVMe
	}
	return serial, err
}

// alive reports whether a device answers: it has no request in flight, or one ends
// while it is looked at. Neither look goes to the device.
func alive(dir string) bool {
	var before string
	for n := range aliveAttempts {
		inFlight, ended, err := requests(dir)
		if err != nil || inFlight == 0 || n > 0 && ended != before {
			return true // of a device that tells nothing nothing is known
		}
		before = ended
		time.Sleep(alivePause)
	}
	return false
}

// requests returns how many requests a device has in flight, and how many have ended.
// Source: linux Documentation/block/stat.rst
func requests(dir string) (inFlight int, ended string, err error) {
	text, err := attribute(dir, "stat")
	f := strings.Fields(text)
	if err != nil || len(f) < 11 {
		return 0, "", fmt.Errorf("read statistics of %s: %d fields: %w", filepath.Base(dir), len(f), errors.Join(err, unix.EINVAL))
	}
	if _, err := fmt.Sscan(f[8], &inFlight); err != nil {
		return 0, "", fmt.Errorf("read statistics of %s: %w", filepath.Base(dir), err)
	}
	ended = f[0] + " " + f[4]
	if len(f) >= 17 {
		ended += " " + f[11] + " " + f[15] // discards, flushes
	}
	return inFlight, ended, nil
}
