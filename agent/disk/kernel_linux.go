package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// observe reads what decide needs; what is on the disk, only if it is asked for
// and nobody uses the disk.
func (d *Disk) observe(ctx context.Context, content bool) (observed, error) {
	have := observed{Listed: d.sealed.Facts.DataDisks, Cluster: d.sealed.Config.Cluster.ID, Boot: d.boot}
	var err error
	// A disk that is mounted needs no ledger.
	have.Ledger, have.ledgerErr = d.ledger.read()
	// Source: systemd src/udev/udevadm-settle.c
	if _, err := os.Lstat("/run/udev/queue"); err == nil {
		have.Settling = true
	}
	if have.Mounts, err = mounts(); err != nil {
		return have, err
	}
	_, mounted := have.at(d.want.MountPoint)
	if !mounted { // else it is no link, and a look at it may fail, or hang
		if have.Link, err = link(d.want.MountPoint); err != nil {
			return have, err
		}
	}
	if err := d.observeServing(ctx, &have); err != nil {
		return have, err
	}
	if have.Devices, err = d.devices(mounted, have.Was); err != nil {
		return have, err
	}
	if mounted {
		if have.Unit, err = d.observeUnit(); err != nil {
			return have, err
		}
		have.Stopped = d.tended.readOnly()
	}
	if have.Swaps, err = swaps(); err != nil {
		return have, err
	}
	if d.want.Layered() {
		if have.Layers, err = readLayers(d.sys); err != nil {
			return have, err
		}
	}
	have.Binding, have.fresh, have.boundErr = d.bound(ctx, have)
	at, err := raise(d.want, have)
	if d.want.Attach && node.ReasonOf(err, "") == absent {
		if have.Attach, err = d.attachable(ctx, have.missing(d.want)); err != nil {
			return have, err
		}
		return have, nil
	}
	if m, _ := have.at(d.want.MountPoint); err == nil && mounted && have.Lost == "" {
		d.size(at, m, &have)
	}
	if err != nil || mounted || have.ledgerErr != nil || at.unused(have) != nil {
		d.drop()         // whatever is read, it is not to be formatted
		return have, nil // decide says why again
	}
	return have, d.contents(ctx, at, content, &have)
}

// contents reads what the devices hold that a stack stands on.
func (d *Disk) contents(ctx context.Context, at place, look bool, have *observed) (err error) {
	if d.want.Encryption != nil {
		have.Key = d.keyState(at.disks[0].Serial)
	}
	if len(d.parts) > 0 {
		have.Members, have.Decisions = map[string]content{}, map[string]*decision{}
		for _, dev := range at.disks {
			part := d.parts[dev.Serial]
			part.sys, part.patience, part.quiet = d.sys, d.patience, d.quiet
			if at.next() == array {
				have.Decisions[dev.Serial] = d.ledger.decision(dev.Serial)
			} else {
				part.drop()
			}
			if have.Members[dev.Serial], err = part.content(ctx, dev, look); err != nil {
				return err
			}
		}
	}
	if at.next() == array || at.stale != nil {
		return nil
	}
	have.Decision = d.ledger.decision(at.dev().Serial)
	if n := len(at.up); n > 0 && at.up[n-1].Kind == crypt && have.Ledger[at.dev().Serial].State == stateFormatting && look {
		if have.Beneath, err = d.look(ctx, at.dev().under[0]); err != nil {
			return err
		}
	}
	have.Content, err = d.content(ctx, at.dev(), look)
	return err
}

// content returns what a device holds, as far as is known while it is being proven
// blank.
func (d *Disk) content(ctx context.Context, dev device, look bool) (content, error) {
	if d.proof != nil && !d.proof.dev.is(dev) || d.held != nil && !d.held.claim.dev.is(dev) {
		d.drop()
	}
	p := d.proof
	switch {
	case !look:
		return content{}, nil
	case d.held != nil:
		return content{Blank: true}, nil
	case p != nil && !p.ended():
		text, hung := p.progress(time.Now())
		return content{Proving: text, Hung: hung}, nil
	case p != nil && p.found.Blank:
		return content{Blank: true}, nil
	case p != nil:
		d.conclude(ctx) // which notes what was found, and where to look for it again
	}
	return d.look(ctx, dev)
}

// bootID returns the kernel's name for this boot, see random(4).
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "" // a kernel of which nothing is known
	}
	return strings.TrimSpace(string(b))
}

// link returns where path leads if a part of it is a symbolic link, else nothing.
// The kernel would mount at the one and list the mount at the other.
func link(path string) (string, error) {
	path = filepath.Clean(path)
	for at, below := path, ""; ; at, below = filepath.Dir(at), filepath.Join(filepath.Base(at), below) {
		real, err := filepath.EvalSymlinks(at)
		if errors.Is(err, fs.ErrNotExist) && at != "/" {
			continue // it will be made
		}
		if err != nil {
			return "", fmt.Errorf("resolve mount point %s: %w", path, err)
		}
		if real = filepath.Join(real, below); real == path {
			real = ""
		}
		return real, nil
	}
}

