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
// Once it is mounted the disk is looked at again and again; one that goes, or turns
// out to be another, is fenced: see fence.go. A mounted file system is grown when its
// device is, and trimmed once a week.
//
// The package does not partition, check or unmount, and it leaves the disks of the CSI
// driver alone. A disk that it may not touch is described, with the evidence, and
// left for a human.
package disk

import (
	"context"
	"log/slog"
	"slices"
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
	boot      string // the kernel's name for this boot
	ledger    ledger
	log       *slog.Logger
	account   account
	patience  time.Duration // readPatience, but in tests
	quiet     time.Duration // probeDeadline, but in tests
	systemd   Systemd       // nil: it knows nothing of the mounts
	run       string        // directory of notes that end with the boot
	pods      string        // cgroup of all pods
	program   []string      // that helpers are
	tell      func()
	poked     chan struct{} // capacity 1: the disk is to be looked at
	tended    tended

	probes errands // looks at the mount, and its end
	reads  errands // of what a disk holds that nobody has mounted, and the mount

	// mu is held while the disk is looked at or changed: a look at a disk that is
	// just being formatted would find something foreign on it. It guards the rest.
	mu      sync.Mutex
	proof   *proof // nil: no disk is being read
	suspect suspect
	growth  growth
	serials map[string]string // that devices have told, by device number and diskseq
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
	Run       string // directory of notes that end with the boot
	// Systemd is told of the mounts, and stops what a disk that is gone would let write
	// beneath it. Nil: nobody does.
	Systemd Systemd
	// Helper is the program tke-disk, where it is not installed; empty: it is.
	Helper string
	// Tell is called, and must not block, when the disk's health has changed or it is
	// fenced, or is no longer.
	Tell func()
	Log  *slog.Logger
}

// New returns the module for one disk.
func New(o Options) *Disk {
	if o.Tell == nil {
		o.Tell = func() {}
	}
	d := &Disk{
		want: o.Want, sealed: o.Sealed, firstBoot: o.FirstBoot, cloud: o.Cloud, sys: "/sys", boot: bootID(), ledger: ledger(o.Ledger), log: o.Log,
		patience: readPatience, quiet: probeDeadline, systemd: o.Systemd, run: o.Run, pods: podsCgroup, program: helperProgram, tell: o.Tell, poked: make(chan struct{}, 1),
		serials: map[string]string{}, parts: map[string]*Disk{}, tended: tended{moves: map[string]*progressing{}},
	}
	if o.Helper != "" {
		d.program = []string{o.Helper}
	}
	d.probes = errands{disk: d, scope: scopeName(o.Want, false)}
	d.reads = errands{disk: d, scope: scopeName(o.Want, true)}
	for _, id := range o.Want.DiskIDs {
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
		d.abandon()
	}
}

// Name returns "disk/<disk id>", of a stripe its first disk's, "disk<mount point>" for
// one that a selector finds, or "disk/data" for the only data disk.
func (d *Disk) Name() string {
	switch id := d.firstID(); {
	case id != "":
		return "disk/" + id
	case d.want.Selector != (node.DiskSelector{}):
		return "disk" + d.want.MountPoint
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
	case Proving, Hung:
		p.Again = progressEvery
	}
	if have.Growing != "" {
		p.Again = growPoll
	}
	// What is left to do for a mounted disk takes nothing from who uses it.
	p.Serving = len(steps) > 0 && slices.Contains([]verb{publish, reload, grow}, steps[0].verb)
	d.stands(have, steps, err)
	for _, s := range steps {
		p.Add(func(ctx context.Context) error { return d.do(ctx, s) }, "%s", s.text)
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
func (d *Disk) do(ctx context.Context, s step) error {
	v := s.verb
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
	if len(steps) == 0 || steps[0].verb != v || steps[0].unit != s.unit {
		return nil // somebody was faster; the next plan tells
	}
	switch v {
	case record:
		return d.keep(ctx, have)
	case join:
		return d.join(ctx, have.Attach.Disk.ID)
	case publish, reload, halt, quell, detach, bury:
		defer d.poke()
		return d.after(ctx, s, have)
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
	case lower:
		if at.stale != nil {
			return at.stale.lower(ctx)
		}
		return at.up[len(at.up)-1].lower(ctx)
	case assemble:
		defer d.account.begin("assemble")()
		return d.assemble(ctx, at, have)
	case unlock:
		defer d.account.begin("open")()
		return d.unlock(ctx, at)
	case grow:
		m, _ := have.at(d.want.MountPoint)
		return d.grow(ctx, dev, m, have.FSBytes)
	default:
		defer d.account.begin("mount")()
		return d.mount(ctx, dev, have.Content.Signatures[0])
	}
}
