// Package disk keeps the CBS data disks of a NodeConfig mounted: it finds each
// disk by its live serial, formats it if and only if it is proven blank, and
// mounts it.
//
// It never formats a disk on which it finds anything, nor one of which any read
// failed. Both ends, every place at which a known format keeps a superblock, and a
// block in each of 1024 strata are read and have to be zero. That is no proof, since
// a raw database may begin in the middle, so the whole disk has to be accounted for
// besides: either the cloud says that it is as new as the instance, which was never
// started before, or every block of it is read. docs/disk.md says which evidence is
// accepted, and why. Only an operator can have a disk formatted that is not blank.
//
// Between the disks and a file system there may be an array of several of them and an
// encrypted mapping (stack.go). They are made under the same proofs, and are raised only
// when every disk is there and holds what the ledger, or a mark of ours, says.
//
// The package does not partition, resize, check or unmount, and it leaves the
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

const (
	settlePoll    = 100 * time.Millisecond // how often is looked whether udev has settled
	progressEvery = time.Second            // as often is told how far the reading of a disk is
)

// Disk is one disk of the NodeConfig. It satisfies reconcile.Module.
type Disk struct {
	want      node.DiskConfig
	sealed    node.Sealed
	firstBoot bool
	cloud     Cloud
	sys       string // where sysfs is mounted
	ledger    ledger
	log       *slog.Logger
	account   account
	patience  time.Duration // readPatience, but in tests

	// mu is held while the disk is looked at or changed: a look at a disk that is
	// just being formatted would find something foreign on it. It guards the rest.
	mu      sync.Mutex
	proof   *proof // nil: no disk is being read
	suspect suspect
	// parts are the disks of a stripe, each with its own proof. A part is nothing but
	// that, and used under its Disk's mu; held is its claim once it is proven.
	parts map[string]*Disk
	held  *held
	wrong wrongKey // the last one
}

// Options say which disk is kept, and by what.
type Options struct {
	Want      node.DiskConfig
	Sealed    node.Sealed
	FirstBoot bool // Sealed was sealed in this boot
	Cloud     Cloud
	Ledger    string // directory in which is journalled what has been done to disks
	Log       *slog.Logger
}

// New returns the module for one disk.
func New(o Options) *Disk {
	d := &Disk{want: o.Want, sealed: o.Sealed, firstBoot: o.FirstBoot, cloud: o.Cloud, sys: "/sys", ledger: ledger(o.Ledger), log: o.Log, patience: readPatience}
	for _, id := range o.Want.DiskIDs {
		if d.parts == nil {
			d.parts = map[string]*Disk{}
		}
		part := o
		part.Want = node.DiskConfig{DiskID: id, MountPoint: o.Want.MountPoint}
		d.parts[id] = New(part)
	}
	return d
}

// Close gives up what is read, unless something that hangs holds the disk.
func (d *Disk) Close() {
	if d.mu.TryLock() {
		defer d.mu.Unlock()
		d.drop()
	}
}

// Name returns "disk/<disk id>", for a stripe its first disk's, or "disk/data" for
// the only data disk.
func (d *Disk) Name() string {
	if ids := d.want.IDs(); len(ids) > 0 {
		return "disk/" + ids[0]
	}
	return "disk/data"
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
		d.stands(have, nil, err)
		return p, err
	}
	steps, err := decide(d.want, have)
	switch node.ReasonOf(err, "") {
	case "Settling":
		p.Again = settlePoll // nothing tells when udev is done
	case "Proving":
		p.Again = progressEvery
	}
	d.stands(have, steps, err)
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
	have, err := d.observe(ctx, v != format || d.want.Layered())
	if err != nil {
		return err
	}
	if v == format && !d.want.Layered() {
		have.Content.Blank = true // prove finds out
	}
	steps, err := decide(d.want, have)
	if err != nil {
		return err
	}
	if len(steps) == 0 || steps[0].verb != v {
		return nil // somebody was faster; the next plan tells
	}
	at, err := raise(d.want, have)
	if err != nil {
		return err
	}
	switch dev := at.dev(); v {
	case format:
		return d.format(ctx, at, have)
	case adopt:
		if c := have.Decision; c != nil && c.is(actAdopt, dev) {
			if err := d.ledger.use(c); err != nil {
				return err
			}
		}
		e := at.entry(d.want, have)
		e.State, e.FileSystem, e.UUID = stateFormatted, node.FileSystem(have.Content.Signatures[0]), have.Content.UUID
		if past := have.Ledger[e.DiskID]; past.UUID == e.UUID {
			e.Proof = past.Proof // it was made here, and cut off before that was journalled
		}
		return d.ledger.write(e)
	case stop:
		if at.stale != nil && at.stale.Kind == array {
			return d.setArray(at.stale.Name, "array_state", "clear")
		}
		return d.closeCrypt(ctx, dev)
	case assemble:
		defer d.account.begin("assemble")()
		return d.assemble(ctx, at, have)
	case unlock:
		defer d.account.begin("open")()
		return d.unlock(ctx, at)
	default:
		defer d.account.begin("mount")()
		return d.mount(dev, have.Content.Signatures[0])
	}
}
