package eni

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
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
	// before it is made again. Attaching takes 10 s and more in other clouds; no
	// figure of Tencent's is published.
	patience = 30 * time.Second
	// releasePeriod is how long there are more free addresses than the warm maximum
	// before one is given back, and then the next: TKE's pace.
	// Source: https://cloud.tencent.com/document/product/457/38971
	releasePeriod = 2 * time.Minute
	// idlePeriod is how long an ENI is needed by no pod and by no warm address
	// before it is given up. To have it again takes 10 s, and a call of a quota that
	// the whole account shares.
	idlePeriod = 10 * time.Minute
	// reapAge is how long a detached ENI of ours is in no slot before it is deleted.
	// It may be one that another life of this ledger has just created.
	reapAge = 10 * time.Minute
)

// cloudView is what the cloud says of our ENIs, and what the pool remembers.
type cloudView struct {
	enis    []tencent.ENI // those that may be in slots, attached or not
	subnets map[string]tencent.Subnet
	now     time.Time
	waiting int        // ADDs that wait for an address
	wanted  [][]string // security groups of the ENIs that ADDs wait for whole

	missing map[string]time.Time // since when an ENI of the ledger has not been seen
	idle    map[string]time.Time // since when an attached ENI has not been needed
	spare   map[string]time.Time // since when an ENI of ours is in no slot
	excess  time.Time            // since when there are more free addresses than wanted, or the last was given back
	holds   map[string]hold

	failed map[string]string // ENIs that their creation has not attached, and why
}

// poolWant is what the pool is to hold.
type poolWant struct {
	cluster string
	facts   node.Facts
	network node.NetworkConfig
	// rebuilt is when the ledger was rebuilt, zero if never. It had counted the calls:
	// a number may have been another call's.
	rebuilt time.Time
}

// observes reports whether somebody else attaches ENIs.
func (w poolWant) observes() bool { return w.network.Allocator == node.AllocatorObserve }

func (w poolWant) tags(slot int) []tencent.Tag {
	return []tencent.Tag{
		{Key: tagCluster, Value: w.cluster},
		{Key: tagInstance, Value: w.facts.InstanceID},
		{Key: tagSlot, Value: strconv.Itoa(slot)},
	}
}

// owns reports whether the tags say that the ENI is ours.
func (w poolWant) owns(e tencent.ENI) bool {
	return slices.Contains(e.Tags, tencent.Tag{Key: tagCluster, Value: w.cluster}) &&
		slices.Contains(e.Tags, tencent.Tag{Key: tagInstance, Value: w.facts.InstanceID})
}

// here reports whether the ENI is, or is becoming, one of this instance.
func (w poolWant) here(e tencent.ENI) bool {
	return e.Attachment != nil && e.Attachment.InstanceID == w.facts.InstanceID
}

// bounds returns how many secondary ENIs there may be, and how many addresses for
// pods on each: the quota without the primary ones, and what the configuration says.
func (w poolWant) bounds(q tencent.ENILimit) (enis, ips int) {
	shared, _ := w.network.ShareENIs(q.ENIs, q.ExtendENIs)
	enis, ips = min(shared, maxSlots), q.IPsPerENI-1
	if n := w.network.ENIs; n > 0 {
		enis = min(enis, n)
	}
	if n := w.network.IPsPerENI; n > 0 {
		ips = min(ips, n)
	}
	return max(enis, 0), max(ips, 0)
}

// token makes a call idempotent: the same step of the same ENI has the same one,
// also after a crash.
func (w poolWant) token(slot Slot, step Step) string {
	text := fmt.Appendf(nil, "%s/%d/%d/%s/%d", w.facts.InstanceID, slot.Number, slot.Generation, step, slot.Calls)
	if !w.rebuilt.IsZero() {
		text = fmt.Appendf(text, "/%d", w.rebuilt.Unix())
	}
	sum := sha256.Sum256(text)
	return "tkenode-" + hex.EncodeToString(sum[:16])
}

// poolStep is one change of the pool.
type poolStep struct {
	text   string
	slot   Slot // as it is to be in the ledger
	call   Step // made after slot is in the ledger; empty: none
	spec   tencent.ENISpec
	subnet string       // that the call takes addresses of
	n      int          // addresses to assign
	addrs  []netip.Addr // that the slot gives back, and no pod may have
	// spared says that pods can be given addresses also without this step.
	spared bool
}

