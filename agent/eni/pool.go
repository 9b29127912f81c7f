package eni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

const (
	// pollPeriod is how often calls under way are looked after. The cloud's tasks
	// take seconds, and its answers are as late as that.
	pollPeriod = time.Second
	// auditPeriod is how often the pool is compared with the cloud when nothing
	// is under way; with a jitter, so that a fleet does not ask at once.
	auditPeriod = time.Minute
	// demandPause is how often ADDs make the pool ask the cloud at most.
	demandPause = 200 * time.Millisecond
)

// Pool is the module of the cloud's side: it holds as many ENIs and addresses as
// the pods need and the NodeConfig keeps warm, and knows which of them may be used.
// Every call is in the ledger before it is made, and one at a time is made for an
// ENI. What became of a call is seen in what the cloud describes, never guessed.
type Pool struct {
	network *Network
	cloud   Cloud

	mu       sync.Mutex // guards the rest
	subnets  map[string]tencent.Subnet
	asked    map[string]time.Time // when a subnet was last described
	holds    map[string]hold
	askQuota bool      // the ledger's may be old
	excess   time.Time // see cloudView, as the three below
	missing  map[string]time.Time
	idle     map[string]time.Time
	spare    map[string]time.Time
}

func newPool(n *Network, c Cloud) *Pool {
	return &Pool{network: n, cloud: c, askQuota: true,
		subnets: map[string]tencent.Subnet{}, asked: map[string]time.Time{}, holds: map[string]hold{}}
}

// Name is the module's name.
func (p *Pool) Name() string { return "eni/pool" }

// Condition is what the module serves.
func (p *Pool) Condition() node.ConditionType { return node.NetworkReady }

// Needs lists what planning presupposes.
func (p *Pool) Needs() []node.ConditionType { return []node.ConditionType{node.ConfigSealed} }

// Watch wakes the module when an ADD has found no address, and when the warm
// addresses may have to be refilled. The cloud tells nothing by itself: Plan.Again
// asks it.
func (p *Pool) Watch(ctx context.Context, wake func()) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.network.demand:
			wake()
		}
		select { // a burst of ADDs is one question to the cloud
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(demandPause):
		}
	}
}

// Plan compares the ledger with what the cloud says.
func (p *Pool) Plan(ctx context.Context) (node.Plan, error) {
	plan := node.Plan{Again: auditPeriod + rand.N(auditPeriod/4)}
	sealed, s, err := p.network.current()
	if err != nil {
		return plan, err
	}
	if id := sealed.Facts.InstanceID; s.Instance != id {
		plan.Add(func(context.Context) error { return p.network.ledger.begin(id) }, "begin the ledger of %s%s", id, formerly(s))
		return plan, nil
	}
	want := poolWant{cluster: sealed.Config.Cluster.ID, facts: sealed.Facts, network: sealed.Config.Network, rebuilt: s.Settled}
	p.mu.Lock()
	defer p.mu.Unlock()
	view, limit, err := p.observe(ctx, want, s)
	if err != nil {
		p.network.setBlocked(err)
		return plan, err
	}
	if limit != s.Quota {
		s.Quota = limit
		plan.Add(func(context.Context) error { return p.network.ledger.record(record{Quota: &limit}) },
			"note the quota of %s: %d ENIs of %d addresses", want.facts.InstanceID, limit.ENIs, limit.IPsPerENI)
	}
	p.network.saw(view.enis)
	out := planPool(want, s, view)
	p.remember(out, view.now)
	p.network.setBlocked(cmp.Or(out.err, out.note))
	p.network.wants.setBlocked(out.whole)
	plan.Serving = out.serving
	for _, st := range out.steps {
		plan.Add(func(ctx context.Context) error { return p.do(ctx, want, st) }, "%s", st.text)
	}
	if out.again > 0 {
		plan.Again = min(plan.Again, out.again)
	}
	return plan, out.err
}

func formerly(s state) string {
	if s.Instance == "" {
		return ""
	}
	return fmt.Sprintf(" (it was of %s)", s.Instance)
}

// observe asks the cloud for the ENIs that may be ours to use, and for what must be
// known of their subnets and of the quota. The caller holds mu.
func (p *Pool) observe(ctx context.Context, want poolWant, s state) (cloudView, tencent.ENILimit, error) {
	view := cloudView{subnets: map[string]tencent.Subnet{}, now: time.Now(), waiting: int(p.network.waiting.Load()), wanted: p.network.wants.open(s)}
	var err error
	if view.enis, err = p.describe(ctx, want, s); err != nil {
		return view, s.Quota, err
	}
	limit := s.Quota
	if !want.observes() {
		if limit, err = p.quota(ctx, want, s); err != nil {
			return view, limit, err
		}
	}
	p.missing = since(p.missing, view.now, unseen(view.enis, s))
	p.forgetHolds(view.now)
	view.missing, view.idle, view.spare, view.excess = p.missing, p.idle, p.spare, p.excess
	view.failed = p.failed(ctx, view.enis, s)
	err = p.describeSubnets(ctx, want, view)
	maps.Copy(view.subnets, p.subnets)
	view.holds = maps.Clone(p.holds)
	return view, limit, err
}

