package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"
)

const (
	tendEvery = 30 * time.Second // a disk is verified and probed, give or take a fifth
	tendGap   = time.Second      // between two looks, whatever wakes
	probeGap  = 5 * time.Second  // between two probes, which are processes
)

// tended is what tending a disk has found.
type tended struct {
	moves     map[string]*progressing // by number of the disk; only tend touches it
	probed    time.Time               // as moves
	inherited time.Time               // as moves; since when an earlier agent's helper is out

	mu       sync.Mutex // guards the rest
	verified time.Time  // when the disk was mounted, and the mount found to be the disk's
	probe    *probeResult
	told     []string // the serials that the last two probes were told
	stale    bool     // systemd has not read the mount unit's file
	stopped  bool     // the file system takes no writes, and mountinfo does not say so
}

// readOnly reports whether the file system takes no writes although mountinfo does
// not say so.
func (t *tended) readOnly() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stopped
}

func (t *tended) serials() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.told
}

func (t *tended) unitStale() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.stale
}

// unitRead says that systemd has just read the file of the mount unit, or that it is
// to be asked whether it has.
func (t *tended) unitRead(yes bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stale = false
	if !yes {
		t.verified = time.Time{} // ask soon
	}
}

// mounted says that the disk has just been mounted and verified, which is as good as
// a probe.
func (t *tended) mounted(serial string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.verified, t.probe, t.told, t.stopped = time.Now(), &probeResult{Serial: serial}, nil, false
}

// found takes in what a probe has found.
func (t *tended) found(p *probeResult) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.probe = p
	if p.Serial != "" {
		t.told = append(t.told[max(0, len(t.told)-1):], p.Serial)
	}
}

// due reports whether a probe is due: a mount that was verified a moment ago is not
// verified again, least of all while the node boots.
func (t *tended) due(now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return now.Sub(t.probed) >= probeGap && now.Sub(t.verified) >= tendEvery*4/5
}

// poke has the disk looked at soon.
func (d *Disk) poke() {
	select {
	case d.poked <- struct{}{}:
	default:
	}
}

// tend looks at the disk again and again, as long as it is watched, and wakes who
// plans when there is something to plan for.
func (d *Disk) tend(ctx context.Context, wake func()) {
	for ctx.Err() == nil {
		if d.examine(ctx) {
			wake()
		}
		gap := time.NewTimer(tendGap)
		select {
		case <-gap.C:
		case <-ctx.Done():
		}
		every := time.NewTimer(tendEvery*4/5 + rand.N(tendEvery*2/5))
		select {
		case <-every.C:
		case <-d.poked:
		case <-ctx.Done():
		}
		gap.Stop()
		every.Stop()
	}
}

// examine looks at the disk once and reports whether that is news for who plans.
func (d *Disk) examine(ctx context.Context) (news bool) {
	v, ok := d.vitals(ctx)
	if !ok {
		d.healthy(nil)
		return false
	}
	news = d.healthy(diagnose(v)) // at once; a probe takes a moment, or hangs
	now := time.Now()
	if !v.Mounted || v.Gone != "" || !d.tended.due(now) {
		return news
	}
	d.tended.probed = now
	stale := d.tended.unitStale()
	d.askSystemd(ctx)
	d.sendProbe(ctx, v)
	news = news || stale != d.tended.unitStale()
	if v, ok = d.vitals(ctx); ok {
		news = d.healthy(diagnose(v)) || news
	}
	return news
}

// healthy enters what is known of the disk's health, and tells who wants to know. It
// reports whether something is wrong that was not, or no longer.
func (d *Disk) healthy(h Health) (news bool) {
	before := d.account.healthy(h)
	if !h.differs(before) {
		return false
	}
	for _, c := range h {
		switch was := before.of(c.Type); {
		case c.Status == "True" && (was.Status != c.Status || was.Reason != c.Reason):
			d.log.Error("the disk is ill", "condition", string(c.Type), "reason", c.Reason, "message", c.Message)
		case c.Status == "Unknown" && c.Message != "" && was.Reason != c.Reason:
			d.log.Warn("the disk's health is not known", "condition", string(c.Type), "reason", c.Reason, "message", c.Message)
		case was.Status == "True" && c.Status != was.Status:
			d.log.Info("the disk is well again", "condition", string(c.Type), "mountPoint", d.want.MountPoint)
		}
	}
	d.tell()
	return Health(h.bad()).differs(before.bad())
}

// askSystemd asks whether the mount unit's file has been read.
func (d *Disk) askSystemd(ctx context.Context) {
	if d.systemd == nil {
		return
	}
	current, err := d.systemd.Current(ctx, unitName(d.want.MountPoint), unitPath(d.want.MountPoint))
	if err != nil {
		d.log.Debug("systemd is not asked for the mount unit", "err", err)
		return
	}
	d.tended.mu.Lock()
	defer d.tended.mu.Unlock()
	d.tended.stale = !current
}