// poolPlan is what to do next, and how the pool stands.
type poolPlan struct {
	steps []poolStep
	err   error         // of the condition
	note  error         // why there are no more addresses, for an ADD that waits
	whole error         // why there are no more ENIs for pods alone, for an ADD that waits
	again time.Duration // when to look again; zero: at the next audit

	serving bool // there is a free address, whatever the steps are for

	excess bool     // there are more free addresses than wanted
	idle   []string // ENIs that are not needed
	spare  []string // ENIs of ours in no slot
}

// planPool returns what to do next.
func planPool(want poolWant, s state, view cloudView) poolPlan {
	b := balance{want: want, state: s, view: view}
	in, spare := view.claim(want, s)
	numbers := map[int]bool{}
	for n := range s.Slots {
		numbers[n] = true
	}
	for n := range in {
		numbers[n] = true
	}
	for _, n := range slices.Sorted(maps.Keys(numbers)) {
		slot, ok := s.Slots[n]
		if !ok {
			slot = Slot{Number: n}
		}
		eni, seen := in[n]
		if p := planSlot(want, s, view, slot, eni, seen); slot.exclusive() {
			b.whole = append(b.whole, p)
		} else {
			b.slots = append(b.slots, p)
		}
	}
	b.spare = spare
	return b.plan()
}

// claim says which ENI is in which slot: the one that the ledger names, one that
// was created for the slot when the answer was lost, and, where the ledger was
// lost, any that is attached. spare are detached ones of ours in no slot.
func (v cloudView) claim(want poolWant, s state) (in map[int]tencent.ENI, spare []tencent.ENI) {
	in = map[int]tencent.ENI{}
	named := map[string]int{}
	for _, slot := range s.Slots {
		if slot.ENI != "" {
			named[slot.ENI] = slot.Number
		}
	}
	done := map[string]bool{}
	for _, e := range v.enis {
		if e.Primary || done[e.ID] {
			continue
		}
		done[e.ID] = true
		if n, ok := named[e.ID]; ok {
			in[n] = e
		}
	}
	clear(done)
	for _, e := range v.enis {
		if _, ok := named[e.ID]; ok || e.Primary || done[e.ID] || e.State == tencent.StateDeleting {
			continue
		}
		done[e.ID] = true
		own := want.owns(e) && !want.observes()
		switch {
		case want.here(e) && (own || want.observes()):
			if n, ok := freeSlot(s, in, e); ok {
				in[n] = e
			}
		case e.Attachment != nil || !own:
		default:
			if n, ok := slotTag(e); ok && s.Slots[n].Intent == stepCreate && s.Slots[n].ENI == "" {
				if _, taken := in[n]; !taken {
					in[n] = e
					continue
				}
			}
			spare = append(spare, e)
		}
	}
	return in, spare
}

// slotTag returns the slot that an ENI was created for.
func slotTag(e tencent.ENI) (int, bool) {
	for _, t := range e.Tags {
		if n, err := strconv.Atoi(t.Value); t.Key == tagSlot && err == nil && slotNumber(n) {
			return n, true
		}
	}
	return 0, false
}

// freeSlot returns the slot in which the ENI was before the ledger was lost, as its
// pods say, or that it was created for if nothing is in it, or else the lowest that
// is empty of its kind.
func freeSlot(s state, in map[int]tencent.ENI, e tencent.ENI) (int, bool) {
	free := func(n int) bool {
		_, taken := in[n]
		slot := s.Slots[n]
		return !taken && slot.ENI == "" && slot.Intent == "" && !s.awaits(n)
	}
	if n, ok := s.awaited(e); ok {
		if _, taken := in[n]; !taken && s.Slots[n].ENI == "" {
			return n, true
		}
	}
	if n, ok := slotTag(e); ok {
		if _, taken := in[n]; !taken && s.Slots[n].ENI == "" {
			return n, true
		}
	}
	first, end := 0, maxSlots
	if !shared(e) {
		first, end = exclusiveSlot, exclusiveSlot+node.MaxExclusiveENIs
	}
	for n := first; n < end; n++ {
		if free(n) {
			return n, true
		}
	}
	return 0, false
}
