package disk

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
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

// permit says that a disk has been proven blank and may be formatted, once. Only
// prove makes one, and only its method mkfs runs a program that writes.
type permit struct {
	disk  *os.File // open, and so its name and number are no other disk's; locked
	dev   device
	uuid  string // in the ledger already
	proof string // what it rests on
}

// format makes the file system on dev if dev is blank.
func (d *Disk) format(ctx context.Context, dev device, past entry) error {
	p, err := d.prove(ctx, dev, past)
	if err != nil {
		return err
	}
	defer p.disk.Close()
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
// blank.
func (d *Disk) prove(ctx context.Context, dev device, past entry) (_ *permit, err error) {
	c, proof, err := d.blank(ctx, dev, past)
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
	d.log.Info("proven blank", "disk", dev.String(), "proof", proof)
	uuid := past.UUID
	if uuid == "" {
		uuid = newUUID()
	}
	p := &permit{disk: c.disk, dev: dev, uuid: uuid, proof: proof}
	if err := d.ledger.write(d.entry(p, stateFormatting)); err != nil {
		return nil, err
	}
	return p, c.exclusive.Close()
}

func (d *Disk) entry(p *permit, state string) entry {
	return entry{
		DiskID: p.dev.Serial, MountPoint: d.want.MountPoint, FileSystem: d.want.FileSystem,
		UUID: p.uuid, State: state, SizeBytes: p.dev.SizeBytes, Proof: p.proof,
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

// newUUID returns a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	s := hex.EncodeToString(b[:])
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
