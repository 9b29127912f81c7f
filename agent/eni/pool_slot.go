package eni

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// slotPlan is how one slot stands, and what is to be done for it.
type slotPlan struct {
	slot  Slot // as the ledger will have it after steps
	eni   tencent.ENI
	steps []poolStep
	wait  error // what is waited for
	grave error // what the condition says whatever else there is

	ready bool // attached, and no call on it is under way
	// Addresses for pods: on the ENI; of these with a pod, without one, and without
	// one and resting; asked for and not usable yet.
	bound, used, cooling, coming int
	settling                     int // of those that rest, for the rebuilt ledger's sake alone: so would any other
	free                         []netip.Addr
	gone                         int // pods whose address the ENI does not have

	six sixPlan
}

// empty reports whether an ENI can be put into the slot.
func (p *slotPlan) empty() bool {
	return p.slot.ENI == "" && p.eni.ID == "" && p.slot.Intent == "" && len(p.steps) == 0
}

// held reports whether the slot has an ENI, or is getting one.
func (p *slotPlan) held() bool { return !p.empty() && !p.retiring() }

// late reports whether a call has not been seen to end for so long that nothing is
// expected of it.
func (p *slotPlan) late(now time.Time) bool {
	return p.slot.Intent != "" && !busy(p.slot, p.slot.Intent, now)
}

// retiring reports whether the slot's ENI is being given up.
func (p *slotPlan) retiring() bool { return p.slot.Intent == stepDetach || p.slot.Intent == stepDelete }

// planSlot takes over what the cloud says of one slot, and brings a call to its
// end whose outcome is not known.
func planSlot(want poolWant, s state, view cloudView, slot Slot, eni tencent.ENI, seen bool) slotPlan {
	p := slotPlan{slot: slot, eni: eni}
	pods := usedBy(s, slot)
	if want.observes() { // whatever was begun is somebody else's to end
		slot.Intent, slot.Since, slot.Target, slot.SubnetID, slot.Leaving = "", time.Time{}, 0, "", nil
		p.slot = slot
	}
	switch {
	case !seen:
		p.absent(want, view, pods)
	case eni.Attachment != nil && !want.here(eni):
		p.grave = node.Terminal("ENIElsewhere", "detach it there, or remove its tags and delete it",
			fmt.Errorf("%s of slot %d is attached to %s", eni.ID, slot.Number, eni.Attachment.InstanceID))
	case eni.State == tencent.StateAvailable && eni.Attachment == nil:
		p.detached(want, s, view)
	case !eni.AttachedTo(want.facts.InstanceID):
		p.coming = secondaries(eni)
		if p.retiring() || eni.State == tencent.StateDetaching || eni.State == tencent.StateDeleting {
			p.coming = 0
		}
		p.wait = node.Waiting("ENIChanging", "%s is %s%s", eni.ID, eni.State, p.during(view.now))
	case p.retiring() && busy(slot, slot.Intent, view.now):
		p.wait = node.Waiting("ENIDetaching", "%s has been detaching for %s", eni.ID, age(slot, view.now))
	case slot.Intent == stepDetach:
		if p.wait = view.refusal(p.key(), throttleKey(stepDetach)); p.wait == nil {
			p.detach(view.now)
		}
	default:
		p.attached(want, s, view, pods)
	}
	return p
}

// during says for how long a call has been under way.
func (p *slotPlan) during(now time.Time) string {
	if p.slot.Intent == "" {
		return ""
	}
	return fmt.Sprintf(" (%s asked for %s ago)", p.slot.Intent, age(p.slot, now))
}

// secondaries counts the addresses for pods.
func secondaries(e tencent.ENI) (n int) {
	for _, ip := range e.IPs {
		if !ip.Primary {
			n++
		}
	}
	return n
}

// usedBy returns the pods that have addresses of the slot's ENI.
func usedBy(s state, slot Slot) (pods []Pod) {
	for _, p := range s.pods() {
		if p.ENI == slot.ENI {
			pods = append(pods, p)
		}
	}
	return pods
}

