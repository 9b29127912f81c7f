package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	lockPatience = 5 * time.Second // udev reads a new disk for some tens of milliseconds
	// readPatience is how long a step waits for a disk to be read; a larger one is
	// read beside everything else.
	readPatience = 3 * time.Second
	dropPatience = 2 * time.Second // for a read under way when it is given up
	never        = math.MaxInt64   // nanoseconds
)

// claim is a disk that is held while it is proven blank.
type claim struct {
	dev       device
	disk      *os.File  // open, and so its name and number are no other disk's; locked
	exclusive *os.File  // the same, for direct reads; nobody else can claim it
	writes    string    // how often it had been written to when it was claimed
	own       span      // of an attempt that was cut off: it is ours, and counts as blank
	order     *decision // by which whatever it holds is erased; nil: it is blank
}

// held is a disk of a stripe that has been proven while others are still read.
type held struct {
	claim *claim
	proof string
}

// claims returns the claims under which all that at stands on was found blank, or is
// to be erased, and what that rests on. While any of it is read it returns an error of
// class waiting, and keeps what is proven claimed. The caller holds mu.
func (d *Disk) claims(ctx context.Context, at place, have observed) ([]*claim, string, error) {
	if at.next() != array {
		c, proof, err := d.proven(ctx, at.dev(), have.Ledger[at.dev().Serial], have.Decision, have.Content)
		return []*claim{c}, proof, err
	}
	errs := make([]error, len(at.disks))
	var wg sync.WaitGroup
	for i, dev := range at.disks {
		part := d.parts[dev.Serial]
		if part.held != nil {
			continue
		}
		wg.Go(func() {
			c, proof, err := part.proven(ctx, dev, have.Ledger[dev.Serial], have.Decisions[dev.Serial], have.Members[dev.Serial])
			if errs[i] = err; err == nil {
				part.held = &held{c, proof}
			}
		})
	}
	wg.Wait()
	var waiting []string
	hung := false
	for _, err := range errs {
		switch {
		case node.ReasonOf(err, "") == Proving:
			waiting = append(waiting, err.Error())
		case node.ReasonOf(err, "") == Hung:
			waiting, hung = append(waiting, err.Error()), true
		case err != nil:
			d.drop()
			return nil, "", err
		}
	}
	if len(waiting) > 0 {
		return nil, "", node.Waiting(proving(hung), "%s", strings.Join(waiting, "; "))
	}
	var all []*claim
	var proofs []string
	for _, dev := range at.disks {
		part := d.parts[dev.Serial]
		all, proofs = append(all, part.held.claim), append(proofs, part.held.proof)
		part.held = nil
	}
	return all, together(at.disks, proofs), nil
}

// proven returns the claim under which a device was found blank, or is to be erased.
func (d *Disk) proven(ctx context.Context, dev device, past entry, order *decision, found content) (*claim, string, error) {
	if order != nil && order.is(actFormat, dev) {
		return d.ordered(ctx, dev, order)
	}
	return d.blank(ctx, dev, past, found.own(past))
}

// own returns what a disk holds of an attempt to make a stack that was cut off before
// a file system was made: nothing can have been written behind it by then.
func (c content) own(past entry) span {
	switch {
	case past.State != stateFormatting:
	case c.Member != nil && past.Array != nil && c.Member.UUID == past.Array.UUID && c.Member.DataAt == dataAt:
		return span{superAt, dataAt}
	case c.Header != nil && past.Crypt != "" && c.Header.UUID == past.Crypt:
		return span{0, headerBytes}
	}
	return span{}
}

// claim claims dev: that fails while anybody has it mounted, stacked or claimed.
func (d *Disk) claim(ctx context.Context, dev device) (_ *claim, err error) {
	c := &claim{dev: dev}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	// Not for writing: udev announces a change of a disk that was open for that, which
	// would wake us to prove a disk that is not blank again, without end.
	if c.disk, err = d.open(dev, unix.O_RDONLY); err != nil {
		return nil, err
	}
	if err := lock(ctx, c.disk); err != nil {
		return nil, fmt.Errorf("lock %s: %w", dev, err)
	}
	if c.exclusive, err = reopen(c.disk, unix.O_RDONLY); err != nil {
		return nil, fmt.Errorf("claim %s: %w", dev, err)
	}
	bytes, err := c.disk.Seek(0, io.SeekEnd)
	if err != nil || bytes != dev.SizeBytes {
		return nil, fmt.Errorf("%s has %d bytes: %w", dev, bytes, errors.Join(err, errChanged))
	}
	c.writes, err = d.writes(dev)
	return c, err
}

func (c *claim) close() {
	for _, f := range []*os.File{c.exclusive, c.disk} {
		if f != nil {
			f.Close()
		}
	}
}

