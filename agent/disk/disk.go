// Package disk keeps the CBS data disks of a NodeConfig mounted: it finds each
// disk by its live serial, formats it if and only if it is found blank, and
// mounts it.
//
// It never formats a disk on which it finds anything, nor one of which any read
// failed. A disk of up to 1 GiB is read in full. Of a larger one both ends, every
// place at which a known format keeps a superblock, and a block in each of 1024
// strata are read: data that lies in few places and begins at neither end can
// be missed. What the cloud says of the disk's age, and full reads of large disks
// beside everything else, are to close that gap. The package does not partition, resize, check or unmount, and it leaves the
// disks of the CSI driver alone. A disk that it may not touch is described, with
// the evidence, and left for a human.
package disk

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// settlePoll is how often is looked whether udev has settled.
const settlePoll = 100 * time.Millisecond

// Disk is one disk of the NodeConfig. It satisfies reconcile.Module.
type Disk struct {
	want   node.DiskConfig
	listed []string // ids of the data disks that the metadata service knows
	sys    string   // where sysfs is mounted
	ledger ledger
	log    *slog.Logger

	// mu is held while the disk is looked at or changed: a look at a disk that is
	// just being formatted would find something foreign on it.
	mu sync.Mutex
}

// New returns the module for one disk of an instance that has the data disks
// listed, as far as the metadata service says. What has been done to disks is
// journalled in the directory state.
func New(want node.DiskConfig, listed []string, state string, log *slog.Logger) *Disk {
	return &Disk{want: want, listed: listed, sys: "/sys", ledger: ledger(state), log: log}
}

// Name returns "disk/<disk id>", or "disk/data" for the only data disk.
func (d *Disk) Name() string {
	if d.want.DiskID == "" {
		return "disk/data"
	}
	return "disk/" + d.want.DiskID
}

// Condition returns the condition that the disk serves.
func (d *Disk) Condition() node.ConditionType { return node.DisksReady }

// Needs returns what has to be so before the disk is looked at.
func (d *Disk) Needs() []node.ConditionType { return []node.ConditionType{node.ConfigSealed} }

// Plan looks at the disk and lists what has to be done to it.
func (d *Disk) Plan(ctx context.Context) (node.Plan, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var p node.Plan
	have, err := d.observe(ctx, true)
	if err != nil {
		return p, err
	}
	steps, err := decide(d.want, have)
	if node.ReasonOf(err, "") == "Settling" {
		p.Again = settlePoll // nothing tells when udev is done
	}
	for _, s := range steps {
		p.Add(func(ctx context.Context) error { return d.do(ctx, s.verb) }, "%s", s.text)
	}
	return p, err
}

// Apply carries p out.
func (d *Disk) Apply(ctx context.Context, p node.Plan) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return p.Apply(ctx)
}

// do carries one step out if it is still what is to be done first. The caller
// holds mu.
func (d *Disk) do(ctx context.Context, v verb) error {
	have, err := d.observe(ctx, v != format)
	if err != nil {
		return err
	}
	if v == format {
		have.Content.Blank = true // prove finds out
	}
	steps, err := decide(d.want, have)
	if err != nil {
		return err
	}
	if len(steps) == 0 || steps[0].verb != v {
		return nil // somebody was faster; the next plan tells
	}
	dev, err := bind(d.want, have)
	if err != nil {
		return err
	}
	switch v {
	case format:
		return d.format(ctx, dev, have.Ledger[dev.Serial])
	case adopt:
		return d.ledger.write(entry{
			DiskID: dev.Serial, MountPoint: d.want.MountPoint, State: stateFormatted,
			FileSystem: d.want.FileSystem, UUID: have.Content.UUID, SizeBytes: dev.SizeBytes,
		})
	default:
		return d.mount(dev)
	}
}