// absent deals with a slot whose ENI the cloud does not show.
func (p *slotPlan) absent(want poolWant, view cloudView, pods []Pod) {
	slot := p.slot
	next := Slot{Number: slot.Number, Generation: slot.Generation + 1}
	gone := view.now.Sub(view.missing[slot.ENI])
	switch {
	case slot.ENI == "" && slot.Intent == "":
	case slot.ENI == "" && busy(slot, stepCreate, view.now):
		p.coming = slot.Target
		p.wait = node.Waiting("ENICreating", "an ENI for slot %d has been creating for %s", slot.Number, age(slot, view.now))
	case slot.ENI == "":
		if p.wait = view.refusal(p.key(), throttleKey(stepCreate)); p.wait == nil {
			p.create(want, slot.SubnetID, slot.Target, view.now, false)
		}
	case busy(slot, stepCreate, view.now):
		p.coming = slot.Target
		p.wait = node.Waiting("ENICreating", "%s has been creating for %s", slot.ENI, age(slot, view.now))
	case slot.Intent == stepDelete:
		p.steps = []poolStep{{text: fmt.Sprintf("free slot %d: %s is deleted", slot.Number, slot.ENI), slot: next}}
		p.slot = next
	case gone < patience:
		p.wait = node.Waiting("ENINotSeen", "the cloud has not shown %s of slot %d for %s", slot.ENI, slot.Number, gone.Round(time.Second))
	case len(pods) > 0:
		p.grave = node.Terminal("ENILost", "drain the node, or attach the ENI again",
			fmt.Errorf("%s of slot %d is gone, and %d pods have its addresses, %s among them", slot.ENI, slot.Number, len(pods), pods[0]))
	default:
		p.steps = []poolStep{{text: fmt.Sprintf("give up %s of slot %d: the cloud does not know it", slot.ENI, slot.Number), slot: next}}
		p.slot = next
	}
}

// detached deals with an ENI that no instance has.
func (p *slotPlan) detached(want poolWant, s state, view cloudView) {
	slot := p.slot
	step := stepAttach
	if p.retiring() {
		step = stepDelete
	}
	p.coming = secondaries(p.eni)
	if step == stepDelete {
		p.coming = 0
	}
	p.tornOut(usedBy(s, slot))
	why, failed := view.failed[p.eni.ID]
	switch err := view.refusal(p.key(), throttleKey(step)); {
	case err != nil:
		p.wait = err
	case failed && slot.Intent == stepCreate: // once: a second failure is waited out
		p.attach(p.eni, view.now, false)
		p.steps[0].text += fmt.Sprintf(", which its creation has failed to do: %.200q", why)
	case busy(slot, stepAttach, view.now) || busy(slot, stepCreate, view.now): // a creation attaches, too
		p.wait = node.Waiting("ENIAttaching", "%s has been attaching for %s", p.eni.ID, age(slot, view.now))
	case step == stepAttach:
		p.attach(p.eni, view.now, false)
	case busy(slot, stepDelete, view.now):
		p.wait = node.Waiting("ENIDeleting", "%s has been deleting for %s", p.eni.ID, age(slot, view.now))
	case !want.owns(p.eni):
		next := Slot{Number: slot.Number, Generation: slot.Generation + 1}
		p.steps = []poolStep{{text: fmt.Sprintf("free slot %d: %s is detached and does not carry our tags", slot.Number, slot.ENI), slot: next}}
		p.slot = next
	default:
		p.remove("it is detached and not needed", view.now)
	}
}

// attached takes over what the cloud says of an ENI that is in its slot.
func (p *slotPlan) attached(want poolWant, s state, view cloudView, pods []Pod) {
	eni, before := p.eni, p.slot
	subnet, ok := view.subnets[eni.SubnetID]
	if !ok {
		p.wait = node.Waiting("SubnetUnknown", "the cloud does not show %s, the subnet of %s", eni.SubnetID, eni.ID)
		return
	}
	next := &p.slot
	next.ENI, next.MAC, next.Subnet = eni.ID, strings.ToLower(eni.MAC), subnet.CIDR
	next.Addrs, next.Leaving = nil, nil
	next.regroup(eni)
	pending := 0
	states := map[netip.Addr]string{}
	for _, ip := range eni.IPs {
		states[ip.Addr] = ip.State
		switch {
		case ip.Primary:
			next.Primary = ip.Addr
			if !next.exclusive() {
				break
			}
			if ip.State == tencent.StateAvailable {
				next.Addrs = append(next.Addrs, ip.Addr)
			} else {
				pending++
			}
		case slices.Contains(before.Leaving, ip.Addr):
			next.Leaving = append(next.Leaving, ip.Addr)
		case ip.State == tencent.StateAvailable:
			next.Addrs = append(next.Addrs, ip.Addr)
		default:
			pending++
		}
	}
	p.bound = len(next.Addrs) + len(next.Leaving) + pending
	p.learn6(want, s, before, subnet, view.now, pods, states)
	slices.SortFunc(next.Addrs, netip.Addr.Compare)
	slices.SortFunc(next.Leaving, netip.Addr.Compare)
	p.settle(view)
	for _, t := range changes(before, *next, states) {
		p.steps = append(p.steps, poolStep{text: t, slot: *next})
	}
	if a := next.Primary6; slices.Contains(before.Addrs6, a) {
		p.steps[0].addrs = []netip.Addr{a} // no pod may have got it meanwhile
	}
	p.count(s, view.now, pods, states)
	p.count6(s, view.now, pods, states)
	switch {
	case next.Intent == stepAssign || next.Intent == stepAssign6:
		p.wait = node.Waiting("AddressesAssigning", "addresses of %s have been assigning for %s", eni.ID, age(*next, view.now))
	case next.gives() && busy(*next, next.Intent, view.now):
		// Nobody waits for it.
	case next.gives():
		if view.refusal(p.key(), throttleKey(next.Intent)) == nil {
			p.callUnassign(next.Intent, next.Leaving, nil, view.now)
		}
	case pending+p.six.pending > 0:
		p.wait = node.Waiting("AddressesPending", "%d addresses of %s are not AVAILABLE yet", pending+p.six.pending, eni.ID)
	default:
		p.ready = true
	}
	p.coming += pending
}

