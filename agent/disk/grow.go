package disk

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	// blockGroup is how much larger than its file system a device has to be for it to
	// be grown: the size of a block group of ext4 with blocks of 4 KiB. The kernel
	// leaves a last group out that would hold little but its own metadata.
	// Source: linux fs/ext4/resize.c, ext4_resize_fs
	blockGroup = 128 << 20
	// growDeadline is far above the seconds that it takes: more means that the disk hangs.
	growDeadline = 10 * time.Minute
	growPatience = 20 * time.Second // that an apply waits; then a plan sees to it
	growPoll     = time.Second
	stopPatience = 5 * time.Second // for a program that was told to end
)

// growth is what is known of growing a disk. The lock of the Disk guards it.
type growth struct {
	run *growing // nil: nothing grows
	// full is the device that the file system was last found to fill.
	full device
	size int64 // of the file system on full
	// refused is the size of the device at which it was last refused to grow.
	refused int64
}

// growing is a growth under way.
type growing struct {
	dev  device
	m    mount
	from int64 // bytes of the file system before
	stop context.CancelFunc
	done chan struct{} // closed when err is there
	err  error
}

func (g *growing) String() string {
	return fmt.Sprintf("%s on %s grows from %s to %s", g.m.FSType, g.dev.Serial, Size(g.from), Size(g.dev.room()))
}

// room returns how large a device can be: the mapping of an encrypted disk follows the
// disk once it is told to. An array does not follow its disks.
func (d device) room() int64 {
	if len(d.under) != 1 {
		return d.SizeBytes
	}
	return max(d.SizeBytes, (d.under[0].SizeBytes-headerBytes)/blockSize*blockSize)
}

// spare warns of disks that are larger than what their stripe uses of them. mdadm could
// grow it by rewriting every superblock, and may not be cut off meanwhile.
func spare(dev device, mountPoint string) *Warning {
	for len(dev.under) == 1 {
		dev = dev.under[0]
	}
	var larger []device
	for _, d := range dev.under {
		if d.SizeBytes-dataAt-dev.SizeBytes/int64(len(dev.under)) >= blockGroup {
			larger = append(larger, d)
		}
	}
	if len(larger) == 0 {
		return nil
	}
	return &Warning{Reason: ReasonGrowRefused, Message: fmt.Sprintf("the stripe on %s uses %s of each of its disks, and leaves the rest of %s unused: a stripe does not grow; to use it, make a stripe of new disks and move the data",
		mountPoint, Size(dev.SizeBytes/int64(len(dev.under))), names(larger))}
}

// grown returns what has to be done for the mounted file system to fill its device.
func grown(dev device, m mount, have observed) []step {
	to := dev.room()
	if have.FSBytes == 0 || have.Growing != "" || have.NotGrown == to {
		return nil
	}
	if to-have.FSBytes < blockGroup {
		// A growth that was killed may have ended with the copies of xfs' superblock as
		// they were, and xfs_repair believes the majority of them.
		if past, ok := have.Ledger[dev.Serial]; !ok || past.SizeBytes >= have.FSBytes || m.FSType != string(node.XFS) {
			return nil
		}
		return []step{{verb: grow, text: fmt.Sprintf("write the copies of the superblock of %s on %s anew, which has been grown to %s", m.FSType, dev.Serial, Size(have.FSBytes))}}
	}
	return []step{{verb: grow, text: fmt.Sprintf("grow %s on %s from %s to %s", m.FSType, dev.Serial, Size(have.FSBytes), Size(to))}}
}

// size takes the size of the mounted file system into have. That it cannot be told
// is no reason not to serve. The caller holds mu.
func (d *Disk) size(at place, m mount, have *observed) {
	dev := at.dev()
	if at.mounted(m) != nil || m.FSType != string(node.Ext4) && m.FSType != string(node.XFS) {
		return
	}
	if err := d.settle(); err != nil {
		d.log.Warn("not grown, it is tried again", "disk", dev.String(), "err", err)
	}
	if d.growth.run != nil {
		have.Growing = d.growth.run.String()
		return
	}
	have.NotGrown = d.growth.refused
	if d.growth.full.is(dev) && d.growth.full.room() == dev.room() {
		have.FSBytes = d.growth.size
		d.account.warn(spare(dev, m.Target), d.log)
		return
	}
	size, err := d.fileSystemSize(dev, m)
	if err != nil {
		d.account.warn(&Warning{Reason: ReasonSizeUnknown, Message: fmt.Sprintf("whether %s fills its disk cannot be told: %v", m.Target, err)}, d.log)
		return
	}
	if have.FSBytes = size; dev.room()-size < blockGroup {
		d.growth = growth{full: dev, size: size}
		d.account.warn(spare(dev, m.Target), d.log)
	}
}