// describe lists the ENIs: those that carry our tags, or all that are attached to
// this instance where somebody else attaches them.
func (p *Pool) describe(ctx context.Context, want poolWant, s state) ([]tencent.ENI, error) {
	id := want.facts.InstanceID
	if want.observes() {
		enis, err := p.cloud.DescribeENIs(ctx, id)
		return slices.DeleteFunc(enis, func(e tencent.ENI) bool { return !e.AttachedTo(id) }), err
	}
	enis, err := p.cloud.DescribeTaggedENIs(ctx, map[string]string{tagCluster: want.cluster, tagInstance: id})
	if err != nil || len(unseen(enis, s)) == 0 {
		return enis, err
	}
	// Its tags may have been taken off: that is no reason to make another.
	attached, err := p.cloud.DescribeENIs(ctx, id)
	return append(enis, attached...), err
}

// failed returns why creations have not attached their ENIs, by ENI. It is asked only
// where the cloud shows one detached, and tells only that nothing is under way any
// more: what it does not tell is waited for as ever.
func (p *Pool) failed(ctx context.Context, enis []tencent.ENI, s state) map[string]string {
	why := map[string]string{}
	for _, slot := range s.slots() {
		if slot.Intent != stepCreate || slot.Task == "" || !slices.ContainsFunc(enis, func(e tencent.ENI) bool {
			return e.ID == slot.ENI && e.State == tencent.StateAvailable && e.Attachment == nil
		}) {
			continue
		}
		if task, err := p.cloud.TaskResult(ctx, slot.Task); err == nil && task.Status == tencent.TaskFailed {
			why[slot.ENI] = task.Output
		}
	}
	return why
}

// quota returns the instance's quota. It is asked for when the agent starts, since
// an instance may have been resized, and when the cloud has said that it is
// reached; what the ledger has will do meanwhile.
func (p *Pool) quota(ctx context.Context, want poolWant, s state) (tencent.ENILimit, error) {
	if !p.askQuota && s.Quota != (tencent.ENILimit{}) {
		return s.Quota, nil
	}
	limit, err := p.cloud.ENILimit(ctx, want.facts.InstanceID)
	switch {
	case err == nil && limit.ENIs > 0 && limit.IPsPerENI > 0:
		p.askQuota = false
		return limit, nil
	case err == nil:
		err = fmt.Errorf("quota of %s: the cloud says %d ENIs of %d addresses", want.facts.InstanceID, limit.ENIs, limit.IPsPerENI)
	}
	if s.Quota != (tencent.ENILimit{}) {
		return s.Quota, nil
	}
	return limit, err
}

// subnetAge is how old what is known of a subnet may be when addresses are wanted
// of it: the cloud's own answers are seconds late.
const subnetAge = 30 * time.Second