// unchanged returns an error if the claimed disk is another by now, or was written
// to: a claim keeps only those off who ask.
func (d *Disk) unchanged(c *claim) error {
	if err := d.same(c.dev); err != nil {
		return err
	}
	switch writes, err := d.writes(c.dev); {
	case err != nil:
		return err
	case writes != c.writes:
		return fmt.Errorf("somebody wrote to %s: %w", c.dev, errChanged)
	}
	return nil
}

// writes returns how often the kernel has written to dev, and discarded of it.
// Source: linux Documentation/block/stat.rst
func (d *Disk) writes(dev device) (string, error) {
	text, err := attribute(filepath.Join(d.sys, "block", dev.Name), "stat")
	f := strings.Fields(text)
	if err == nil && len(f) < 11 {
		err = fmt.Errorf("%d fields", len(f))
	}
	if err != nil {
		return "", fmt.Errorf("read statistics of %s: %w", dev, err)
	}
	counts := f[4] + " " + f[6]
	if len(f) >= 15 {
		counts += " " + f[11] // Linux 4.18
	}
	return counts, nil
}

// reopen opens the same disk once more, for direct I/O, and claims it.
func reopen(disk *os.File, flags int) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", disk.Fd()), flags|unix.O_EXCL|unix.O_DIRECT, 0)
}

// reread opens it once more for direct reads, and claims nothing.
func reread(disk *os.File) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", disk.Fd()), unix.O_RDONLY|unix.O_DIRECT, 0)
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

// proof is the reading of every block of a disk, which may take hours.
type proof struct {
	*claim
	past   entry  // of the ledger
	why    string // the cloud does not vouch for the disk
	began  time.Time
	cancel context.CancelFunc
	read   atomic.Int64
	done   chan struct{} // closed when found is there
	found  content
	err    error       // why nothing is known of what it holds
	moves  progressing // guarded by moving
	moving sync.Mutex
}

// blank returns the claim under which dev was found blank, and what that rests on.
// While dev is read it returns an error of class waiting. The caller holds mu.
func (d *Disk) blank(ctx context.Context, dev device, past entry, own span) (*claim, string, error) {
	if d.proof != nil {
		return d.conclude(ctx)
	}
	c, err := d.claim(ctx, dev)
	if err != nil {
		return nil, "", err
	}
	c.own = own
	origin := make(chan []Evidence, 1) // asked for while the disk is sampled
	go func() {
		done := d.account.begin("cloud")
		evidence := d.origin(ctx, dev, past)
		done()
		origin <- evidence
	}()
	done := d.account.begin("sample")
	found, err := d.inspect(ctx, c)
	done()
	evidence := <-origin
	if err != nil {
		c.close()
		return nil, "", err
	}
	d.account.evidence(append([]Evidence{
		{"/sys/block/" + dev.Name, fmt.Sprintf("its live serial is %s; nobody has it mounted, stacked, claimed or locked", dev.Serial), true},
		{"the disk itself", fmt.Sprintf("%s: %s", sampleText, found), found.Blank},
	}, evidence...))
	if !found.Blank {
		d.suspect = suspect{dev, found.at}
		c.close()
		return nil, "", refuse(dev, found, past)
	}
	bad, sound := unsound(evidence)
	if sound {
		last := evidence[len(evidence)-1]
		return c, "new, as the cloud says (" + last.Source + " " + last.Text + "); " + sampleText + " were read as zero", nil
	}
	d.begin(c, past, fmt.Sprintf("%s: %s", bad.Source, bad.Text))
	return d.conclude(ctx)
}

// ordered returns the claim of a disk that an operator has decided to format.
func (d *Disk) ordered(ctx context.Context, dev device, order *decision) (*claim, string, error) {
	d.drop()
	c, err := d.claim(ctx, dev)
	if err != nil {
		return nil, "", err
	}
	proof := order.String()
	d.account.evidence([]Evidence{{"ledger of disks", proof, true}})
	switch ends, err := d.read(ctx, c.exclusive, dev, errand{Act: toReadEnds}, d.quiet, nil); {
	case err != nil:
		c.close()
		return nil, "", err
	case ends.Hung:
		c.close()
		return nil, "", ends.waiting()
	case ends.Unreadable != "":
		c.close()
		return nil, "", node.Terminal("Unreadable", "detach it: a file system on it would not last", fmt.Errorf("read the ends of %s: %s", dev, ends.Unreadable))
	}
	c.order = order
	return c, proof, nil
}

