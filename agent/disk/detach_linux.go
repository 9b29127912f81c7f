package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// detachPoll is how often is looked how far the cloud is with detaching a disk, and
// whether who uses it still does.
const detachPoll = 2 * time.Second

// Detach gives a disk back that this agent has attached, and that the NodeConfig no
// longer lists. It satisfies reconcile.Module.
type Detach struct {
	note   attached
	cloud  Cloud
	ledger ledger
	run    string // directory of notes that end with the boot
	sys    string
	log    *slog.Logger
}

// Detached returns a module for every disk that is to be given back. Options.Want is
// of no consequence. A note that cannot be read proves nothing, and is left alone.
func Detached(o Options) []*Detach {
	l := ledger(o.Ledger)
	bound, err := l.bindings()
	if err != nil {
		o.Log.Error("it is not known which disks are bound, so none is detached", "err", err)
		return nil
	}
	files, err := filepath.Glob(filepath.Join(o.Ledger, "*"+attachedSuffix))
	if err != nil {
		o.Log.Error("disks to be detached cannot be listed", "err", err)
	}
	var all []*Detach
	for _, f := range files {
		id := strings.TrimSuffix(filepath.Base(f), attachedSuffix)
		if slices.ContainsFunc(o.Sealed.Config.Disks, func(e node.DiskConfig) bool { return slices.Contains(e.IDs(), id) }) ||
			slices.ContainsFunc(bound, func(b binding) bool { return b.DiskID == id }) {
			continue // it is wanted
		}
		note, err := l.attached(id)
		if err != nil {
			o.Log.Error("it is not known who attached a disk, so it stays", "disk", id, "err", err)
			continue
		}
		if note.InstanceID == o.Sealed.Facts.InstanceID {
			all = append(all, &Detach{note: note, cloud: o.Cloud, ledger: l, run: o.Run, sys: "/sys", log: o.Log})
		}
	}
	return all
}

// Name returns "detach/<disk id>".
func (d *Detach) Name() string { return "detach/" + d.note.DiskID }

// Condition returns the condition that it reports to. A disk that is still used by
// somebody takes nothing from it.
func (d *Detach) Condition() node.ConditionType { return node.DisksReady }

// Needs returns what has to be so before the disk is given back.
func (d *Detach) Needs() []node.ConditionType { return []node.ConditionType{node.ConfigSealed} }

// Watch waits for ctx to end: nothing tells when a disk is no longer used.
func (d *Detach) Watch(ctx context.Context, wake func()) error {
	wake()
	<-ctx.Done()
	return ctx.Err()
}

// Plan lists one change, until the disk is given back.
func (d *Detach) Plan(context.Context) (node.Plan, error) {
	var p node.Plan
	if _, err := d.ledger.attached(d.note.DiskID); errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	p.Serving, p.Again = true, detachPoll
	p.Add(d.detach, "unmount %s from %s and detach it from %s: this agent attached it, and the NodeConfig no longer lists it",
		d.note.DiskID, d.note.MountPoint, d.note.InstanceID)
	return p, nil
}

// Apply carries p out as far as it goes now.
func (d *Detach) Apply(ctx context.Context, p node.Plan) error { return p.Apply(ctx) }

// detach does what is next, and returns an error of class waiting until all is done.
func (d *Detach) detach(ctx context.Context) error {
	id, instance := d.note.DiskID, d.note.InstanceID
	disk, err := d.cloud.DescribeDisk(ctx, id)
	if err != nil {
		return err
	}
	switch {
	case disk.State == tencent.DiskUnattached && recent(d.note.At) && d.note.Detaching.IsZero():
		return node.Waiting("Attaching", "%s was to be attached a moment ago; it is detached after that", id)
	case disk.InstanceID != instance && disk.State != tencent.DiskDetaching:
		d.log.Info("detached", "disk", id, "state", disk.State)
		return d.ledger.forget(id)
	case disk.State == tencent.DiskDetaching, disk.State == tencent.DiskAttached && recent(d.note.Detaching):
		return node.Waiting("Detaching", "%s is being detached", id)
	case disk.State != tencent.DiskAttached:
		return node.Waiting("DiskBusy", "%s is %s; it is detached after that", id, disk.State)
	}
	if err := d.release(ctx); err != nil {
		return err
	}
	d.note.Detaching = time.Now().UTC().Truncate(time.Second)
	if err := d.ledger.store(id+attachedSuffix, d.note); err != nil {
		return err
	}
	d.log.Info("detaching", "disk", id, "instance", instance)
	if err := d.cloud.DetachDisk(ctx, instance, id); err != nil {
		return fmt.Errorf("detach %s: %w", id, err)
	}
	return node.Waiting("Detaching", "%s is being detached", id)
}

