package eni

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
)

// Paths is the module of the kernel's side: everything that a packet of a pod
// meets on this node. Its loop repairs; ADD and DEL are plans of one pod, made of
// the same objects, under the same lock.
type Paths struct {
	network    *Network
	conflist   string // its file
	configured string
	plugins    string // the directory of CNI plugins

	observing sync.Mutex // guards the three below: one plan at a time
	eyes      *kernel
	seen      int64 // moves, as of the last plan
	no6       bool  // nothing of IPv6 was there or wanted at the last plan

	mu    sync.Mutex // guards what changes the kernel, and everything below
	hands *kernel
	scene scene // as of the last plan
	// wanted is what is wanted as of version wantedAt of the ledger, and scene.
	wanted   map[string]string
	wantedAt int

	// ready are the slots that pods can be given, and the MTU of their ENI. An ADD
	// asks for them without waiting for those that are being wired.
	ready atomic.Pointer[map[int]int]
	whole atomic.Pointer[map[int]int] // the same of ENIs that pods get whole

	dying   sync.Map   // names of veths that reap removes
	reaping sync.Mutex // guards reaper
	reaper  *kernel

	fights fights

	moves atomic.Int64 // odd while a pod is being wired; changes with every one
}

// Name is the module's name.
func (p *Paths) Name() string { return "eni/paths" }

// Condition is what the module serves.
func (p *Paths) Condition() node.ConditionType { return node.NetworkReady }

// Needs lists what planning presupposes.
func (p *Paths) Needs() []node.ConditionType { return []node.ConditionType{node.ConfigSealed} }

// Watch wakes the module when the kernel or the ledger changes. It ends when there
// is IPv6 to be watched, too.
func (p *Paths) Watch(ctx context.Context, wake func()) error {
	ctx, cancel := context.WithCancelCause(ctx)
	six := p.network.policy().dual || p.network.ledger.six()
	var ledger sync.WaitGroup
	ledger.Go(func() {
		for {
			changed := p.network.ledger.wait()
			select {
			case <-ctx.Done():
				return
			case <-changed:
				wake()
			}
			if !six && p.network.ledger.six() {
				cancel(errors.New("pods have IPv6 addresses from now on"))
			}
		}
	})
	err := watchKernel(ctx, six, &p.fights, wake)
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	cancel(nil)
	ledger.Wait()
	return err
}

// Plan compares what is wanted with what is in the kernel.
func (p *Paths) Plan(ctx context.Context) (node.Plan, error) {
	plan := node.Plan{Again: time.Minute, Urgent: true}
	sealed, s, err := p.network.current()
	if err != nil {
		return plan, err
	}
	if s.Instance != sealed.Facts.InstanceID {
		return plan, node.Waiting("LedgerNotBegun", "the ledger is not of this instance yet")
	}
	if pod, ok := s.homeless(); ok {
		// Nothing is removed while what is wanted is not completely known.
		return plan, node.Waiting("ENIUnknown", "pod %s is of slot %d, and the cloud has not said yet which ENI is in it", pod, pod.Slot)
	}
	steps, sc, err := p.observe(ctx, policyOf(sealed))
	if err != nil {
		return plan, err
	}
	for _, st := range steps {
		plan.Add(func(context.Context) error { return p.do(st) }, "%s", st.text)
	}
	if s, err = p.network.ledger.state(); err != nil {
		return plan, err
	}
	now := time.Now()
	addrs, next := p.network.ledger.unclean(now)
	if len(addrs) > 0 {
		plan.Add(func(context.Context) error { return p.forget(addrs) }, "forget connections of the last pods of %v", addrs)
	}
	if !next.IsZero() {
		plan.Again = min(plan.Again, next.Sub(now))
	}
	waiting := p.settle(s, sc, len(steps) == 0)
	if p.fighting(now) {
		plan.Rest = fightRest
	}
	// Whatever is to be forgotten, or is of an ENI that no pod has. In a fight the
	// condition would come and go with every repair; the warning says it instead.
	serving := !slices.ContainsFunc(steps, func(st step) bool {
		_, idle := st.object.(parked)
		return !idle
	})
	plan.Serving = (serving || plan.Rest > 0) && waiting == nil
	if !plan.Empty() {
		return plan, nil
	}
	return plan, waiting
}

// fighting reports whether something keeps undoing what the paths make, and logs
// when that begins and when it ends.
func (p *Paths) fighting(now time.Time) bool {
	c, changed := p.fights.news(now)
	switch {
	case changed && c != nil:
		p.network.log.Warn(string(c.Type), "module", p.Name(), "message", c.Message)
	case changed:
		p.network.log.Info(string(node.RepairsUndone)+" is over", "module", p.Name())
	}
	return c != nil
}

