package eni

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// balance weighs what the slots have against what is wanted.
type balance struct {
	want  poolWant
	state state
	view  cloudView
	slots []slotPlan // whose addresses pods share
	whole []slotPlan // that pods get whole
	spare []tencent.ENI

	out poolPlan
}

func (b *balance) plan() poolPlan {
	wait := b.waits()
	free := b.sum((*slotPlan).pairs)
	coming := b.sum(func(p *slotPlan) int {
		coming := p.settling
		if !b.want.observes() {
			coming += p.unpaired()
		}
		if !p.late(b.view.now) {
			coming += p.coming
		}
		if p.six.missing != nil { // they will never do
			return 0
		}
		return coming
	})
	warm := b.want.network.WarmIPs
	lack := 0
	if b.view.waiting+warm.Min > free+coming {
		lack = b.view.waiting + warm.Max - free - coming
	}
	if b.count((*slotPlan).held) == 0 {
		lack = max(lack, 1) // an ENI, for the node to be ready
	}
	var blocked, unpaired error
	if !b.want.observes() {
		unpaired = b.pair(free > 0)
	}
	switch {
	case b.want.observes():
		blocked = b.unserved(lack)
	case lack > 0:
		blocked = b.without6(b.grow(lack, free > 0))
	default:
		b.shrink(free)
	}
	b.giveWhole()
	b.reap()
	b.out.note = cmp.Or(unpaired, blocked, wait)
	for _, p := range slices.Concat(b.slots, b.whole) {
		b.out.steps = append(b.out.steps, p.steps...)
	}
	verdict := b.verdict(free)
	if len(b.out.steps) == 0 {
		b.out.err = verdict
	}
	b.out.serving = free > 0 && verdict == nil
	return b.out
}

// waits returns what the first slot waits for.
func (b *balance) waits() (first error) {
	for _, p := range b.slots {
		first = cmp.Or(first, p.wait)
		b.look(p.wait)
		if p.slot.Intent != "" || p.wait != nil {
			b.lookIn(pollPeriod)
		}
	}
	return first
}

func (b *balance) sum(f func(*slotPlan) int) (n int) {
	for i := range b.slots {
		n += f(&b.slots[i])
	}
	return n
}

// verdict returns what the condition says. A pool that has free addresses serves
// pods, whatever is under way; one whose addresses are all in use has done what
// it can.
func (b *balance) verdict(free int) error {
	for _, p := range slices.Concat(b.slots, b.whole) {
		if p.grave != nil {
			return p.grave
		}
	}
	if free > 0 || b.view.waiting == 0 && node.ReasonOf(b.out.note, "") == "QuotaReached" {
		return nil
	}
	return b.out.note
}

// unserved is why an observed pool gets no more addresses.
func (b *balance) unserved(lack int) error {
	switch {
	case b.count((*slotPlan).held) == 0:
		return waitingFor("ENINotAttached", "network.allocator is observe: have an ENI attached, or set it to node",
			"no secondary ENI is attached to %s", b.want.facts.InstanceID)
	case lack > 0:
		what := "addresses"
		if b.sum((*slotPlan).unpaired) >= lack {
			what = "IPv6 addresses"
		}
		return waitingFor("AddressesNotAssigned", "network.allocator is observe: have addresses assigned, or set it to node",
			"%d more %s are wanted", lack, what)
	}
	return nil
}

func waitingFor(reason, fix, format string, args ...any) error {
	return &node.Error{Class: node.ClassWaiting, Reason: reason, Fix: fix, Err: fmt.Errorf(format, args...)}
}

