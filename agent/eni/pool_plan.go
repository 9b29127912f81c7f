package eni

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// The tags of our ENIs.
const (
	tagCluster  = "tkenode-cluster"
	tagInstance = "tkenode-instance"
	tagSlot     = "tkenode-slot"
)

const (
	// maxBatch addresses can be asked for in one call.
	// Source: tencentcloud-sdk-go, vpc/v20170312, SecondaryPrivateIpAddressCount
	maxBatch = 10
	// patience is how long a call whose outcome is not visible is waited for
	// before it is made again with the same token. Attaching takes 10 s and more
	// in other clouds; no figure of Tencent's is published.
	patience = 30 * time.Second
)

// cloudView is what the cloud says of our ENIs.
type cloudView struct {
	enis    []tencent.ENI // tagged as ours, attached or not, and those the ledger knows
	subnets map[string]tencent.Subnet
	now     time.Time
	// missing is since when an ENI of the ledger has not been seen.
	missing map[string]time.Time
}

// poolWant is what the pool is to hold.
type poolWant struct {
	cluster string
	facts   node.Facts
	network node.NetworkConfig
}

func (w poolWant) tags(slot int) []tencent.Tag {
	return []tencent.Tag{
		{Key: tagCluster, Value: w.cluster},
		{Key: tagInstance, Value: w.facts.InstanceID},
		{Key: tagSlot, Value: strconv.Itoa(slot)},
	}
}

// token makes a call idempotent: the same step of the same ENI has the same one,
// also after a crash.
func (w poolWant) token(slot Slot, step Step) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s/%d/%d/%s/%d", w.facts.InstanceID, slot.Number, slot.Generation, step, slot.Calls))
	return "tkenode-" + hex.EncodeToString(sum[:16])
}

// poolStep is one change of the pool.
type poolStep struct {
	text string
	slot Slot // as it is to be in the ledger
	call Step // made after slot is in the ledger; empty: none
	spec tencent.ENISpec
	n    int // addresses to assign
}

