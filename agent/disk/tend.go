package disk

import (
	"context"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/tkenode/tkenode/agent/tencent"
)

const (
	// sizePeriod is how often the cloud is asked how large the disk is, at most: it is
	// resized once in its life.
	sizePeriod = 6 * time.Hour
	// sizePatience is how much later than the cloud's the guest's size may be.
	sizePatience = 5 * time.Minute
)

// upkeep is what Tend has found out. The lock of the account guards it.
type upkeep struct {
	cloud    tencent.Disk // what is held against the device; empty: nothing is known
	since    time.Time    // when cloud was first described with this size
	sizeGiB  int64        // that was last described
	trim     Trim         // the last one
	trimNext time.Time
	trimming time.Time // since when; zero: it is not
	trimWhy  string    // why it is never trimmed
}

// Tend does for a mounted disk what need not be done at once, until ctx ends: it
// asks the cloud whether the disk is larger than is seen here, and trims it once a
// week. It holds no lock while it does.
func (d *Disk) Tend(ctx context.Context) {
	started := time.Now()
	var ask time.Time // when the cloud is to be asked
	for ctx.Err() == nil {
		s, changed := d.account.watch()
		s.MountPoint = d.want.MountPoint
		var due time.Time
		if s.State == Mounted && s.DiskID != "" {
			if ask.IsZero() {
				ask = started.Add(portion(30*time.Second, d.sealed.Facts.InstanceID, s.DiskID))
			}
			if !time.Now().Before(ask) {
				ask = time.Now().Add(sizePeriod - portion(sizePeriod/4, d.sealed.Facts.InstanceID, s.DiskID))
				if d.askSize(ctx, s) {
					ask = time.Now().Add(sizePatience)
				}
			}
			due = d.tendTrim(ctx, s, started)
			if ask.Before(due) || due.IsZero() {
				due = ask
			}
		}
		sleepUntil(ctx, due, changed)
	}
}

// sleepUntil waits for a time (zero: none), a change or the end of ctx.
func sleepUntil(ctx context.Context, due time.Time, changed <-chan struct{}) {
	var c <-chan time.Time
	if !due.IsZero() {
		// Clocks are set, and timers do not notice: it is looked at again in a while.
		t := time.NewTimer(min(max(time.Until(due), time.Second), time.Hour))
		defer t.Stop()
		c = t.C
	}
	select {
	case <-ctx.Done():
	case <-changed:
	case <-c:
	}
}

// portion returns a part of d that differs between instances and disks.
func portion(d time.Duration, instance, disk string) time.Duration {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %s", disk, instance)
	return time.Duration(h.Sum64() % uint64(d))
}

// askSize asks the cloud how large the disk is, and reports whether to ask again
// soon: the guest may see a new size later than the cloud describes it. A cloud that
// does not tell is no reason for anything.
func (d *Disk) askSize(ctx context.Context, s State) (soon bool) {
	ctx, cancel := context.WithTimeout(ctx, cloudPatience)
	defer cancel()
	disk, err := d.cloud.DescribeDisk(ctx, s.DiskID)
	if err != nil {
		d.log.Debug("the cloud does not tell the disk's size", "disk", s.DiskID, "err", err)
		return false
	}
	w := behind(disk, s)
	d.account.set(func(t *upkeep) {
		soon = w != nil && w.Reason == ReasonNotSeen && t.sizeGiB != disk.SizeGiB
		if t.sizeGiB = disk.SizeGiB; soon {
			return
		}
		if t.cloud.ID != disk.ID || t.cloud.SizeGiB != disk.SizeGiB {
			t.since = time.Now()
		}
		t.cloud = disk
	})
	if w != nil && !soon {
		d.log.Warn("the disk serves, but", "reason", w.Reason, "message", w.Message)
	}
	return soon
}

// tell adds what Tend has found out to how the disk stands.
func (t upkeep) tell(s *State) {
	if w := behind(t.cloud, *s); w != nil {
		w.Since = t.since
		s.Warnings = append(s.Warnings, *w)
	}
	if t.trimWhy != "" {
		s.Trim = &TrimState{Never: t.trimWhy}
	} else if !t.trimNext.IsZero() {
		s.Trim = &TrimState{Last: t.trim, Since: t.trimming, Next: t.trimNext}
	}
}