// grow gets more addresses: first on the ENIs that have most pods, so that the
// others can be given up one day, then with more ENIs. It returns what is in the way.
func (b *balance) grow(lack int, spared bool) error {
	enis, ips := b.want.bounds(b.state.Quota)
	var blocked error
	order := make([]*slotPlan, len(b.slots))
	for i := range b.slots {
		order[i] = &b.slots[i]
	}
	slices.SortStableFunc(order, func(x, y *slotPlan) int { return cmp.Compare(y.used, x.used) })
	for _, p := range order {
		room := ips - p.bound - p.coming
		if p.slot.ENI == "" && p.eni.ID == "" || p.retiring() || p.six.missing != nil || room <= 0 || lack <= 0 || !p.ready && (p.grave != nil || p.late(b.view.now)) {
			continue
		}
		err := b.view.refusal(p.key(), throttleKey(stepAssign), subnetKey(p.eni.SubnetID))
		switch {
		case err != nil:
			blocked = cmp.Or(blocked, err)
		case !p.ready:
			lack -= room // when it is
		default:
			n := min(lack, room, maxBatch)
			lack -= n
			p.assign(n, b.view.now, spared)
		}
	}
	for lack > 0 && b.count(func(p *slotPlan) bool { return !p.empty() }) < enis {
		n, err := b.addENI(min(lack, ips, maxBatch), spared)
		if err != nil {
			return cmp.Or(blocked, err)
		}
		lack -= n
	}
	b.look(blocked)
	switch {
	case lack <= 0:
		return nil
	case blocked != nil:
		return blocked
	case b.count((*slotPlan).retiring) > 0:
		return node.Waiting("ENIDetaching", "an ENI is being given up, then there is room for another one")
	case b.count(func(p *slotPlan) bool {
		return p.slot.Intent != "" || p.wait != nil || p.grave != nil || len(p.steps) > 0
	}) > 0:
		return nil // what is under way may be more than it has said
	}
	return waitingFor("QuotaReached", "raise network.enis or network.ipsPerENI, or take a larger instance type",
		"%d ENIs of %d addresses are all that %s may have (its quota is %d of %d, the primary ones included)",
		enis, ips, b.want.facts.InstanceID, b.state.Quota.ENIs, b.state.Quota.IPsPerENI)
}

// count is how many slots are so.
func (b *balance) count(so func(*slotPlan) bool) (n int) {
	for i := range b.slots {
		if so(&b.slots[i]) {
			n++
		}
	}
	return n
}

// addENI attaches a spare ENI, or creates one with n addresses, and returns how
// many addresses come with it.
func (b *balance) addENI(n int, spared bool) (int, error) {
	i := b.emptySlot()
	if i < 0 {
		return 0, node.Waiting("ENIDetaching", "every slot has an ENI that is being given up")
	}
	p := &b.slots[i]
	if s := slices.IndexFunc(b.spare, shared); s >= 0 {
		e := b.spare[s]
		if e.State != tencent.StateAvailable {
			b.lookIn(pollPeriod)
			return 0, node.Waiting("ENIChanging", "%s is %s", e.ID, e.State)
		}
		if err := b.view.refusal(p.key(), throttleKey(stepAttach)); err != nil {
			b.look(err)
			return 0, err
		}
		b.spare = slices.Delete(slices.Clone(b.spare), s, s+1)
		p.attach(e, b.view.now, spared)
		return max(p.coming, 1), nil
	}
	if err := b.view.refusal(p.key(), throttleKey(stepCreate)); err != nil {
		b.look(err)
		return 0, err
	}
	subnet, n, err := b.pickSubnet(n)
	if err != nil {
		b.look(err)
		return 0, err
	}
	p.create(b.want, subnet, n, b.view.now, spared)
	return n, nil
}

// emptySlot returns the index of the lowest slot that is empty, or -1.
func (b *balance) emptySlot() int {
	number := 0
	for ; number < maxSlots; number++ {
		if b.state.awaits(number) {
			continue
		}
		i := slices.IndexFunc(b.slots, func(p slotPlan) bool { return p.slot.Number == number })
		if i < 0 {
			break
		}
		if b.slots[i].empty() {
			return i
		}
	}
	if number == maxSlots {
		return -1
	}
	b.slots = append(b.slots, slotPlan{slot: Slot{Number: number}})
	return len(b.slots) - 1
}