// release unmounts the disk if nobody uses it, and makes sure that nobody does.
func (d *Detach) release(ctx context.Context) error {
	dev, at, err := d.find()
	if err != nil || dev.Serial == "" {
		return err // it has not appeared, or is gone
	}
	have := observed{}
	if have.Mounts, err = mounts(); err != nil {
		return err
	}
	if m, ok := have.at(d.note.MountPoint); ok && m.Dev == at.dev().Dev {
		err := unix.Unmount(m.Target, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			return node.Waiting("InUse", "%s is still used on %s by %s; it is detached once nobody does", dev, m.Target, word(strings.Join(programs(m.Target), ", ")))
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", m.Target, err)
		}
		d.log.Info("unmounted", "disk", d.note.DiskID, "dir", m.Target)
		// What says that it was mounted goes, too; what stays of it in systemd's memory
		// mounts nothing.
		for _, left := range []string{unitPath(m.Target), notePath(d.run, m.Target)} {
			if err := os.Remove(left); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("unmount %s: %w", m.Target, err)
			}
		}
		if have.Mounts, err = mounts(); err != nil {
			return err
		}
	}
	for _, l := range slices.Backward(at.up) {
		if err := l.lower(ctx); err != nil {
			return err
		}
		dev.Holders = nil // or it would not have been let go
	}
	if have.Swaps, err = swaps(); err != nil {
		return err
	}
	if err := unused(dev, have); err != nil {
		return node.Waiting("InUse", "%w; it is detached once nobody does", errors.Unwrap(err))
	}
	// A mount in another namespace is in no list here, but claims the disk.
	f, err := os.OpenFile("/dev/"+dev.Name, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return node.Waiting("InUse", "%s is claimed by somebody, as by a mount in another namespace (grep -l %s /proc/*/mountinfo); it is detached once nobody does", dev, dev.Name)
	}
	if err != nil {
		return fmt.Errorf("claim %s: %w", dev, err)
	}
	return f.Close()
}

// find returns the disk, and what the ledger knows to stand on it. Of a stripe that has
// lost a disk already, nothing does.
func (d *Detach) find() (dev device, at place, err error) {
	var have observed
	if have.Devices, err = devices(d.sys, nil); err != nil {
		return dev, at, err
	}
	i := slices.IndexFunc(have.Devices, func(v device) bool { return v.Serial == d.note.DiskID })
	if i < 0 {
		return dev, at, nil
	}
	dev = have.Devices[i]
	at = place{disks: []device{dev}, devs: []device{dev}}
	if have.Layers, err = readLayers(d.sys); err != nil {
		return dev, at, err
	}
	have.Ledger, _ = d.ledger.read() // what it does not know is not ours to take down
	made := have.Ledger[d.note.DiskID]
	want := node.DiskConfig{DiskID: made.DiskID}
	if made.Array != nil {
		want = node.DiskConfig{DiskIDs: made.Array.Members}
	}
	if made.Crypt != "" {
		want.Encryption = &node.DiskEncryption{}
	}
	if up, err := raise(want, have); err == nil && want.Layered() {
		at = up
	}
	return dev, at, nil
}

// maxUsers is how many users of a disk are named.
const maxUsers = 5

// programs names processes that use a file below target. Who ends meanwhile, or may not
// be looked at, is passed over.
func programs(target string) []string {
	var found []string
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, p := range procs {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		dir := filepath.Join("/proc", p.Name())
		if !uses(dir, target) {
			continue
		}
		name, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil {
			continue
		}
		found = append(found, fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(name)), p.Name()))
		if len(found) == maxUsers {
			return append(found, "…")
		}
	}
	return found
}

func uses(dir, target string) bool {
	links := []string{filepath.Join(dir, "cwd"), filepath.Join(dir, "root"), filepath.Join(dir, "exe")}
	for _, sub := range []string{"fd", "map_files"} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if err != nil {
			continue
		}
		for _, e := range entries {
			links = append(links, filepath.Join(dir, sub, e.Name()))
		}
	}
	return slices.ContainsFunc(links, func(l string) bool {
		to, err := os.Readlink(l)
		return err == nil && (to == target || strings.HasPrefix(to, target+"/"))
	})
}