// observe returns what is to be done. While a pod is being wired the kernel is
// between two states; then it looks again, and at last keeps ADDs out.
func (p *Paths) observe(ctx context.Context, pol policy) ([]step, scene, error) {
	p.observing.Lock()
	defer p.observing.Unlock()
	if err := p.open(&p.eyes); err != nil {
		return nil, scene{}, err
	}
	latest := time.Now().Add(lullLimit)
	for try := 0; ; try++ {
		p.lull(ctx, latest)
		if try == 3 {
			p.mu.Lock()
			defer p.mu.Unlock()
		}
		before := p.moves.Load()
		steps, sc, err := p.compare(pol)
		if gone(err) && try < 3 { // somebody has removed what was being listed: that is to be repaired
			continue
		}
		if err != nil || ctx.Err() != nil {
			return nil, sc, errors.Join(err, ctx.Err())
		}
		if try == 3 || before%2 == 0 && p.moves.Load() == before {
			p.seen = before
			return steps, sc, nil
		}
	}
}

// Pods come many at once. A plan that is made meanwhile takes the processors from
// them, is made in vain, and at last keeps them out.
const (
	lullTime  = 20 * time.Millisecond  // without a move: the pods that came together are there
	lullLimit = 200 * time.Millisecond // but not longer: what was broken is repaired within 1 s
)

// lull waits until no pod has been wired for a moment, if one has since the last
// plan. The caller holds observing.
func (p *Paths) lull(ctx context.Context, latest time.Time) {
	for before := p.seen; ; {
		now := p.moves.Load()
		if now == before && now%2 == 0 || ctx.Err() != nil || !time.Now().Before(latest) {
			return
		}
		before = now
		select {
		case <-ctx.Done():
		case <-time.After(lullTime):
		}
	}
}

func (p *Paths) compare(pol policy) ([]step, scene, error) {
	s, err := p.network.ledger.state()
	if err != nil {
		return nil, scene{}, err
	}
	links, err := p.eyes.links()
	if err != nil {
		return nil, scene{}, err
	}
	links = slices.DeleteFunc(links, func(l netlink.Link) bool { return p.isDying(l.Attrs().Name) })
	sc := survey(s, links)
	sc.policy = pol
	sc.files = p.files()
	sc.six = s.slots6()
	want := desired(s, sc)
	p.fights.want(want)
	// What a node with IPv6 has left is looked for, until nothing is found.
	dual := s.dual()
	six := dual || !p.no6
	have, err := p.eyes.observe(want, links, six)
	if err != nil {
		return nil, sc, err
	}
	p.no6 = !dual && !(six && slices.ContainsFunc(have, ofIPv6))
	return diff(want, have), sc, nil
}

// chained are the plugins of the CNI project that are called after ours, for
// hostPort and the bandwidth annotations. They do nothing for a pod without.
var chained = []struct{ name, conf string }{
	{"portmap", `{"type": "portmap", "capabilities": {"portMappings": true}, "backend": "nftables"}`},
	{"bandwidth", `{"type": "bandwidth", "capabilities": {"bandwidth": true}}`},
}

// conflist is what the runtime calls for every pod. One that is not there would
// fail the ADD of all of them: an image that somebody else makes may lack it.
func conflist(there func(plugin string) bool) string {
	plugins := fmt.Sprintf("    {\"type\": %q, \"capabilities\": {%q: true}}", cni.Network, cni.CapabilityAnnotations)
	for _, c := range chained {
		if there(c.name) {
			plugins += ",\n    " + c.conf
		}
	}
	return fmt.Sprintf("{\n  \"cniVersion\": \"1.1.0\",\n  \"name\": %q,\n  \"plugins\": [\n%s\n  ]\n}\n", cni.Network, plugins)
}

// files are written when the network is configured for the first time, and not
// before: kubelet is Ready as soon as containerd sees the first of them.
func (p *Paths) files() []file {
	there := func(plugin string) bool {
		_, err := os.Stat(filepath.Join(p.plugins, plugin))
		return err == nil
	}
	return []file{
		{p.configured, "configured\n"},
		{p.conflist, conflist(there)},
	}
}

