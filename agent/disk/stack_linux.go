package disk

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// readLayers lists the arrays and mappings of the machine.
func readLayers(sys string) ([]layer, error) {
	entries, err := os.ReadDir(filepath.Join(sys, "block"))
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var all []layer
	for _, e := range entries {
		l, err := readLayer(sys, e.Name())
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue // none, or just gone
		}
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

// readLayer reads what an array or a mapping is made of; anything else is ErrNotExist.
// Source: linux Documentation/admin-guide/md.rst, Documentation/ABI/testing/sysfs-block-dm
func readLayer(sys, name string) (layer, error) {
	dir := filepath.Join(sys, "block", name)
	l := layer{device: device{Name: name}}
	var err error
	if l.Mapping, err = attribute(dir, "dm/name"); err == nil {
		l.Kind = crypt
		uuid, err := attribute(dir, "dm/uuid")
		if err != nil {
			return l, fmt.Errorf("read mapping %s: %w", name, err)
		}
		l.UUID = uuidOf(uuid)
		slaves, err := os.ReadDir(filepath.Join(dir, "slaves"))
		if err != nil {
			return l, fmt.Errorf("read mapping %s: %w", name, err)
		}
		for _, s := range slaves {
			l.Beneath = append(l.Beneath, living(s.Name(), filepath.Join(dir, "slaves", s.Name())))
		}
	} else if l.State, err = attribute(dir, "md/array_state"); err == nil {
		l.Kind = array
		err = l.readArray(filepath.Join(dir, "md"))
	}
	if err != nil {
		return l, fmt.Errorf("read %s: %w", name, err)
	}
	if err := l.readAttributes(dir); err != nil {
		return l, err
	}
	return l, l.readUsers(dir)
}

// readArray reads the level of an array, and which of its places has which device.
func (l *layer) readArray(dir string) error {
	var err error
	if l.Level, err = attribute(dir, "level"); err != nil {
		return err
	}
	for name, to := range map[string]func(int64){
		"raid_disks": func(n int64) { l.Beneath = make([]string, min(max(n, 0), 4096)) },
		"chunk_size": func(n int64) { l.ChunkBytes = n },
	} {
		text, err := attribute(dir, name)
		if err != nil {
			return err
		}
		n, err := strconv.ParseInt(strings.Fields(text + " 0")[0], 10, 64)
		if err != nil {
			return err
		}
		to(n)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), "dev-")
		if !ok {
			continue
		}
		slot, err := attribute(filepath.Join(dir, e.Name()), "slot")
		if err != nil {
			return err
		}
		name = living(name, filepath.Join(dir, e.Name(), "block"))
		if i, err := strconv.Atoi(slot); err == nil && i >= 0 && i < len(l.Beneath) {
			l.Beneath[i] = name
		} else {
			l.Beneath = append(l.Beneath, name) // it has no place, or not yet
		}
	}
	return nil
}

// living returns the name of a device, or nothing if its link leads nowhere: it is gone,
// and what is made of it holds on to it.
func living(name, link string) string {
	if _, err := os.Stat(link); err != nil {
		return ""
	}
	return name
}

// beneath returns the notes of the disks under a device of which the ledger says that it
// is made of others. One that is gone has no number any more.
func (d *Disk) beneath(name string, made entry) (all []serving) {
	var ids []string
	switch {
	case made.Array != nil:
		ids = made.Array.Members
	case made.Crypt != "":
		ids = []string{made.DiskID}
	}
	names := bottom(d.sys, name)
	for i, id := range ids {
		s := serving{DiskID: id}
		if i < len(names) && names[i] != "" {
			s.Dev, _ = d.devOf(names[i]) // it may have gone just now
		}
		all = append(all, s)
	}
	return all
}

// bottom names the disks that a device is made of, in order; one that is gone is "".
func bottom(sys, name string) (names []string) {
	l, err := readLayer(sys, name)
	if err != nil {
		return []string{name}
	}
	for _, b := range l.Beneath {
		names = append(names, bottom(sys, b)...)
	}
	return names
}

// sameLayer asks an array or a mapping, and all that it is made of, who they are.
func (d *Disk) sameLayer(dev device) error {
	now, err := readLayer(d.sys, dev.Name)
	if err != nil {
		return err
	}
	now.Serial = dev.Serial
	var beneath []string
	for _, u := range dev.under {
		beneath = append(beneath, u.Name)
	}
	if !now.is(dev) || !slices.Equal(now.Beneath, beneath) {
		return fmt.Errorf("%s is now /dev/%s of %s: %w", dev, now.Name, list(now.Beneath), errChanged)
	}
	for _, u := range dev.under {
		if err := d.same(u); err != nil {
			return err
		}
	}
	return nil
}

