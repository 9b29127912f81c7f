package disk

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	lockPatience = 5 * time.Second // udev reads a new disk for some tens of milliseconds
	mkfsDeadline = 5 * time.Minute // seconds without discard; more means that the disk hangs
)

// permit says that a disk has been proven blank and may be formatted, once. Only
// prove makes one, and only its method mkfs runs a program that writes.
type permit struct {
	disk *os.File // open, and so its name and number are no other disk's; locked
	dev  device
	uuid string // in the ledger already
}

// format makes the file system on dev if dev is blank.
func (d *Disk) format(ctx context.Context, dev device, past entry) error {
	p, err := d.prove(ctx, dev, past)
	if err != nil {
		return err
	}
	defer p.disk.Close()
	if err := p.mkfs(ctx, d.want.FileSystem); err != nil {
		return fmt.Errorf("make %s on %s: %w", d.want.FileSystem, dev, err)
	}
	if err := d.same(dev); err != nil {
		return err
	}
	exclusive, err := reopen(p.disk)
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
	return d.ledger.write(d.entry(dev, stateFormatted, p.uuid))
}

// prove returns a permit if dev is the right disk, used by nobody, and reads as
// zero wherever inspect reads it. The disk is claimed exclusively while it is read.
func (d *Disk) prove(ctx context.Context, dev device, past entry) (_ *permit, err error) {
	// Not for writing: udev announces a change of a disk that was open for that, which
	// would wake us to prove a disk that is not blank again, without end.
	disk, err := d.open(dev, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			disk.Close()
		}
	}()
	if err := lock(ctx, disk); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dev, err)
	}
	exclusive, err := reopen(disk)
	if err != nil {
		return nil, fmt.Errorf("claim %s: %w", dev, err)
	}
	defer exclusive.Close()
	bytes, err := disk.Seek(0, io.SeekEnd)
	if err != nil || bytes != dev.SizeBytes {
		return nil, fmt.Errorf("%s has %d bytes: %w", dev, bytes, errors.Join(err, errChanged))
	}
	c := inspect(reader{ctx, exclusive}, dev.SizeBytes)
	if err := d.same(dev); err != nil {
		return nil, err
	}
	switch {
	case c.Unreadable != "":
		return nil, fmt.Errorf("prove %s blank: %s", dev, c.Unreadable)
	case !c.Blank: // where the plan has not looked
		return nil, foreign(dev, c)
	}
	d.log.Info("proven blank", "disk", dev.String(), "proof", c.proof())
	uuid := past.UUID
	if uuid == "" {
		uuid = newUUID()
	}
	if err := d.ledger.write(d.entry(dev, stateFormatting, uuid)); err != nil {
		return nil, err
	}
	return &permit{disk: disk, dev: dev, uuid: uuid}, nil
}

func (d *Disk) entry(dev device, state, uuid string) entry {
	return entry{
		DiskID: dev.Serial, MountPoint: d.want.MountPoint, FileSystem: d.want.FileSystem,
		UUID: uuid, State: state, SizeBytes: dev.SizeBytes,
	}
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

// reopen opens the same disk once more, for direct reads, and claims it: that
// fails while anybody has it mounted, stacked or claimed.
func reopen(disk *os.File) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", disk.Fd()), unix.O_RDONLY|unix.O_EXCL|unix.O_DIRECT, 0)
}

// lock takes the lock by which programs keep udev and each other off a disk.
func lock(ctx context.Context, disk *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, lockPatience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(disk.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("another program holds it: %w", err)
		}
	}
}

// newUUID returns a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	s := hex.EncodeToString(b[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
