package disk

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// permit says that every disk, or the one device made of them, that a file system is
// to be made on has been proven blank, or that an operator has decided that what it
// holds is of no use, and that it may be formatted, once. Only prove makes one, and
// only its methods run programs that write: makeArray, makeCrypt and mkfs.
type permit struct {
	claims []*claim // open, and so their names and numbers are no other disk's; locked
	dev    device   // that mkfs, or the next layer, goes on; its disks' first one names it
	top    *os.File // the same, open
	made   entry    // what is made, in the ledger already
	opened []*os.File
}

func (p *permit) close() {
	for _, c := range p.claims {
		c.close()
	}
	for _, f := range p.opened {
		f.Close()
	}
}

// format makes what the NodeConfig wants on blank devices, or where an operator has
// decided: the layers that are not up yet, and the file system.
func (d *Disk) format(ctx context.Context, at place, have observed) error {
	p, err := d.prove(ctx, at, have)
	if err != nil {
		return err
	}
	defer p.close()
	for _, c := range p.claims {
		if c.order != nil {
			if err := p.wipe(ctx, d, c); err != nil {
				return fmt.Errorf("erase what %s holds: %w", c.dev, err)
			}
		}
	}
	done := d.account.begin("format")
	for _, k := range at.left {
		switch k {
		case array:
			err = d.makeArray(ctx, p)
		case crypt:
			err = d.makeCrypt(ctx, p)
		}
		if err != nil {
			done()
			return err
		}
	}
	err = p.mkfs(ctx, d.want.FileSystem)
	done()
	if err != nil {
		return d.spoilt(p, fmt.Errorf("make %s on %s: %w", d.want.FileSystem, p.dev, err))
	}
	if err := d.same(p.dev); err != nil {
		return err
	}
	exclusive, err := reopen(p.top, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("read back %s: %w", p.dev, err)
	}
	c, err := d.read(ctx, exclusive, p.dev, errand{Act: toReadBack}, d.quiet, nil)
	if err := errors.Join(err, exclusive.Close()); err != nil {
		return fmt.Errorf("read back %s: %w", p.dev, err)
	}
	if c.Hung {
		return c.waiting()
	}
	if c.UUID != p.made.UUID || c.Label != label(p.dev.Serial) || !slices.Equal(c.Signatures, []string{string(d.want.FileSystem)}) {
		return d.spoilt(p, fmt.Errorf("read back %s: it holds %s, not the %s with uuid %s just made", p.dev, c, d.want.FileSystem, p.made.UUID))
	}
	p.made.State, p.made.SizeBytes, p.made.Boot = stateFormatted, p.dev.SizeBytes, ""
	return d.ledger.write(p.made)
}

// spoilt notes that making a file system has failed, and returns why. Its superblock may
// be sound all the same, as that of xfs is, of which another write has failed: it is not
// to be taken for one that was only not journalled as made.
func (d *Disk) spoilt(p *permit, why error) error {
	p.made.Boot = ""
	if err := d.ledger.write(p.made); err != nil {
		return errors.Join(why, err)
	}
	return why
}

// prove returns a permit if the devices that at stands on are the right ones, used by
// nobody, and proven blank. One of which an operator has decided need only be
// readable at its ends.
func (d *Disk) prove(ctx context.Context, at place, have observed) (_ *permit, err error) {
	claims, proof, err := d.claims(ctx, at, have)
	if err != nil {
		return nil, err
	}
	p := &permit{claims: claims, dev: at.dev()}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	for _, c := range claims {
		if err := d.unchanged(c); err != nil {
			return nil, err
		}
	}
	d.log.Info("may be formatted", "disk", names(at.devs), "proof", proof)
	p.made = at.entry(d.want, have)
	p.made.State, p.made.FileSystem, p.made.Proof, p.made.Boot = stateFormatting, d.want.FileSystem, proof, d.boot
	d.name(&p.made, at, have, slices.ContainsFunc(claims, func(c *claim) bool { return c.order != nil }))
	for _, c := range claims {
		if c.order != nil {
			if err := d.ledger.use(c.order); err != nil {
				return nil, err
			}
		}
	}
	if slices.Contains(at.left, crypt) {
		if _, err := d.key(at.disks[0].Serial, true); err != nil {
			return nil, err
		}
	}
	if err := d.ledger.write(p.made); err != nil {
		return nil, err
	}
	for _, c := range claims {
		if err := c.exclusive.Close(); err != nil {
			return nil, err
		}
		c.exclusive = nil
	}
	if len(claims) == 1 {
		p.top = claims[0].disk
	}
	return p, nil
}

// name chooses the UUIDs of what is to be made. Those of an attempt that was cut off
// are taken again, unless what it left is erased.
func (d *Disk) name(e *entry, at place, have observed, erase bool) {
	past := have.Ledger[e.DiskID]
	if past.State != stateFormatting || erase {
		past = entry{}
	}
	for _, k := range at.left {
		switch k {
		case array:
			e.Array = past.Array
			if e.Array == nil {
				e.Array = &madeArray{UUID: newUUID(have.Cluster), Members: d.want.DiskIDs, ChunkBytes: chunkBytes}
			}
		case crypt:
			e.Crypt = cmp.Or(past.Crypt, newUUID(have.Cluster))
		}
	}
	e.UUID = cmp.Or(past.UUID, newUUID(have.Cluster))
}