// load has systemd load a kernel module: the agent may not, and needs one only where
// the NodeConfig wants it.
func (d *Disk) load(ctx context.Context, module string) error {
	if _, err := os.Stat(filepath.Join("/sys/module", module)); err == nil {
		return nil
	}
	if _, err := program(ctx, invocation{args: []string{"systemctl", "start", "modprobe@" + module + ".service"}}); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join("/sys/module", module)); err != nil {
		return node.Terminal("NoModule", "boot a kernel that has it, or take diskIDs or encryption out of the NodeConfig",
			fmt.Errorf("the kernel has no module %s", module))
	}
	return nil
}

// arrays is held from an array device's choice until it has disks: two stripes are
// not to choose the same.
var arrays sync.Mutex

// newArray returns the name of an array device that is empty: one that was left so, or
// a new one. mdadm counts from 127 down, and so a number from 128 on is nobody's. The
// caller holds arrays.
func (d *Disk) newArray(ctx context.Context) (string, error) {
	if err := d.load(ctx, "raid0"); err != nil {
		return "", err
	}
	for n := 128; ; n++ {
		name := fmt.Sprintf("md%d", n)
		l, err := readLayer(d.sys, name)
		if err == nil && l.State == "clear" && !slices.ContainsFunc(l.Beneath, func(s string) bool { return s != "" }) {
			return name, nil
		}
		if err == nil {
			continue
		}
		if err := os.WriteFile("/sys/module/md_mod/parameters/new_array", []byte(name), 0); !errors.Is(err, unix.EEXIST) {
			return name, err
		}
	}
}

func setArray(name, attribute, value string) error {
	if err := os.WriteFile(filepath.Join("/sys/block", name, "md", attribute), []byte(value), 0); err != nil {
		return fmt.Errorf("set %s of /dev/%s to %s: %w", attribute, name, value, err)
	}
	return nil
}

// assemble gives the kernel the disks of an array, in order, of which decide has
// found that their superblocks are the array's; lets it start read-only; looks at
// what it made of them; and only then lets it be written to. The kernel is told by
// itself, and not by mdadm --assemble, so that it is these open disks and no others.
func (d *Disk) assemble(ctx context.Context, at place, have observed) (err error) {
	name, sb := at.dev().Name, have.Members[at.disks[0].Serial].Member
	if at.next() == array {
		arrays.Lock()
		defer arrays.Unlock()
		for _, dev := range at.disks {
			pin, err := d.open(dev, unix.O_RDONLY)
			if err != nil {
				return err
			}
			defer pin.Close()
		}
		if name, err = d.newArray(ctx); err != nil {
			return fmt.Errorf("make an array device: %w", err)
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, setArray(name, "array_state", "clear"))
			}
		}()
		if err := setArray(name, "metadata_version", "1.2"); err != nil {
			return err
		}
		for _, dev := range at.disks {
			if err := setArray(name, "new_dev", dev.Dev); err != nil {
				return fmt.Errorf("add %s to an array: %w", dev, err)
			}
		}
		if err := setArray(name, "array_state", "readonly"); err != nil {
			return err
		}
	}
	if _, err := d.arrayIs(name, at.disks, sb.ChunkBytes); err != nil {
		return err
	}
	if err := setArray(name, "array_state", "active"); err != nil {
		return err
	}
	// Whoever opens an array first makes it another medium, with another diskseq.
	// Source: linux drivers/md/md.c, md_check_events
	f, err := os.Open("/dev/" + name)
	if err != nil {
		return err
	}
	return f.Close()
}

// arrayIs returns the array as a device if it is what it should be.
func (d *Disk) arrayIs(name string, disks []device, chunk int64) (device, error) {
	l, err := readLayer(d.sys, name)
	if err != nil {
		return device{}, err
	}
	ok := l.running() && l.Level == "raid0" && l.ChunkBytes == chunk && len(l.Beneath) == len(disks)
	for i := range disks {
		ok = ok && l.Beneath[i] == disks[i].Name
	}
	if !ok {
		return device{}, fmt.Errorf("/dev/%s is a %s of %s with chunks of %s, not a raid0 of %s: %w", name, l.Level, list(l.Beneath), Size(l.ChunkBytes), names(disks), errChanged)
	}
	at := place{disks: disks, devs: disks, left: []kind{array}}
	at.add(&l)
	return at.dev(), d.same(at.dev())
}