// describeSubnets asks for subnets that are not known, and for those that
// addresses are wanted of anew. The caller holds mu.
func (p *Pool) describeSubnets(ctx context.Context, want poolWant, view cloudView) error {
	var ids []string
	add := func(id string, age time.Duration) {
		if asked, ok := p.asked[id]; (!ok || view.now.Sub(asked) >= age) && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	for _, e := range view.enis {
		age := time.Duration(1 << 62)
		if want.network.DualStack() && !p.subnets[e.SubnetID].CIDR6.IsValid() {
			age = subnetAge // until somebody gives it one
		}
		add(e.SubnetID, age)
	}
	if !want.observes() && (view.waiting+len(view.wanted) > 0 || len(view.enis) == 0) {
		for _, id := range want.network.SubnetIDs {
			add(id, subnetAge)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	subnets, err := p.cloud.DescribeSubnets(ctx, ids)
	if err != nil {
		return err
	}
	for _, sn := range subnets {
		p.subnets[sn.ID], p.asked[sn.ID] = sn, view.now
	}
	return nil
}

// unseen lists the ENIs of the ledger that are not among enis.
func unseen(enis []tencent.ENI, s state) (ids []string) {
	for _, slot := range s.Slots {
		if slot.ENI != "" && !slices.ContainsFunc(enis, func(e tencent.ENI) bool { return e.ID == slot.ENI }) {
			ids = append(ids, slot.ENI)
		}
	}
	return ids
}

// since keeps for each id since when it has been among ids.
func since(before map[string]time.Time, now time.Time, ids []string) map[string]time.Time {
	after := map[string]time.Time{}
	for _, id := range ids {
		after[id] = now
		if t, ok := before[id]; ok {
			after[id] = t
		}
	}
	return after
}

// remember keeps since when things have been as they are. The caller holds mu.
func (p *Pool) remember(out poolPlan, now time.Time) {
	p.idle = since(p.idle, now, out.idle)
	p.spare = since(p.spare, now, out.spare)
	switch {
	case !out.excess:
		p.excess = time.Time{}
	case p.excess.IsZero():
		p.excess = now
	}
}

// Apply carries the plan out.
func (p *Pool) Apply(ctx context.Context, plan node.Plan) error { return plan.Apply(ctx) }

// do journals the slot and then makes the step's call. A refusal takes the intent
// back; where nothing was heard, it stands, and later plans see what became of it.
func (p *Pool) do(ctx context.Context, want poolWant, st poolStep) error {
	if err := p.journal(st); err != nil || st.call == "" {
		return err
	}
	slot, err := p.call(ctx, want, st)
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case err == nil:
		p.granted(st)
		if st.call == stepUnassign {
			p.excess = now
		}
	case hasCode(err, "LimitExceeded") && node.ClassOf(err) == node.ClassTerminal:
		p.askQuota = true
	}
	var journal error
	if !sameSlot(slot, st.slot) {
		journal = p.network.ledger.record(record{Slot: &slot})
	}
	if err != nil && refused(err) && p.refuse(st, err, now) && st.spared {
		err = nil // pods have addresses; the plan says what is waited for
	}
	return errors.Join(err, journal)
}

// journal records the intent of a step, and that no pod may have the addresses
// that it gives back. Those must be proven free: by the ledger, and by the kernel.
func (p *Pool) journal(st poolStep) error {
	if len(st.addrs) == 0 {
		return p.network.ledger.record(record{Slot: &st.slot})
	}
	for _, a := range st.addrs {
		switch there, err := routed(a); {
		case err != nil:
			return fmt.Errorf("give back %s: %w", a, err)
		case there:
			return fmt.Errorf("give back %s: no pod has it, but the kernel has a route to it", a)
		}
	}
	return p.network.ledger.withdraw(st.slot, st.addrs, time.Now())
}

// call makes the step's call and returns the slot as it is then to be in the ledger.
func (p *Pool) call(ctx context.Context, want poolWant, st poolStep) (Slot, error) {
	slot := st.slot
	var err error
	switch id := want.facts.InstanceID; st.call {
	case stepCreate:
		var made tencent.ENI
		var task string
		if made, task, err = p.cloud.CreateENI(ctx, st.spec); err == nil {
			slot.ENI, slot.Task = made.ID, task
		}
	case stepAttach:
		_, err = p.cloud.AttachENI(ctx, slot.ENI, id, slot.AttachType, want.token(slot, stepAttach))
	case stepAssign:
		var ips []tencent.IP
		if ips, _, err = p.cloud.AssignIPs(ctx, slot.ENI, st.n, want.token(slot, stepAssign)); err == nil {
			slot.Target -= st.n - min(len(ips), st.n) // the cloud may give fewer
		}
	case stepUnassign:
		_, err = p.cloud.UnassignIPs(ctx, slot.ENI, slot.Leaving)
	case stepAssign6:
		var ips []tencent.IP6
		if ips, _, err = p.cloud.AssignIP6s(ctx, slot.ENI, st.n, want.token(slot, stepAssign6)); err == nil {
			slot.Target -= st.n - min(len(ips), st.n)
		}
	case stepUnassign6:
		_, err = p.cloud.UnassignIP6s(ctx, slot.ENI, slot.Leaving)
	case stepDetach:
		_, err = p.cloud.DetachENI(ctx, slot.ENI, id, want.token(slot, stepDetach))
	case stepDelete:
		_, err = p.cloud.DeleteENI(ctx, slot.ENI)
	}
	if refused(err) && !alreadySo(st.call, err) {
		slot.Intent, slot.Since, slot.Target, slot.SubnetID, slot.Leaving = "", time.Time{}, 0, "", nil
	}
	return slot, err
}

// refused reports whether the cloud has said that a call has no effect.
func refused(err error) bool {
	e, ok := errors.AsType[*tencent.APIError](err)
	return ok && !e.HasCode(tencent.CodeIdempotentProcessing) && !e.HasCode("InternalError")
}

// alreadySo reports whether the refusal of a call may mean that an earlier one has
// done what it is for. The intent then stands until that is seen.
func alreadySo(call Step, err error) bool {
	switch call {
	case stepAttach:
		return hasCode(err, tencent.CodeAttachmentAlreadyExists)
	case stepUnassign, stepUnassign6, stepDelete:
		return hasCode(err, tencent.CodeNotFound)
	case stepDetach:
		return hasCode(err, tencent.CodeNotFound, tencent.CodeAttachmentNotFound, "UnsupportedOperation.InvalidState")
	}
	return false
}

// sameSlot reports whether a call has changed nothing of the slot.
func sameSlot(a, b Slot) bool {
	return a.ENI == b.ENI && a.Intent == b.Intent && a.Target == b.Target
}