// inspect reads the ends, the places of superblocks and a sample of a claimed disk.
// While that hangs it returns an error of class waiting.
func (d *Disk) inspect(ctx context.Context, c *claim) (content, error) {
	found, err := d.read(ctx, c.exclusive, c.dev, c.own.of(toInspect), d.quiet, nil)
	if err == nil && found.Hung {
		err = found.waiting()
	}
	return found, err
}

// of is the errand to read a disk of which the span counts as blank.
func (s span) of(act string) errand { return errand{Act: act, OwnFrom: s.from, OwnTo: s.to} }

// begin begins to read every block of a claimed disk.
func (d *Disk) begin(c *claim, past entry, why string) {
	ctx, cancel := context.WithCancel(context.Background())
	p := &proof{claim: c, past: past, why: why, began: time.Now(), cancel: cancel, done: make(chan struct{})}
	d.proof = p
	d.log.Info("reading every block", "disk", c.dev.String(), "why", why)
	ended := d.account.begin("read")
	go func() { // conclude or drop waits for it
		defer close(p.done)
		p.found, p.err = d.read(ctx, c.exclusive, c.dev, c.own.of(toReadAll), never, p.read.Store)
		ended()
		d.log.Info("has read", "disk", c.dev.String(), "bytes", p.read.Load(), "took", time.Since(p.began).Round(time.Second), "found", p.found.String())
	}()
}

// conclude returns what blank does once the disk has been read.
func (d *Disk) conclude(ctx context.Context) (*claim, string, error) {
	p := d.proof
	patience := time.NewTimer(d.patience)
	defer patience.Stop()
	select {
	case <-p.done:
	case <-patience.C:
		return nil, "", p.waiting(time.Now())
	case <-ctx.Done():
		return nil, "", p.waiting(time.Now())
	}
	d.proof = nil
	p.cancel()
	found, err := p.found, p.err
	if err == nil && found.Blank { // the ends once more, after what may have been hours
		found, err = d.inspect(ctx, p.claim)
	}
	if err != nil {
		p.close()
		return nil, "", err
	}
	d.account.add(Evidence{"the disk itself", fmt.Sprintf("every block: %s read, %s found", Size(p.read.Load()), found), found.Blank})
	if !found.Blank {
		d.suspect = suspect{p.dev, found.at}
		p.close()
		return nil, "", refuse(p.dev, found, p.past)
	}
	return p.claim, fmt.Sprintf("every block was read as zero, %s; the cloud does not vouch for it (%s)", Size(p.dev.SizeBytes), p.why), nil
}

// drop gives up reading. A read that hangs in the kernel is left behind.
func (d *Disk) drop() {
	for _, part := range d.parts {
		part.drop()
	}
	if d.held != nil {
		d.held.claim.close()
		d.held = nil
	}
	p := d.proof
	if p == nil {
		return
	}
	d.proof = nil
	p.cancel()
	select {
	case <-p.done:
		p.close()
	case <-time.After(dropPatience):
		d.log.Error("left behind, a read does not return", "disk", p.dev.String())
		go func() {
			<-p.done
			p.close()
		}()
	}
}

func (p *proof) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// waiting says how far the reading is.
func (p *proof) waiting(now time.Time) error {
	text, hung := p.progress(now)
	return node.Waiting(proving(hung), "%s", text)
}

// progress says how far the reading is, and whether it goes on at all.
func (p *proof) progress(now time.Time) (text string, hung bool) {
	read, elapsed := p.read.Load(), now.Sub(p.began)
	p.moving.Lock()
	still := p.moves.look(1, strconv.FormatInt(read, 10), now)
	p.moving.Unlock()
	if still.For >= stallPatience {
		return fmt.Sprintf("%s does not answer: no read of it has ended for %s, after %d %% of it; look at the disk in the console, and detach it if it does not come back",
			p.dev, still.For.Round(time.Second), read*100/p.dev.SizeBytes), true
	}
	text = fmt.Sprintf("read %d %% of %s", read*100/p.dev.SizeBytes, p.dev)
	if rate := float64(read) / elapsed.Seconds(); read > 0 && elapsed >= time.Second {
		left := time.Duration(float64(p.dev.SizeBytes-read) / rate * float64(time.Second))
		text += fmt.Sprintf(", %.1f MiB/s, %s left", rate/(1<<20), left.Round(time.Second))
	}
	return text + "; it is formatted once every block has been read as zero, since the cloud does not vouch for it: " + p.why, false
}

// refuse says why a disk that was to be formatted is not.
func refuse(dev device, c content, past entry) error {
	switch {
	case c.Unreadable != "":
		return unreadable(dev, c)
	case past.State == stateFormatting:
		return interrupted(dev, c, past)
	}
	return foreign(dev, c) // where the plan has not looked
}

// suspect is where something was found on a disk, far from where a look at it goes.
type suspect struct {
	dev device
	at  int64
}