// settle ends the intent of an attached ENI once its outcome is seen, or once
// nothing is to be expected of it.
func (p *slotPlan) settle(view cloudView) {
	slot := &p.slot
	have := p.bound - len(slot.Leaving)
	switch {
	case slot.gives() && len(slot.Leaving) > 0:
		return
	case slot.Intent == stepAssign6 && p.six.bound < slot.Target && busy(*slot, stepAssign6, view.now):
		return
	case slot.Intent == stepAssign && have < slot.Target && busy(*slot, stepAssign, view.now):
		p.coming = slot.Target - have
		return
	}
	slot.Intent, slot.Since, slot.Target, slot.SubnetID, slot.Task = "", time.Time{}, 0, "", ""
}

// count counts addresses, and says which pods have lost theirs.
func (p *slotPlan) count(s state, now time.Time, pods []Pod, states map[netip.Addr]string) {
	has := map[netip.Addr]bool{}
	for _, pod := range pods {
		has[pod.Addr] = true
		if slices.Contains(p.slot.Addrs, pod.Addr) {
			continue
		}
		if p.gone++; p.gone > 1 {
			continue
		}
		p.grave = p.addressGone(pod, pod.Addr, states)
	}
	for _, a := range p.slot.Addrs {
		switch {
		case has[a]:
			p.used++
		case s.Rested[a].After(now):
			p.cooling++
		case s.Settled.After(now):
			p.cooling++
			p.settling++
		default:
			p.free = append(p.free, a)
		}
	}
}

func (p *slotPlan) addressGone(pod Pod, addr netip.Addr, states map[netip.Addr]string) error {
	return waitingFor("AddressGone", "delete the pod: its next one gets another address",
		"%s of pod %s is no longer an address of %s: the cloud %s", addr, pod, p.slot.ENI, cloudSays(states[addr]))
}

// cloudSays says what the cloud says of an address that may not be used.
func cloudSays(state string) string {
	if state == "" {
		return "does not have it"
	}
	return "says " + state
}

// changes says what the pool learns.
func changes(before, after Slot, states map[netip.Addr]string) []string {
	have := len(after.Addrs)
	if before.Intent == stepAssign6 {
		have = after.count6()
	}
	var out []string
	if before.ENI != after.ENI || before.MAC != after.MAC || before.Primary != after.Primary || before.Subnet != after.Subnet {
		out = append(out, fmt.Sprintf("take %s into slot %d: mac %s primary %s subnet %s", after.ENI, after.Number, after.MAC, after.Primary, after.Subnet))
	}
	if !slices.Equal(before.Groups, after.Groups) {
		out = append(out, fmt.Sprintf("note that %s has security groups %s", after.ENI, strings.Join(after.Groups, ", ")))
	}
	if before.Primary6 != after.Primary6 || before.Subnet6 != after.Subnet6 {
		out = append(out, changes6(after))
	}
	for _, a := range after.addrs() {
		if !slices.Contains(before.addrs(), a) {
			out = append(out, fmt.Sprintf("use address %s of %s", a, after.ENI))
		}
	}
	for _, a := range before.addrs() {
		if !slices.Contains(after.addrs(), a) && a != after.Primary6 && (a.Is4() || after.Primary6.IsValid() || after.exclusive()) {
			out = append(out, fmt.Sprintf("stop using address %s of %s: the cloud %s", a, after.ENI, cloudSays(states[a])))
		}
	}
	switch {
	case len(out) > 0 || before.Intent == after.Intent:
	case (before.Intent == stepAssign || before.Intent == stepAssign6) && have < before.Target:
		out = append(out, fmt.Sprintf("expect no more of the %s of %s: it has %d addresses, not %d", before.Intent, after.ENI, have, before.Target))
	default:
		out = append(out, fmt.Sprintf("note that the %s of %s is done", before.Intent, after.ENI))
	}
	return out
}

// The calls: each is an intent in the ledger before it is made.