// sendProbe has a helper ask the disk for its serial, look at the file system and
// read a block.
func (d *Disk) sendProbe(ctx context.Context, v vitals) {
	dev, err := d.devOf(v.Device)
	if err != nil {
		return // it has just gone; the next look tells
	}
	found, err := d.probes.send(ctx, errand{Act: toProbe, Target: v.MountPoint, Dev: dev, Name: v.Device, Disks: v.Disks, Sys: d.sys, Doubtful: v.Ext4 != nil && v.Ext4.Count > 0}, probeDeadline, nil)
	if ctx.Err() != nil {
		return
	}
	p := &probeResult{}
	var hangs errHangs
	switch {
	case errors.As(err, &hangs):
		p.Hangs = hangs.step
		p.Late = probeDeadline
	case errors.Is(err, errOut):
		if p.Hangs, p.Late = d.hanging(); p.Late < probeDeadline {
			return // it may only be slow; the next look tells
		}
	case err != nil:
		p.Failed = err.Error()
	default:
		d.tended.inherited = time.Time{}
	}
	for _, f := range found {
		if f.Error != "" {
			p.Errors = append(p.Errors, f.Step+": "+f.Error)
		}
		if f.Step == stepSerial {
			p.Serial = f.Value
		}
	}
	d.tended.found(p)
}

// hanging says what hangs in the helper that is out, and for how long.
func (d *Disk) hanging() (step string, late time.Duration) {
	d.probes.mu.Lock()
	defer d.probes.mu.Unlock()
	if h := d.probes.out; h != nil {
		return h.step, time.Since(h.began)
	}
	// An earlier agent has sent it out, at least helperLate ago.
	if d.tended.inherited.IsZero() {
		d.tended.inherited = time.Now().Add(-helperLate)
	}
	return "look of an earlier agent", time.Since(d.tended.inherited)
}

func (d *Disk) devOf(name string) (string, error) {
	return attribute(filepath.Join(d.sys, "block", name), "dev")
}

func (d *Disk) nameOf(dev string) (string, error) {
	link, err := os.Readlink(filepath.Join(d.sys, "dev", "block", dev))
	return filepath.Base(link), err
}

// stalled reports for how long requests of a disk have been in flight of which none ends.
func (d *Disk) stalled(dev, name string) stall {
	n, ended, err := requests(filepath.Join(d.sys, "block", name))
	if err != nil {
		return stall{}
	}
	if d.tended.moves[dev] == nil {
		d.tended.moves[dev] = &progressing{}
	}
	return d.tended.moves[dev].look(n, ended, time.Now())
}

// vitals reads what sysfs and mountinfo tell, none of which asks the disk, and adds
// what the last probe has found. It is not ok if the disk is neither mounted nor gone.
func (d *Disk) vitals(ctx context.Context) (v vitals, ok bool) {
	all, err := mounts()
	if err != nil {
		return v, false
	}
	was, err := d.note()
	if err != nil || was == nil {
		return v, false
	}
	v = vitals{Disk: was.String(), MountPoint: d.want.MountPoint}
	if v.Gone = was.Why; v.Gone == "" {
		v.Gone = d.lost(ctx, *was)
	}
	if v.Gone != "" {
		gone := was.Gone
		if gone.IsZero() {
			gone = time.Now()
		}
		v.GoneFor = gone.UTC().Format("2006-01-02 15:04:05Z")
		return v, true
	}
	m, mounted := observed{Mounts: all}.at(d.want.MountPoint)
	if v.Mounted = mounted && m.Dev == was.Dev; !v.Mounted {
		return v, false
	}
	if v.Device, err = d.nameOf(m.Dev); err != nil {
		return v, false
	}
	v.FSType, v.ReadOnly = m.FSType, m.ReadOnly
	for _, disk := range was.disks() {
		name, err := d.nameOf(disk.Dev)
		if err != nil {
			return v, false
		}
		v.Disks = append(v.Disks, name)
		// What is made of disks has no requests of its own that could hang.
		if s := d.stalled(disk.Dev, name); s.For > v.Stalled.For || v.Stalled.Requests == 0 {
			v.Stalled = s
		}
	}
	if m.FSType == "ext4" {
		v.Ext4 = readExt4Errors(filepath.Join(d.sys, "fs", "ext4", v.Device))
	}
	d.tended.mu.Lock()
	defer d.tended.mu.Unlock()
	v.Probe = d.tended.probe
	d.tended.stopped = v.stopped()
	return v, true
}

// readExt4Errors reads what ext4 tells of its errors, or nil where it tells nothing.
// Source: linux fs/ext4/sysfs.c
func readExt4Errors(dir string) *ext4Errors {
	number := func(name string) int64 {
		text, err := attribute(dir, name)
		if err != nil {
			return -1
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return -1
		}
		return n
	}
	text := func(name string) string {
		s, err := attribute(dir, name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Sprintf("(%v)", err)
		}
		return s
	}
	e := &ext4Errors{Count: int(number("errors_count"))}
	if e.Count < 0 {
		return nil
	}
	if e.Count == 0 {
		return e
	}
	read := func(which string) ext4Error {
		return ext4Error{
			At: time.Unix(max(number(which+"_error_time"), 0), 0), Func: text(which + "_error_func"), Line: text(which + "_error_line"),
			Inode: text(which + "_error_ino"), Block: text(which + "_error_block"),
		}
	}
	e.First, e.Last = read("first"), read("last")
	return e
}