// settle remembers what was seen: which slots pods can be given. A slot becomes
// ready when nothing is left to do, and stops being so when its ENI is gone. It
// returns what is waited for.
func (p *Paths) settle(s state, sc scene, converged bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.scene, p.wantedAt = sc, 0
	before := p.readySlots()
	ready := maps.Clone(before)
	var waiting error
	for _, slot := range s.slots() {
		if slot.exclusive() {
			continue
		}
		dev, there := sc.devices[slot.MAC]
		switch {
		case !slot.taken(): // the next ENI in it has to be configured first
			delete(ready, slot.Number)
		case !there:
			delete(ready, slot.Number)
			waiting = node.Waiting("LinkMissing", "no link has the MAC %s of %s yet", slot.MAC, slot.ENI)
		case sc.dual && !sc.six[slot.Number]:
			delete(ready, slot.Number)
			waiting = node.Waiting("IPv6Missing", "%s has no IPv6 address yet", slot.ENI)
		case converged:
			ready[slot.Number] = dev.mtu
		}
	}
	if !maps.Equal(before, ready) {
		p.ready.Store(&ready)
		p.network.log.Info("slots ready", "module", p.Name(), "mtu by slot", ready)
		p.network.ledger.poke()
	}
	p.settleWhole(s, sc, converged)
	p.network.exhausted.Store(s.exhausted(ready, sc.dual, time.Now()))
	if waiting == nil && len(ready) == 0 {
		waiting = node.Waiting("NoENI", "the pool has no ENI yet")
	}
	return waiting
}

// Apply carries the plan out; each step takes the lock for itself.
func (p *Paths) Apply(ctx context.Context, plan node.Plan) error { return plan.Apply(ctx) }

// do carries one step out, if it is still what is wanted: the ledger may have
// moved on, which has woken the module. The kernel may have, too: a plan that was
// made while a link went down sees the link up, and the routes that went with it
// gone.
func (p *Paths) do(st step) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	wanted, err := p.wantedNow()
	if err != nil {
		return err
	}
	k, err := p.writer()
	if err != nil {
		return err
	}
	defer k.leave()
	attr, ok := wanted[st.object.key()]
	switch {
	case st.drop && !ok:
		err = st.object.(removable).drop(k)
	case !st.drop && ok && attr == st.object.attr():
		err = st.object.put(k)
	default:
		return nil
	}
	switch {
	case gone(err):
		return fmt.Errorf("%w: %w", node.ErrOutdated, err)
	case err == nil:
		p.fights.repaired(st.object, st.drop, time.Now())
	}
	return err
}

// wantedNow returns what is wanted, by key, as of the ledger now and the kernel's
// links when they were last looked at. A pod that is newer than that is taken to
// be wired, so that nothing of it is removed. The caller holds mu.
func (p *Paths) wantedNow() (map[string]string, error) {
	s, version, err := p.network.ledger.since(p.wantedAt)
	if err != nil {
		return nil, err
	}
	if version == p.wantedAt {
		return p.wanted, nil
	}
	sc := p.scene
	sc.wired = maps.Clone(sc.wired)
	for key := range s.Pods {
		if !sc.alive[key] {
			sc.wired[key] = true
		}
	}
	p.wanted, p.wantedAt = map[string]string{}, version
	for _, o := range desired(s, sc) {
		p.wanted[o.key()] = o.attr()
	}
	return p.wanted, nil
}

// writer returns the handle for changes. The caller holds mu.
func (p *Paths) writer() (*kernel, error) {
	err := p.open(&p.hands)
	return p.hands, err
}

// open opens a handle that is not open yet. The caller holds its lock.
func (*Paths) open(k **kernel) (err error) {
	if *k == nil {
		*k, err = openKernel()
	}
	return err
}

// readySlots returns the slots that pods can be given, with the MTU of their ENI.
// Nobody changes what it returns.
func (p *Paths) readySlots() map[int]int { return *p.ready.Load() }

// begin takes the lock to change the network of one pod.
func (p *Paths) begin() (*kernel, error) {
	p.mu.Lock()
	k, err := p.writer()
	if err != nil {
		p.mu.Unlock()
		return nil, err
	}
	p.moves.Add(1)
	return k, nil
}

func (p *Paths) end(k *kernel) {
	if err := k.leave(); err != nil {
		p.network.log.Warn("leave network namespace", "err", err)
	}
	p.moves.Add(1)
	p.mu.Unlock()
}

func (p *Paths) close() error {
	for _, mu := range []*sync.Mutex{&p.observing, &p.reaping, &p.mu} {
		mu.Lock()
		defer mu.Unlock()
	}
	var err error
	for _, k := range []**kernel{&p.eyes, &p.hands, &p.reaper} {
		if *k != nil {
			err = errors.Join(err, (*k).close())
			*k = nil
		}
	}
	return err
}