// look glances at the content of dev, past the page cache.
func (d *Disk) look(ctx context.Context, dev device) (content, error) {
	f, err := d.open(dev, unix.O_RDONLY|unix.O_DIRECT)
	if err != nil {
		return content{}, err
	}
	defer f.Close()
	// Whoever formats or partitions a disk holds its lock exclusively, udev while
	// it reads holds it shared. Source: https://systemd.io/BLOCK_DEVICE_LOCKING
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != nil {
		return content{Busy: true}, nil
	}
	e := errand{Act: toGlance}
	if d.suspect.dev.is(dev) {
		e.Suspect = d.suspect.at
	}
	c, err := d.read(ctx, f, dev, e, d.quiet, nil)
	if err != nil || c.Hung {
		return c, err
	}
	return c, d.same(dev)
}

// open opens the device node of dev and makes sure that it is dev. While it is
// open the kernel does not give the name or the number to another disk.
func (d *Disk) open(dev device, flags int) (*os.File, error) {
	f, err := os.OpenFile("/dev/"+dev.Name, flags, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", dev, err)
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil {
		if got := devNumber(st.Rdev); st.Mode&unix.S_IFMT != unix.S_IFBLK || got != dev.Dev {
			err = fmt.Errorf("it is device %s, not %s: %w", got, dev.Dev, errChanged)
		}
	}
	if err == nil {
		err = d.same(dev)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open %s: %w", dev, err)
	}
	return f, nil
}

// same asks the device itself once more who it is.
func (d *Disk) same(dev device) error {
	if len(dev.under) > 0 {
		return d.sameLayer(dev)
	}
	now, err := readDevice(d.sys, dev.Name, nil)
	if err != nil {
		return err
	}
	if !now.is(dev) {
		return fmt.Errorf("%s is now %s: %w", dev, now, errChanged)
	}
	return nil
}

// mount mounts dev, which observe has just found to hold the file system, and
// checks that it is dev which got mounted.
func (d *Disk) mount(ctx context.Context, dev device, fs string) error {
	pin, err := d.open(dev, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer pin.Close()
	target := d.want.MountPoint
	if err := os.MkdirAll(target, 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	// Nothing can then be written beneath a mount that is missing.
	if err := makeImmutable(target); err != nil {
		d.log.Warn("the mount point stays writable when nothing is mounted on it", "disk", dev.Serial, "dir", target, "err", err)
	}
	options := "errors=remount-ro"
	if fs == string(node.XFS) {
		// A disk that was made from a snapshot has the UUID of the one that the snapshot
		// was taken of, and xfs mounts only one of a UUID. Here disks are told by serial.
		options = "nouuid"
	}
	source := "/dev/" + dev.Name // which pin keeps from being another's
	if err := d.publishUnit(dev, fs, source); err != nil {
		return err
	}
	if err := d.mountNow(ctx, errand{Act: toMount, Name: dev.Name, Target: target, FSType: fs, Options: options}); err != nil {
		return unmountable(fmt.Errorf("mount %s (%s) on %s: %w", dev, fs, target, err))
	}
	all, err := mounts()
	if err == nil {
		if m, ok := (observed{Mounts: all}).at(target); !ok || m.Dev != dev.Dev {
			err = fmt.Errorf("device %s is mounted there: %w", m.Dev, errChanged)
		} else {
			err = d.same(dev)
		}
	}
	if err != nil {
		err = fmt.Errorf("verify mount of %s on %s: %w", dev, target, err)
		return errors.Join(err, d.unmount(ctx, noteOf(dev)))
	}
	d.tended.mounted(dev.ids())
	defer d.poke()
	return d.setNote(noteOf(dev))
}

// mountNow has a helper mount.
func (d *Disk) mountNow(ctx context.Context, e errand) error {
	found, err := d.reads.send(ctx, e, d.quiet, nil)
	switch hangs := new(errHangs); {
	case errors.As(err, hangs), errors.Is(err, errOut):
		return node.Waiting(Hung, "%w: the journal of a large file system takes its time, and a disk that does not answer for ever; see `dmesg`, and look at the disk in the console", err)
	case err != nil:
		return err
	case len(found) != 1:
		return errMute
	case found[0].Errno != 0:
		return unix.Errno(found[0].Errno)
	case found[0].Error != "":
		return errors.New(found[0].Error)
	}
	return nil
}

// unmountable says what to do about a file system that the kernel does not mount. Only
// a damaged one is a case for a human: others may come right.
func unmountable(err error) error {
	// EUCLEAN and EBADMSG are what xfs and ext4 call EFSCORRUPTED and EFSBADCRC.
	for _, damage := range []error{unix.EUCLEAN, unix.EBADMSG, unix.EINVAL} {
		if errors.Is(err, damage) {
			return node.Terminal("Unmountable", "see `dmesg` for what the kernel found; check it (`e2fsck -fn`, `xfs_repair -n`), repair it or roll the disk back to a snapshot", err)
		}
	}
	return err
}

func makeImmutable(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	const immutable = 0x10 // FS_IMMUTABLE_FL of linux include/uapi/linux/fs.h
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&immutable != 0 {
		return err
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|immutable)
}

// devices lists the block devices that have a serial. One that hangs would hang the
// agent: it is not asked, and is what it has told before, if it has. While the disk
// is mounted, all that have told theirs are not asked again. Whoever formats or mounts
// asks once more.
func (d *Disk) devices(mounted bool, was *serving) ([]device, error) {
	ask := func(dir, dev, seq string) (string, error) {
		if mounted && was != nil && was.Gone.IsZero() {
			for _, s := range was.disks() {
				if dev == s.Dev && seq == s.Seq {
					return s.DiskID, nil
				}
			}
		}
		told, ok := "", false
		if seq != "" {
			told, ok = d.serials[dev+" "+seq]
		}
		if ok && mounted || !alive(dir) {
			return told, nil
		}
		serial, err := readSerial(dir)
		if err == nil && serial != "" {
			d.serials[dev+" "+seq] = serial
		}
		return serial, err
	}
	return devices(d.sys, ask)
}

// devices lists the block devices that have a serial, and asks them as readDevice does.
func devices(sys string, ask func(dir, dev, seq string) (string, error)) ([]device, error) {
	entries, err := os.ReadDir(filepath.Join(sys, "block"))
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var all []device
	for _, e := range entries {
		found, err := readDevice(sys, e.Name(), ask)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue // no serial, or just gone
		}
		if err != nil {
			return nil, err
		}
		all = append(all, found)
	}
	return all, nil
}

// readDevice reads a device's attributes; without a serial it is ErrNotExist. The
// serial is read from the device itself, unless somebody else is to be asked.
func readDevice(sys, name string, ask func(dir, dev, seq string) (string, error)) (device, error) {
	dir := filepath.Join(sys, "block", name)
	d := device{Name: name}
	err := d.readAttributes(dir)
	if err != nil {
		return d, err
	}
	if ask != nil {
		d.Serial, err = ask(dir, d.Dev, d.Seq)
	} else {
		d.Serial, err = readSerial(dir)
	}
	if err != nil {
		return d, fmt.Errorf("read serial of %s: %w", name, err)
	}
	return d, d.readUsers(dir)
}

// readAttributes reads what every block device has.
func (d *device) readAttributes(dir string) (err error) {
	if d.Dev, err = attribute(dir, "dev"); err != nil {
		return fmt.Errorf("read device %s: %w", d.Name, err)
	}
	if d.Seq, err = attribute(dir, "diskseq"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read device %s: %w", d.Name, err)
	}
	sectors, err := attribute(dir, "size")
	if err == nil {
		d.SizeBytes, err = strconv.ParseInt(sectors, 10, 54)
		d.SizeBytes *= 512 // of whatever size the device's own sectors are
	}
	if err != nil {
		return fmt.Errorf("read size of %s: %w", d.Name, err)
	}
	ro, err := attribute(dir, "ro")
	if err != nil {
		return fmt.Errorf("read device %s: %w", d.Name, err)
	}
	d.ReadOnly = ro != "0"
	return nil
}

// readUsers reads which partitions the device has and what is stacked on it.
func (d *device) readUsers(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read device %s: %w", d.Name, err)
	}
	dirs := []string{dir}
	for _, e := range entries {
		sub := filepath.Join(dir, e.Name())
		if _, err := os.Stat(filepath.Join(sub, "partition")); err != nil {
			continue
		}
		dev, err := attribute(sub, "dev")
		if err != nil {
			return fmt.Errorf("read partition %s: %w", e.Name(), err)
		}
		d.Partitions = append(d.Partitions, part{e.Name(), dev})
		dirs = append(dirs, sub)
	}
	for _, sub := range dirs {
		holders, err := os.ReadDir(filepath.Join(sub, "holders"))
		if err != nil {
			return fmt.Errorf("read holders of %s: %w", d.Name, err)
		}
		for _, h := range holders {
			d.Holders = append(d.Holders, h.Name())
		}
	}
	return nil
}

func attribute(dir, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	return strings.TrimSpace(strings.TrimRight(string(b), "\x00")), err
}

func mounts() ([]mount, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMountinfo(string(b))
}

// swaps returns the names of the block devices that are swapped to.
func swaps() ([]string, error) {
	b, err := os.ReadFile("/proc/swaps")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // a kernel without swap
	}
	if err != nil {
		return nil, fmt.Errorf("list swap space: %w", err)
	}
	var names []string
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(line, "/dev/"); ok {
			names = append(names, strings.Fields(path)[0])
		}
	}
	return names, nil
}

func devNumber(rdev uint64) string {
	return fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
}