func (p *slotPlan) create(want poolWant, subnet string, n int, now time.Time, spared bool) {
	p.slot.intend(stepCreate, now)
	p.slot.SubnetID, p.slot.Target = subnet, n
	p.coming = n
	what, groups := fmt.Sprintf("%d addresses", n), want.network.SecurityGroupIDs
	if p.slot.exclusive() {
		what, groups = "security groups "+strings.Join(p.slot.Groups, ", "), p.slot.Groups
	}
	p.steps = append(p.steps, poolStep{
		text: fmt.Sprintf("create an ENI in slot %d from %s with %s", p.slot.Number, subnet, what),
		slot: p.slot, call: stepCreate, subnet: subnet, spared: spared || p.slot.exclusive(),
		spec: tencent.ENISpec{
			VPCID:            want.facts.VPCID,
			SubnetID:         subnet,
			Name:             fmt.Sprintf("%s-%d", want.facts.InstanceID, p.slot.Number),
			Description:      "pods of " + want.cluster,
			SecondaryIPs:     n,
			SecurityGroupIDs: groups,
			Tags:             want.tags(p.slot.Number),
			InstanceID:       want.facts.InstanceID,
			AttachType:       p.slot.AttachType,
			ClientToken:      want.token(p.slot, stepCreate),
		},
	})
}

func (p *slotPlan) attach(e tencent.ENI, now time.Time, spared bool) {
	p.eni, p.slot.ENI = e, e.ID
	p.slot.intend(stepAttach, now)
	p.slot.SubnetID, p.slot.Target = "", 0
	p.coming = secondaries(e)
	p.steps = append(p.steps, poolStep{
		text: fmt.Sprintf("attach %s to slot %d", e.ID, p.slot.Number), slot: p.slot, call: stepAttach, spared: spared || p.slot.exclusive(),
	})
}

func (p *slotPlan) assign(n int, now time.Time, spared bool) {
	p.slot.intend(stepAssign, now)
	p.slot.Target = p.bound + n
	p.coming += n
	p.ready = false
	p.steps = append(p.steps, poolStep{
		text: fmt.Sprintf("assign %d addresses to %s", n, p.eni.ID),
		slot: p.slot, call: stepAssign, subnet: p.eni.SubnetID, n: n, spared: spared,
	})
}

// unassign gives back the highest address that is free.
func (p *slotPlan) unassign(now time.Time) {
	addr := p.free[len(p.free)-1]
	p.slot.Addrs = slices.DeleteFunc(slices.Clone(p.slot.Addrs), func(a netip.Addr) bool { return a == addr })
	p.callUnassign(stepUnassign, []netip.Addr{addr}, []netip.Addr{addr}, now)
}

// callUnassign has addresses given back, those among them that the ledger still
// has for pods being withdrawn first.
func (p *slotPlan) callUnassign(call Step, addrs, withdrawn []netip.Addr, now time.Time) {
	p.slot.intend(call, now)
	p.slot.Leaving = addrs
	p.ready = false
	p.steps = append(p.steps, poolStep{
		text: fmt.Sprintf("unassign %s from %s", listed(addrs), p.eni.ID), slot: p.slot, call: call, addrs: withdrawn, spared: true,
	})
}

// detach begins to give the ENI up: from here on it is in no path of the kernel.
func (p *slotPlan) detach(now time.Time) {
	addrs := p.slot.addrs()
	p.slot.Subnet6, p.slot.Primary6, p.slot.Addrs6 = netip.Prefix{}, netip.Addr{}, nil
	p.slot.MAC, p.slot.Subnet, p.slot.Primary, p.slot.Addrs, p.slot.Leaving = "", netip.Prefix{}, netip.Addr{}, nil, nil
	p.slot.intend(stepDetach, now)
	p.ready = false
	p.steps = append(p.steps, poolStep{
		text: fmt.Sprintf("detach %s from slot %d: no pod needs it", p.eni.ID, p.slot.Number),
		slot: p.slot, call: stepDetach, addrs: addrs, spared: true,
	})
}

func (p *slotPlan) remove(why string, now time.Time) {
	p.slot.intend(stepDelete, now)
	p.steps = append(p.steps, poolStep{
		text: fmt.Sprintf("delete %s: %s", p.slot.ENI, why), slot: p.slot, call: stepDelete, spared: true,
	})
}

// intend records that a call is about to be made. Every call has a token of its
// own, but for a creation that is repeated because nothing was heard of it: that
// must not make a second ENI.
func (s *Slot) intend(step Step, now time.Time) {
	if step != stepCreate || s.Intent != stepCreate {
		s.Calls++
	}
	s.Intent, s.Since, s.Task = step, now.UTC().Truncate(time.Second), ""
}

// busy reports whether the call is under way and young.
func busy(slot Slot, step Step, now time.Time) bool {
	return slot.Intent == step && now.Sub(slot.Since) < patience
}

func age(slot Slot, now time.Time) time.Duration { return now.Sub(slot.Since).Round(time.Second) }