// mappingIs returns the mapping as a device if it is one of dev alone.
func (d *Disk) mappingIs(dev device, uuid string) (device, error) {
	all, err := readLayers(d.sys)
	if err != nil {
		return device{}, err
	}
	for _, l := range all {
		if l.Kind == crypt && l.Mapping == label(dev.Serial) && slices.Equal(l.Beneath, []string{dev.Name}) && l.UUID == uuid {
			top := l.device
			top.Serial, top.under = dev.Serial, []device{dev}
			return top, d.same(top)
		}
	}
	return device{}, fmt.Errorf("no mapping of %s alone is there: %w", dev, errChanged)
}

// unlock opens the mapping of an encrypted device.
func (d *Disk) unlock(ctx context.Context, at place) error {
	dev := at.dev()
	key, err := d.key(dev.Serial, false)
	if err != nil {
		return err
	}
	pin, err := d.open(dev, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer pin.Close()
	_, err = d.openCrypt(ctx, pin, dev, key)
	return err
}

// openCrypt opens the mapping of a device, which pin is open for.
func (d *Disk) openCrypt(ctx context.Context, pin *os.File, dev device, key node.Secret) (device, error) {
	f, err := reread(pin)
	if err != nil {
		return device{}, err
	}
	c, err := d.read(ctx, f, dev, errand{Act: toGlance}, d.quiet, nil)
	f.Close()
	if err != nil {
		return device{}, err
	}
	if c.Hung {
		return device{}, c.waiting()
	}
	h := c.Header
	if h == nil {
		return device{}, fmt.Errorf("%s has no LUKS2 header: %w", dev, errChanged)
	}
	// A key does not end where a line does, and is on no command line.
	_, err = program(ctx, invocation{
		args:  []string{"cryptsetup", "open", "--type", "luks2", "--key-file", "-", "/proc/self/fd/3", label(dev.Serial)},
		stdin: key, files: []*os.File{pin},
	})
	if exit, ok := errors.AsType[*exitError](err); ok && exit.code == 2 { // Source: cryptsetup(8), RETURN CODES
		d.wrong = wrongKey{h.UUID, sha256.Sum256([]byte(key.Reveal()))}
		return device{}, d.keyState(dev.Serial).wrong(dev, *h)
	}
	if err != nil {
		return device{}, fmt.Errorf("open the encryption of %s: %w", dev, err)
	}
	return d.mappingIs(dev, h.UUID)
}

// widen makes the mapping of an encrypted disk as large as the disk has become, which
// changes nothing on the disk, and returns it as it is then.
func (d *Disk) widen(ctx context.Context, dev device) (device, error) {
	key, err := d.key(dev.Serial, false)
	if err != nil {
		return device{}, err
	}
	if _, err := program(ctx, invocation{args: []string{"cryptsetup", "resize", "--key-file", "-", label(dev.Serial)}, stdin: key}); err != nil {
		return device{}, fmt.Errorf("resize the mapping of %s: %w", dev, err)
	}
	l, err := readLayer(d.sys, dev.Name)
	if err != nil {
		return device{}, err
	}
	want := dev.room()
	if dev.SizeBytes = want; l.SizeBytes != want {
		return device{}, fmt.Errorf("the mapping of %s has %s, not %s", dev, Size(l.SizeBytes), Size(want))
	}
	return dev, d.same(dev)
}

// lower stops an array or closes a mapping; the kernel refuses while it is used.
func (l layer) lower(ctx context.Context) error {
	var err error
	busy := false
	if l.Kind == array {
		err = setArray(l.Name, "array_state", "clear")
		busy = errors.Is(err, unix.EBUSY)
	} else if _, err = program(ctx, invocation{args: []string{"cryptsetup", "close", l.Mapping}}); err != nil {
		exit, ok := errors.AsType[*exitError](err)
		busy = ok && exit.code == 5 // Source: cryptsetup(8), RETURN CODES
	}
	if busy {
		return node.Waiting("InUse", "/dev/%s is to be stopped, and somebody still uses it, as with a file open of a mount that is gone: delete the pods that had it mounted by hostPath (%w)", l.Name, err)
	}
	return err
}
