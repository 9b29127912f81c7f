package disk

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// mkfsDeadline is far above the seconds that it takes without discard: more means
// that the disk hangs.
const mkfsDeadline = 5 * time.Minute

// permit says that a disk has been proven blank, or that an operator has decided
// that what it holds is of no use, and that it may be formatted, once. Only
// prove makes one, and only its method mkfs runs a program that writes.
type permit struct {
	disk  *os.File // open, and so its name and number are no other disk's; locked
	dev   device
	uuid  string // in the ledger already
	proof string // what it rests on
	erase bool   // it is not blank, and an operator has decided that it may be
}

// format makes the file system on dev if dev is blank, or an operator has decided.
func (d *Disk) format(ctx context.Context, dev device, have observed) error {
	p, err := d.prove(ctx, dev, have)
	if err != nil {
		return err
	}
	defer p.disk.Close()
	if p.erase {
		if err := p.wipe(); err != nil {
			return fmt.Errorf("erase what %s holds: %w", dev, err)
		}
	}
	done := d.account.begin("format")
	err = p.mkfs(ctx, d.want.FileSystem)
	done()
	if err != nil {
		return fmt.Errorf("make %s on %s: %w", d.want.FileSystem, dev, err)
	}
	if err := d.same(dev); err != nil {
		return err
	}
	exclusive, err := reopen(p.disk, unix.O_RDONLY)
	if err != nil {
		return fmt.Errorf("read back %s: %w", dev, err)
	}
	c := glance(reader{ctx, exclusive}, dev.SizeBytes)
	if err := exclusive.Close(); err != nil {
		return fmt.Errorf("read back %s: %w", dev, err)
	}
	if c.UUID != p.uuid || c.Label != label(dev.Serial) || !slices.Equal(c.Signatures, []string{string(d.want.FileSystem)}) {
		return fmt.Errorf("read back %s: it holds %s, not the %s with uuid %s just made", dev, c, d.want.FileSystem, p.uuid)
	}
	return d.ledger.write(d.entry(p, stateFormatted))
}

// prove returns a permit if dev is the right disk, used by nobody, and proven
// blank. Where an operator has decided, it need only be readable at its ends.
func (d *Disk) prove(ctx context.Context, dev device, have observed) (_ *permit, err error) {
	past := have.Ledger[dev.Serial]
	order := have.Decision
	if order != nil && !order.is(actFormat, dev) {
		order = nil
	}
	var c *claim
	var proof string
	if order != nil {
		c, proof, err = d.ordered(ctx, dev, order)
	} else {
		c, proof, err = d.blank(ctx, dev, past)
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	if err := d.unchanged(c); err != nil {
		return nil, err
	}
	d.log.Info("may be formatted", "disk", dev.String(), "proof", proof)
	uuid := past.UUID
	if uuid == "" || order != nil {
		uuid = newUUID(have.Cluster)
	}
	p := &permit{disk: c.disk, dev: dev, uuid: uuid, proof: proof, erase: order != nil}
	if order != nil {
		if err := d.ledger.use(order); err != nil {
			return nil, err
		}
	}
	if err := d.ledger.write(d.entry(p, stateFormatting)); err != nil {
		return nil, err
	}
	return p, c.exclusive.Close()
}

func (d *Disk) entry(p *permit, state string) entry {
	e := entry{
		DiskID: p.dev.Serial, MountPoint: d.want.MountPoint, FileSystem: d.want.FileSystem,
		UUID: p.uuid, State: state, SizeBytes: p.dev.SizeBytes, Proof: p.proof,
	}
	if state == stateFormatting {
		e.Boot = d.boot
	}
	return e
}

// mkfs formats the disk. It is never cut off when ctx ends, since half a file
// system can be neither used nor told from data; it ends by its own deadline.
func (p *permit) mkfs(ctx context.Context, fs node.FileSystem) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), mkfsDeadline)
	defer cancel()
	// Nothing is discarded: on a new disk it takes long and gains nothing. The
	// program claims the disk exclusively by itself, and refuses if it cannot.
	const device = "/proc/self/fd/3"
	var args []string
	switch fs {
	case node.Ext4:
		args = []string{"mkfs.ext4", "-q", "-m", "0", "-U", p.uuid, "-L", label(p.dev.Serial),
			"-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", device}
	case node.XFS:
		args = []string{"mkfs.xfs", "-q", "-K", "-m", "uuid=" + p.uuid, "-L", label(p.dev.Serial), device}
	default:
		return fmt.Errorf("unknown file system %q", fs)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.ExtraFiles = []*os.File{p.disk} // descriptor 3
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if err == nil {
		err = p.disk.Sync()
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", args[0], err, bytes.TrimSpace(out[:min(len(out), 1000)]))
	}
	return nil
}

// wipe writes zeros to every place at which a format is recognised, so that what
// the disk held is not found beside the new file system.
func (p *permit) wipe() error {
	f, err := reopen(p.disk, unix.O_WRONLY)
	if err != nil {
		return err
	}
	zero := aligned(piece)
	for _, w := range append([]span{{0, min(front, p.dev.SizeBytes)}}, windows(p.dev.SizeBytes)...) {
		for at := w.from; at < w.to && err == nil; at += piece {
			_, err = f.WriteAt(zero[:min(piece, w.to-at)], at)
		}
	}
	err = errors.Join(err, f.Sync())
	if err == nil && len(p.dev.Partitions) > 0 {
		err = unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0)
	}
	return errors.Join(err, f.Close())
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