// makeArray makes an array of the proven disks, and goes on with it.
func (d *Disk) makeArray(ctx context.Context, p *permit) error {
	var disks []device
	arrays.Lock()
	defer arrays.Unlock()
	name, err := d.newArray(ctx)
	if err != nil {
		return fmt.Errorf("make an array device: %w", err)
	}
	// Nothing is asked, and no configuration read, by which mdadm would do otherwise.
	in := invocation{args: []string{"mdadm", "--create", "/dev/" + name, "--run", "--config=none", "--homehost=any", "--metadata=1.2",
		"--level=0", "--raid-devices=" + strconv.Itoa(len(p.claims)), "--uuid=" + mdUUID(p.made.Array.UUID), "--name=" + arrayName(p.made.Array.Members),
		"--chunk=" + strconv.FormatInt(p.made.Array.ChunkBytes>>10, 10), "--data-offset=" + strconv.Itoa(dataAt>>10)}}
	for i, c := range p.claims {
		in.args = append(in.args, "/proc/self/fd/"+strconv.Itoa(3+i))
		in.files = append(in.files, c.disk)
		disks = append(disks, c.dev)
	}
	if _, err := program(ctx, in); err != nil {
		return fmt.Errorf("make an array of %s: %w", names(disks), err)
	}
	dev, err := d.arrayIs(name, disks, p.made.Array.ChunkBytes)
	if err != nil {
		return err
	}
	return p.onto(ctx, d, dev)
}

// makeCrypt makes a LUKS2 header on the device, opens it, and goes on with the
// mapping. The key is random, so that no work need be put into guessing it being
// slow: argon2 would take a gigabyte of memory, at every boot, for nothing.
func (d *Disk) makeCrypt(ctx context.Context, p *permit) error {
	key, err := d.key(p.dev.Serial, false)
	if err != nil {
		return err
	}
	_, err = program(ctx, invocation{args: []string{"cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--cipher", "aes-xts-plain64",
		"--key-size", "512", "--hash", "sha256", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--sector-size", "4096",
		"--luks2-metadata-size", "16k", "--luks2-keyslots-size", strconv.Itoa(headerBytes>>10-32) + "k",
		"--uuid", p.made.Crypt, "--label", label(p.dev.Serial), "--key-file", "-", "/proc/self/fd/3"}, stdin: key, files: []*os.File{p.top}})
	if err != nil {
		return fmt.Errorf("encrypt %s: %w", p.dev, err)
	}
	dev, err := d.openCrypt(ctx, p.top, p.dev, key)
	if err != nil {
		return err
	}
	return p.onto(ctx, d, dev)
}

// onto goes on with a device that was just made. It is locked as the disks are: a
// program that outlives the agent keeps the lock.
func (p *permit) onto(ctx context.Context, d *Disk, dev device) error {
	f, err := d.open(dev, unix.O_RDONLY)
	if err != nil {
		return err
	}
	p.dev, p.top, p.opened = dev, f, append(p.opened, f)
	if err := lock(ctx, f); err != nil {
		return fmt.Errorf("lock %s: %w", dev, err)
	}
	return nil
}

// mdUUID writes a UUID as mdadm reads it.
func mdUUID(uuid string) string {
	u := strings.ReplaceAll(uuid, "-", "")
	return u[:8] + ":" + u[8:16] + ":" + u[16:24] + ":" + u[24:]
}

// mkfs formats the device.
func (p *permit) mkfs(ctx context.Context, fs node.FileSystem) error {
	// Nothing is discarded: on a new disk it takes long and gains nothing. The
	// program claims the disk exclusively by itself, and refuses if it cannot.
	const device = "/proc/self/fd/3"
	var args []string
	switch fs {
	case node.Ext4:
		args = []string{"mkfs.ext4", "-q", "-m", "0", "-U", p.made.UUID, "-L", label(p.dev.Serial),
			"-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", device}
	case node.XFS:
		args = []string{"mkfs.xfs", "-q", "-K", "-m", "uuid=" + p.made.UUID, "-L", label(p.dev.Serial), device}
	default:
		return fmt.Errorf("unknown file system %q", fs)
	}
	_, err := program(ctx, invocation{args: args, files: []*os.File{p.top}})
	return err
}

// wipe has zeros written to every place of a disk at which a format is recognised, so
// that what it held is not found beside what is made.
func (p *permit) wipe(ctx context.Context, d *Disk, c *claim) error {
	f, err := reopen(c.disk, unix.O_WRONLY)
	if err != nil {
		return err
	}
	done, err := d.read(ctx, f, c.dev, errand{Act: toWipe, Partitioned: len(c.dev.Partitions) > 0}, d.quiet, nil)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if done.Hung {
		return done.waiting()
	}
	if done.Unreadable != "" {
		return errors.New(done.Unreadable)
	}
	return nil
}

// newUUID returns a UUID that is random but for its last six bytes, which name the
// cluster (RFC 9562, version 8): another cluster's disk is told by it.
func newUUID(cluster string) string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80
	mark := clusterMark(cluster)
	copy(b[10:], mark[:])
	return formatUUID(b[:])
}
