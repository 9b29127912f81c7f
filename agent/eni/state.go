package eni

import (
	"fmt"
	"slices"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// PodState is one interface of one pod, and how it stands.
type PodState struct {
	Pod
	Veth string `json:"veth"`
	// State is "wired"; "no veth" or "no ENI" while its network is being made or repaired;
	// "dead" when its network namespace is gone and no DEL has come; or "address
	// gone" when the cloud has taken its address away.
	State string `json:"state"`
}

// State returns what `tkenode eni` and `tkenode pods` print. It asks nobody but
// the kernel, for a counter.
func (n *Network) State() (State, error) {
	s, err := n.ledger.state()
	if err != nil {
		return State{}, err
	}
	n.mu.Lock()
	blocked, seen, seenAt := n.blocked, n.seen, n.seenAt
	n.mu.Unlock()
	n.paths.mu.Lock()
	sc, ready, whole := n.paths.scene, n.paths.readySlots(), n.paths.wholeSlots()
	n.paths.mu.Unlock()

	out := describe(s, sc, ready, seen, time.Now())
	out.tellWhole(whole, sc)
	if out.MetadataRefused, err = refusedNow(); err != nil {
		return State{}, err
	}
	out.CloudSeen, out.Waiting = seenAt, int(n.waiting.Load())
	if blocked != nil {
		out.Blocked = fmt.Sprintf("%s: %v", node.ReasonOf(blocked, "Error"), blocked)
	}
	return out, nil
}

// describe puts together what is known of every slot and pod.
func describe(s state, sc scene, ready map[int]int, seen []tencent.ENI, now time.Time) State {
	out := State{Now: now.UTC(), ENIs: []ENIState{}, Pods: []PodState{}}
	for _, slot := range s.slots() {
		if slot.ENI == "" && slot.Intent == "" {
			continue
		}
		_, ok := ready[slot.Number]
		e := ENIState{Slot: slot, Device: sc.devices[slot.MAC].name, Ready: ok, Addresses: s.addresses(slot, now)}
		if i := slices.IndexFunc(seen, func(e tencent.ENI) bool { return slot.ENI != "" && e.ID == slot.ENI }); i >= 0 {
			e.SubnetID, e.SecurityGroups = seen[i].SubnetID, seen[i].SecurityGroups
		}
		out.ENIs = append(out.ENIs, e)
	}
	if c := s.exhausted(ready, sc.dual, now); c != nil {
		out.Exhausted = c.Message
	}
	for _, p := range s.pods() {
		name, _, _ := vethOf(p.Attachment)
		st := PodState{Pod: p, Veth: name, State: "wired"}
		wired, looked := sc.wired[p.Attachment]
		switch {
		case !slices.Contains(s.Slots[p.Slot].Addrs, p.Addr) || p.Addr6.IsValid() && !slices.Contains(s.Slots[p.Slot].Addrs6, p.Addr6) || s.Slots[p.Slot].ENI != p.ENI:
			st.State = "address gone"
		case !looked || wired: // one that is newer than the last look has just been wired
		case sc.alive[p.Attachment]:
			st.State = "no veth"
		default:
			st.State = "dead"
		}
		out.Pods = append(out.Pods, st)
	}
	return out
}

// exhausted returns the warning that no address is left for another pod, or nil; dual
// says that it needs one of IPv6, too. The node stays Ready: its pods run, and one
// that ends makes room.
func (s state) exhausted(ready map[int]int, dual bool, now time.Time) *node.Condition {
	c := node.Condition{Type: node.PoolExhausted, Status: node.True, Reason: "NoFreeAddress"}
	for _, p := range s.Pods {
		if p.Since.After(c.Since) {
			c.Since = p.Since // the last address went to the newest pod
		}
	}
	short, used := shortageOf(dual), s.holders()
	for number := range ready {
		if four, _ := s.offer(s.Slots[number], used, nil, now, &short); four.addr.IsValid() {
			return nil
		}
	}
	if len(ready) == 0 {
		return nil // that is what NetworkReady says
	}
	c.Message = "no free VPC address: " + short.String()
	if short.usable == 0 {
		c.Message = "no free VPC address: the ENIs have none for pods"
	}
	return &c
}

// Exhausted returns the warning PoolExhausted, as of the last look, or nil. It
// never waits: the socket tells it together with everything else.
func (n *Network) Exhausted() *node.Condition {
	c := n.exhausted.Load()
	if c == nil {
		return nil
	}
	told := *c
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.blocked != nil {
		told.Message += fmt.Sprintf("; %s: %v", node.ReasonOf(n.blocked, "Error"), n.blocked)
	}
	return &told
}