// grow makes the file system on m fill its device. It waits a while for it; what
// takes longer goes on, and later plans see to it. The caller holds mu.
func (d *Disk) grow(ctx context.Context, dev device, m mount, from int64) error {
	pin, err := d.open(dev, openRead)
	if err != nil {
		return err
	}
	// Not of ctx: the kernel does not stop in the middle, and a short deadline would
	// only hide how it ends.
	gctx, stop := context.WithTimeout(context.WithoutCancel(ctx), growDeadline)
	g := &growing{dev: dev, m: m, from: from, stop: stop, done: make(chan struct{})}
	d.growth.run = g
	ended := d.account.begin("grow")
	go func() {
		defer close(g.done)
		defer ended()
		defer stop()
		defer pin.Close()
		g.err = d.growNow(gctx, g, pin)
	}()
	wait := time.NewTimer(growPatience)
	defer wait.Stop()
	select {
	case <-g.done:
		return d.settle()
	case <-wait.C:
	case <-ctx.Done():
	}
	return nil
}

// settle takes in how a growth has ended, if it has. An error that only a human can
// end becomes a warning, for the disk serves as it is. The caller holds mu.
func (d *Disk) settle() error {
	g := d.growth.run
	if g == nil {
		return nil
	}
	select {
	case <-g.done:
	default:
		return nil
	}
	d.growth.run = nil
	switch {
	case node.ClassOf(g.err) == node.ClassTerminal:
		d.growth.refused = g.dev.room()
		d.account.warn(&Warning{Reason: ReasonGrowRefused, Message: g.err.Error()}, d.log)
		return nil
	case g.err != nil:
		return g.err
	}
	d.account.warn(nil, d.log)
	return d.ledger.resize(g.dev.Serial, g.dev.room())
}

// abandon ends a growth with the agent: what is left of it is planned again. The
// caller holds mu.
func (d *Disk) abandon() {
	g := d.growth.run
	if g == nil {
		return
	}
	g.stop()
	wait := time.NewTimer(stopPatience)
	defer wait.Stop()
	select {
	case <-g.done:
	case <-wait.C: // the kernel does not let go of the program
	}
}

// refusal says what a program's failure to grow a file system means.
func refusal(g *growing, tool string, out string, err error) error {
	text := strings.Join(strings.Fields(out), " ")
	err = fmt.Errorf("%s: %w: %s", tool, err, text[:min(len(text), 500)])
	exit, exited := errors.AsType[*exec.ExitError](err)
	lower := strings.ToLower(text)
	repair := "e2fsck -f"
	if g.m.FSType == string(node.XFS) {
		repair = "xfs_repair"
	}
	repair += " /dev/" + g.dev.Name
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return g.terminal("install e2fsprogs and xfsprogs, and restart tkenode-agent", err)
	case !exited, !exit.Exited(),
		strings.Contains(lower, "busy"), strings.Contains(lower, "in progress"), strings.Contains(lower, "temporarily unavailable"):
		return fmt.Errorf("grow %s: %w", g.dev, err) // killed, or another one is at it
	case strings.Contains(lower, "not support"), strings.Contains(lower, "too large"), strings.Contains(lower, "reserved gdt"):
		return g.terminal("it cannot grow while it is mounted: drain the node, unmount "+g.m.Target+", run "+repair+" and resize2fs /dev/"+g.dev.Name+", and reboot", err)
	}
	return g.terminal("look at `dmesg`, drain the node, unmount "+g.m.Target+", run "+repair+", and reboot", err)
}

// terminal returns an error that only a human can end.
func (g *growing) terminal(fix string, err error) error {
	return node.Terminal(ReasonGrowRefused, fix, fmt.Errorf("%s on %s, mounted on %s with %s as before, was not grown: %w", g.m.FSType, g.dev, g.m.Target, Size(g.from), err))
}
