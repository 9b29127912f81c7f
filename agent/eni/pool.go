package eni

import (
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
)

// Pool is the module of the cloud's side: it holds the ENIs and addresses that
// the NodeConfig asks for, and knows which of them may be used. Every call is in
// the ledger before it is made.
type Pool struct {
	network *Network
	cloud   Cloud

	mu      sync.Mutex // guards the rest
	subnets map[string]tencent.Subnet
	missing map[string]time.Time // since when an ENI of the ledger has not been seen
}

// Name is the module's name.
func (p *Pool) Name() string { return "eni/pool" }

// Condition is what the module serves.
func (p *Pool) Condition() node.ConditionType { return node.NetworkReady }

// Needs lists what planning presupposes.
func (p *Pool) Needs() []node.ConditionType { return []node.ConditionType{node.ConfigSealed} }

// Watch wakes the module when an ADD has found no address. The cloud tells
// nothing by itself: Plan.Again asks it.
func (p *Pool) Watch(ctx context.Context, wake func()) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.network.demand:
			wake()
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
	want := poolWant{cluster: sealed.Config.Cluster.ID, facts: sealed.Facts, network: sealed.Config.Network}
	view, err := p.observe(ctx, want, s)
	if err != nil {
		p.network.setBlocked(err)
		return plan, err
	}
	steps, err := planPool(want, s, view)
	p.network.setBlocked(err)
	for _, st := range steps {
		plan.Add(func(ctx context.Context) error { return p.do(ctx, want, st) }, "%s", st.text)
	}
	if node.ClassOf(err) == node.ClassWaiting {
		plan.Again = pollPeriod
	}
	return plan, err
}

func formerly(s state) string {
	if s.Instance == "" {
		return ""
	}
	return fmt.Sprintf(" (it was of %s)", s.Instance)
}

// observe asks the cloud for our ENIs and their subnets.
func (p *Pool) observe(ctx context.Context, want poolWant, s state) (cloudView, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	view := cloudView{subnets: map[string]tencent.Subnet{}, now: time.Now()}
	enis, err := p.cloud.DescribeTaggedENIs(ctx, map[string]string{tagCluster: want.cluster, tagInstance: want.facts.InstanceID})
	if err != nil {
		return view, err
	}
	if !knowsAll(enis, s) {
		// Its tags may have been taken off: that is no reason to make another.
		attached, err := p.cloud.DescribeENIs(ctx, want.facts.InstanceID)
		if err != nil {
			return view, err
		}
		enis = append(enis, attached...)
	}
	view.enis = enis
	p.noteMissing(enis, s, view.now)
	view.missing = maps.Clone(p.missing)

	var unknown []string
	for _, e := range enis {
		if _, ok := p.subnets[e.SubnetID]; !ok && !slices.Contains(unknown, e.SubnetID) {
			unknown = append(unknown, e.SubnetID)
		}
	}
	if len(unknown) > 0 {
		subnets, err := p.cloud.DescribeSubnets(ctx, unknown)
		if err != nil {
			return view, err
		}
		for _, sn := range subnets {
			p.subnets[sn.ID] = sn
		}
	}
	maps.Copy(view.subnets, p.subnets)
	return view, nil
}

// knowsAll reports whether every ENI of the ledger is among enis.
func knowsAll(enis []tencent.ENI, s state) bool {
	for _, slot := range s.Slots {
		if slot.ENI != "" && !slices.ContainsFunc(enis, func(e tencent.ENI) bool { return e.ID == slot.ENI }) {
			return false
		}
	}
	return true
}

// noteMissing keeps since when ENIs of the ledger have not been seen. The caller
// holds mu.
func (p *Pool) noteMissing(enis []tencent.ENI, s state, now time.Time) {
	before := p.missing
	p.missing = map[string]time.Time{}
	for _, slot := range s.Slots {
		if slot.ENI == "" || slices.ContainsFunc(enis, func(e tencent.ENI) bool { return e.ID == slot.ENI }) {
			continue
		}
		p.missing[slot.ENI] = now
		if since, ok := before[slot.ENI]; ok {
			p.missing[slot.ENI] = since
		}
	}
}

// Apply carries the plan out.
func (p *Pool) Apply(ctx context.Context, plan node.Plan) error { return plan.Apply(ctx) }

// do journals the slot and then makes the step's call. A refusal takes the intent
// back; where nothing was heard, it stands, and later plans see what became of it.
func (p *Pool) do(ctx context.Context, want poolWant, st poolStep) error {
	slot := st.slot
	if err := p.network.ledger.record(record{Slot: &slot}); err != nil {
		return err
	}
	var err error
	switch st.call {
	case "":
		return nil
	case stepCreate:
		var made tencent.ENI
		if made, _, err = p.cloud.CreateENI(ctx, st.spec); err == nil {
			slot.ENI = made.ID
			return p.network.ledger.record(record{Slot: &slot})
		}
	case stepAttach:
		_, err = p.cloud.AttachENI(ctx, slot.ENI, want.facts.InstanceID, want.token(slot, stepAttach))
	case stepAssign:
		_, _, err = p.cloud.AssignIPs(ctx, slot.ENI, st.n, want.token(slot, stepAssign))
	}
	if refused(err) {
		slot.Intent, slot.Since, slot.Target = "", time.Time{}, 0
		return errors.Join(err, p.network.ledger.record(record{Slot: &slot}))
	}
	return err
}

// refused reports whether the cloud has said that a call has no effect.
func refused(err error) bool {
	e, ok := errors.AsType[*tencent.APIError](err)
	return ok && !e.HasCode(tencent.CodeIdempotentProcessing) && !e.HasCode("InternalError")
}