// planPool returns what to do next, or what is waited for.
func planPool(want poolWant, s state, view cloudView) ([]poolStep, error) {
	var steps []poolStep
	var waiting error
	for number := range want.network.ENIs {
		slot, ok := s.Slots[number]
		if !ok {
			slot = Slot{Number: number}
		}
		more, err := planSlot(want, slot, view, usedBy(s, slot))
		steps = append(steps, more...)
		if waiting == nil {
			waiting = err
		}
	}
	if len(steps) > 0 {
		return steps, nil
	}
	return nil, waiting
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

// planSlot returns what to do next for one slot, or what it waits for.
func planSlot(want poolWant, slot Slot, view cloudView, pods []Pod) ([]poolStep, error) {
	eni, ok := view.find(slot)
	if !ok {
		return planAbsent(want, slot, view, pods)
	}
	switch {
	case eni.Attachment != nil && eni.Attachment.InstanceID != want.facts.InstanceID:
		return nil, node.Terminal("ENIElsewhere", "detach it there, or remove its tags and delete it",
			fmt.Errorf("%s of slot %d is attached to %s", eni.ID, slot.Number, eni.Attachment.InstanceID))
	case eni.State == tencent.StateAvailable && eni.Attachment == nil:
		if busy(slot, stepAttach, view.now) {
			return nil, node.Waiting("ENIAttaching", "%s has been attaching for %s", eni.ID, age(slot, view.now))
		}
		slot.ENI = eni.ID
		slot.intend(stepAttach, view.now)
		return []poolStep{{text: fmt.Sprintf("attach %s to slot %d", eni.ID, slot.Number), slot: slot, call: stepAttach}}, nil
	case !eni.AttachedTo(want.facts.InstanceID):
		return nil, node.Waiting("ENIChanging", "%s is %s", eni.ID, eni.State)
	}
	return planAttached(want, slot, eni, view)
}

// planAbsent deals with a slot whose ENI the cloud does not show.
func planAbsent(want poolWant, slot Slot, view cloudView, pods []Pod) ([]poolStep, error) {
	if slot.ENI != "" {
		gone := view.now.Sub(view.missing[slot.ENI])
		switch {
		case busy(slot, stepCreate, view.now):
			return nil, node.Waiting("ENICreating", "%s has been creating for %s", slot.ENI, age(slot, view.now))
		case gone < patience:
			return nil, node.Waiting("ENINotSeen", "the cloud has not shown %s of slot %d for %s", slot.ENI, slot.Number, gone.Round(time.Second))
		case len(pods) > 0:
			return nil, node.Terminal("ENILost", "drain the node, or attach the ENI again",
				fmt.Errorf("%s of slot %d is gone, and %d pods have its addresses, %s among them", slot.ENI, slot.Number, len(pods), pods[0]))
		}
		next := Slot{Number: slot.Number, Generation: slot.Generation + 1}
		return []poolStep{{text: fmt.Sprintf("give up %s of slot %d: the cloud does not know it", slot.ENI, slot.Number), slot: next}}, nil
	}
	if busy(slot, stepCreate, view.now) {
		return nil, node.Waiting("ENICreating", "an ENI for slot %d has been creating for %s", slot.Number, age(slot, view.now))
	}
	n := min(want.network.IPsPerENI, maxBatch)
	subnet := want.network.SubnetIDs[0]
	slot.intend(stepCreate, view.now)
	return []poolStep{{
		text: fmt.Sprintf("create an ENI for slot %d in %s with %d addresses", slot.Number, subnet, n),
		slot: slot,
		call: stepCreate,
		spec: tencent.ENISpec{
			VPCID:            want.facts.VPCID,
			SubnetID:         subnet,
			Name:             fmt.Sprintf("%s-%d", want.facts.InstanceID, slot.Number),
			Description:      "pods of " + want.cluster,
			SecondaryIPs:     n,
			SecurityGroupIDs: want.network.SecurityGroupIDs,
			Tags:             want.tags(slot.Number),
			ClientToken:      want.token(slot, stepCreate),
		},
	}}, nil
}

// planAttached takes over what the cloud says of an ENI that is in its slot, and
// gets addresses that it lacks.
func planAttached(want poolWant, slot Slot, eni tencent.ENI, view cloudView) ([]poolStep, error) {
	subnet, ok := view.subnets[eni.SubnetID]
	if !ok {
		return nil, node.Waiting("SubnetUnknown", "the cloud does not show %s, the subnet of %s", eni.SubnetID, eni.ID)
	}
	next := slot
	next.ENI, next.MAC, next.Subnet = eni.ID, strings.ToLower(eni.MAC), subnet.CIDR
	next.Addrs = nil
	pending := 0
	for _, ip := range eni.IPs {
		switch {
		case ip.Primary:
			next.Primary = ip.Addr
		case ip.State == tencent.StateAvailable:
			next.Addrs = append(next.Addrs, ip.Addr)
		default:
			pending++
		}
	}
	slices.SortFunc(next.Addrs, netip.Addr.Compare)
	if next.Intent != stepAssign || len(next.Addrs)+pending >= next.Target {
		next.Intent, next.Since, next.Target = "", time.Time{}, 0
	}
	var steps []poolStep
	for _, t := range changes(slot, next) {
		steps = append(steps, poolStep{text: t, slot: next})
	}
	lacking := want.network.IPsPerENI - len(next.Addrs) - pending
	switch {
	case lacking > 0 && busy(next, stepAssign, view.now):
		return steps, node.Waiting("AddressesAssigning", "addresses of %s have been assigning for %s", eni.ID, age(next, view.now))
	case lacking > 0:
		n := min(lacking, maxBatch)
		next.intend(stepAssign, view.now)
		next.Target = len(next.Addrs) + pending + n
		return append(steps, poolStep{text: fmt.Sprintf("assign %d addresses to %s", n, eni.ID), slot: next, call: stepAssign, n: n}), nil
	case pending > 0:
		return steps, node.Waiting("AddressesPending", "%d addresses of %s are not AVAILABLE yet", pending, eni.ID)
	}
	return steps, nil
}

// changes says what the pool learns.
func changes(before, after Slot) []string {
	var out []string
	if before.ENI != after.ENI || before.MAC != after.MAC || before.Primary != after.Primary || before.Subnet != after.Subnet {
		out = append(out, fmt.Sprintf("take %s into slot %d: mac %s primary %s subnet %s", after.ENI, after.Number, after.MAC, after.Primary, after.Subnet))
	}
	for _, a := range after.Addrs {
		if !slices.Contains(before.Addrs, a) {
			out = append(out, fmt.Sprintf("use address %s of %s", a, after.ENI))
		}
	}
	for _, a := range before.Addrs {
		if !slices.Contains(after.Addrs, a) {
			out = append(out, fmt.Sprintf("stop using address %s of %s: the cloud does not have it", a, after.ENI))
		}
	}
	if len(out) == 0 && before.Intent != after.Intent {
		out = append(out, fmt.Sprintf("note that the %s of %s is done", before.Intent, after.ENI))
	}
	return out
}

// intend records that a call is about to be made. Every call has a token of its
// own, but for a creation that is repeated because nothing was heard of it: that
// must not make a second ENI.
func (s *Slot) intend(step Step, now time.Time) {
	if step != stepCreate || s.Intent != stepCreate {
		s.Calls++
	}
	s.Intent, s.Since = step, now.UTC().Truncate(time.Second)
}

// find returns the ENI of a slot: the one the ledger names, or else one that
// carries the slot's tag, which a crash may have left.
func (v cloudView) find(slot Slot) (tencent.ENI, bool) {
	for _, e := range v.enis {
		if !e.Primary && e.ID == slot.ENI {
			return e, true
		}
	}
	for _, e := range v.enis {
		if slot.ENI == "" && !e.Primary && e.State != tencent.StateDeleting &&
			slices.Contains(e.Tags, tencent.Tag{Key: tagSlot, Value: strconv.Itoa(slot.Number)}) {
			return e, true
		}
	}
	return tencent.ENI{}, false
}

// busy reports whether the call is under way and young.
func busy(slot Slot, step Step, now time.Time) bool {
	return slot.Intent == step && now.Sub(slot.Since) < patience
}

func age(slot Slot, now time.Time) time.Duration { return now.Sub(slot.Since).Round(time.Second) }