// pickSubnet returns the first subnet that has free addresses, and how many of n.
func (b *balance) pickSubnet(n int) (string, int, error) {
	var blocked error
	for _, id := range b.want.network.SubnetIDs {
		sn, known := b.view.subnets[id]
		switch err := b.view.refusal(subnetKey(id)); {
		case err != nil:
			blocked = cmp.Or(blocked, err)
		case known && sn.Zone != "" && b.want.facts.Zone != "" && sn.Zone != b.want.facts.Zone:
			blocked = cmp.Or(blocked, node.Terminal("SubnetElsewhere", "write subnets of the instance's zone into network.subnetIDs",
				fmt.Errorf("%s is in %s, %s in %s", id, sn.Zone, b.want.facts.InstanceID, b.want.facts.Zone)))
		case known && b.want.network.DualStack() && !sn.CIDR6.IsValid():
			blocked = cmp.Or(blocked, noIPv6(id))
		case known: // one address is the ENI's own
			return id, min(n, max(sn.AvailableIPs-1, 1)), nil
		default:
			return id, n, nil
		}
	}
	return "", 0, blocked
}

// shrink gives back what has been too much for long enough: a whole ENI, or one
// address of the ENI that has the fewest pods.
func (b *balance) shrink(free int) {
	most := b.want.network.WarmIPs.Max
	b.out.excess = free > most
	quiet := b.count(func(p *slotPlan) bool { return p.held() && !p.ready }) == 0
	for i := range b.slots {
		p := &b.slots[i]
		if !p.ready || p.used+p.cooling+p.six.cooling+p.gone > 0 || b.count((*slotPlan).held) < 2 || free-p.pairs() < most || !b.want.owns(p.eni) {
			continue
		}
		b.out.idle = append(b.out.idle, p.eni.ID)
		if since, ok := b.view.idle[p.eni.ID]; ok && quiet && b.due(since, idlePeriod) && b.may(p, stepDetach) {
			p.detach(b.view.now)
			return
		} else if !ok {
			b.lookIn(idlePeriod)
		}
	}
	if quiet {
		b.unpair()
	}
	if !b.out.excess {
		return
	}
	if b.view.excess.IsZero() {
		b.lookIn(releasePeriod)
		return
	}
	var least *slotPlan
	for i := range b.slots {
		if p := &b.slots[i]; p.ready && len(p.free) > 0 && b.want.owns(p.eni) && (least == nil || p.used <= least.used) {
			least = p
		}
	}
	if least != nil && quiet && b.due(b.view.excess, releasePeriod) && b.may(least, stepUnassign) {
		least.unassign(b.view.now)
	}
}

// due reports whether a period is over, or looks again when it is.
func (b *balance) due(since time.Time, period time.Duration) bool {
	left := period - b.view.now.Sub(since)
	if left > 0 {
		b.lookIn(left)
	}
	return left <= 0
}

// may reports whether nothing holds up a call.
func (b *balance) may(p *slotPlan, step Step) bool {
	err := b.view.refusal(p.key(), throttleKey(step))
	b.look(err)
	return err == nil
}

// reap takes an ENI of ours that has been detached and in no slot for long into a
// slot, from which it is deleted.
func (b *balance) reap() {
	for _, e := range b.spare {
		b.out.spare = append(b.out.spare, e.ID)
		since, ok := b.view.spare[e.ID]
		if !ok || e.State != tencent.StateAvailable || !b.due(since, reapAge) {
			continue
		}
		i := b.emptySlot()
		if i < 0 || !b.may(&b.slots[i], stepDelete) {
			return
		}
		b.slots[i].slot.ENI = e.ID
		b.slots[i].remove(fmt.Sprintf("it has been detached and in no slot for %s", b.view.now.Sub(since).Round(time.Second)), b.view.now)
	}
}

// look plans again when the hold that is in the way ends.
func (b *balance) look(err error) {
	if h, ok := holdIn(err); ok {
		b.lookIn(max(h.until.Sub(b.view.now), pollPeriod))
	}
}

func (b *balance) lookIn(d time.Duration) {
	if b.out.again == 0 || d < b.out.again {
		b.out.again = d
	}
}