// behind says whether the guest has not seen that the cloud has made the disk
// larger, and what to do.
func behind(c tencent.Disk, s State) *Warning {
	size := c.SizeGiB << 30
	if len(s.Members) == 1 { // what stands on it is smaller
		s.Device, s.SizeBytes = s.Members[0].Device, s.Members[0].SizeBytes
	}
	// A stripe does not grow with its disks.
	if c.ID == "" || c.ID != s.DiskID || len(s.Members) > 1 || s.State != Mounted || size <= s.SizeBytes {
		return nil
	}
	text := fmt.Sprintf("the cloud says that %s has %s, and %s has %s", s.DiskID, Size(size), s.Device, Size(s.SizeBytes))
	if c.Encrypt {
		// Source: https://cloud.tencent.com/document/product/362/31640
		return &Warning{Reason: ReasonNeedsReattach, Message: text + ": an encrypted disk shows its new size only after it was detached and attached again; " +
			"drain the node, type `systemctl stop tkenode-agent` and `umount " + s.MountPoint + "`, detach the disk, attach it, type `systemctl start tkenode-agent`, and the file system is grown"}
	}
	return &Warning{Reason: ReasonNotSeen, Message: text + ": the guest has not seen its new size; detach the disk and attach it again, or reboot the node from the console"}
}

// tendTrim trims the disk if it is time to, and returns when that is next.
func (d *Disk) tendTrim(ctx context.Context, s State, started time.Time) time.Time {
	ok, err := discards(d.sys, s.Device[len("/dev/"):])
	if err != nil || !ok {
		why := "its device takes no discards"
		if err != nil {
			why = err.Error()
		}
		d.account.set(func(t *upkeep) { t.trimWhy = why })
		return time.Time{}
	}
	offset := trimOffset(d.sealed.Facts.InstanceID, s.DiskID)
	next := nextTrim(d.base(s, started), started, offset)
	last := d.ledger.trimmed(s.DiskID)
	d.account.set(func(t *upkeep) { t.trim, t.trimNext, t.trimWhy = last, next, "" })
	if time.Now().Before(next) {
		return next
	}
	last = d.trimNow(ctx, s)
	if ctx.Err() != nil {
		return time.Time{} // cut off; it is due again
	}
	next = nextTrim(last.At, started, offset)
	d.account.set(func(t *upkeep) { t.trim, t.trimNext = last, next })
	return next
}

// trimNow trims the disk and notes what came of it.
func (d *Disk) trimNow(ctx context.Context, s State) Trim {
	began := time.Now()
	d.account.set(func(t *upkeep) { t.trimming = began })
	defer d.account.set(func(t *upkeep) { t.trimming = time.Time{} })
	done := Trim{At: began.UTC().Truncate(time.Second)}
	type outcome struct {
		bytes int64
		err   error
	}
	result := make(chan outcome, 1)
	go func() {
		n, err := d.trim(ctx, s)
		result <- outcome{n, err}
	}()
	var err error
	select {
	case o := <-result:
		done.Bytes, err = o.bytes, o.err
	case <-ctx.Done():
		// A program in the hands of the kernel does not end when it is killed.
		t := time.NewTimer(stopPatience)
		defer t.Stop()
		select {
		case <-result:
		case <-t.C:
		}
		return Trim{}
	}
	done.Took = time.Since(began)
	if err != nil {
		done.Error = err.Error()
		d.log.Warn("not trimmed", "disk", s.DiskID, "err", err)
	} else {
		d.log.Info("trimmed", "disk", s.DiskID, "bytes", done.Bytes, "took", done.Took.Round(time.Millisecond))
	}
	if err := d.ledger.store(s.DiskID+".trim", done); err != nil {
		d.log.Warn("the time of the trim is not kept", "disk", s.DiskID, "err", err)
	}
	return done
}

// watch returns how the disk stands, and a channel that is closed once it stands
// differently.
func (a *account) watch() (State, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.moved == nil {
		a.moved = make(chan struct{})
	}
	return a.last, a.moved
}

// set changes what Tend has found out.
func (a *account) set(f func(*upkeep)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f(&a.upkeep)
}
