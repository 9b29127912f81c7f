package eni

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// A pod can have an ENI whole: the ENI's link is moved into it, and what the ENI's
// security groups refuse does not reach it, from this node's other pods either. Such
// an ENI is in a slot like any other, whose number says so. It has no routing table,
// rule or mark: it is not in the node's paths.
//
// Everything between the pod and the VPC goes by its eth0. A veth, tke0 in the pod,
// is for what the VPC does not know: Services, the node itself, and the link-local
// services of the cloud. What the pod sends there leaves the node under the node's
// address:
//
//	rule 511  iif lo lookup 4017       table 4017: a /32 for every such pod's veth
//	rule 511  fwmark 0x22… lookup 4017 answers to connections that the pod opened by tke0

const (
	// exclusiveSlot is the number of the first slot whose ENI pods get whole.
	exclusiveSlot = 100

	exclusiveTable    = slotTable + maxSlots
	exclusivePriority = podPriority - 1

	// exclusiveMark is the mark of packets that such a pod sends by its veth, and
	// answerMark of those that answer on a connection which it opened there, which
	// exclusiveBit of the connection's mark remembers.
	exclusiveMark = 0x21 << markShift
	answerMark    = 0x22 << markShift
	exclusiveBit  = 0x10 << markShift

	// podVeth is the pod's end of the veth of a pod whose eth0 is an ENI.
	podVeth = "tke0"
)

func (s Slot) exclusive() bool { return s.Number >= exclusiveSlot }
func (p Pod) exclusive() bool  { return p.Slot >= exclusiveSlot }

// slotNumber reports whether a slot can have the number.
func slotNumber(n int) bool {
	return n >= 0 && n < maxSlots || n >= exclusiveSlot && n < exclusiveSlot+node.MaxExclusiveENIs
}

// peer is the name of the pod's end of its veth.
func (p Pod) peer() string {
	if p.exclusive() {
		return podVeth
	}
	return p.IfName
}

// bind gives the pod what it has to know of its ENI.
func (p *Pod) bind(slot Slot) {
	if slot.exclusive() {
		p.MAC, p.Gateway = slot.MAC, slot.Gateway()
	}
}

// regroup takes over the security groups of an ENI that pods get whole, if it does
// not have those that it was made with, in whatever order.
func (s *Slot) regroup(e tencent.ENI) {
	if s.exclusive() && !sameSet(s.Groups, e.SecurityGroups) {
		s.Groups = e.SecurityGroups
	}
	if s.exclusive() {
		s.AttachType = max(s.AttachType, e.AttachType)
	}
}

// shared reports whether an ENI was made for pods that share it.
func shared(e tencent.ENI) bool {
	n, ok := slotTag(e)
	return !ok || n < exclusiveSlot
}

// tornOut says whose ENI has been detached.
func (p *slotPlan) tornOut(pods []Pod) {
	if p.slot.exclusive() && len(pods) > 0 {
		p.grave = waitingFor("ENIDetached", "see who detaches ENIs in the cloud; the pod has no network until it is attached again",
			"%s, which pod %s has whole, is detached from the instance", p.eni.ID, pods[0])
	}
}

// wants are the ENIs that ADDs wait for.
type wants struct {
	mu      sync.Mutex
	groups  map[cni.Attachment][]string
	blocked error // why there are no more
}

// add registers what an ADD waits for, until the function that it returns is called.
func (w *wants) add(key cni.Attachment, groups []string) (done func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.groups == nil {
		w.groups = map[cni.Attachment][]string{}
	}
	w.groups[key] = groups
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.groups, key)
	}
}

// open returns what is waited for and not given yet.
func (w *wants) open(s state) (all [][]string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, groups := range w.groups {
		if _, ok := s.Pods[key]; !ok {
			all = append(all, groups)
		}
	}
	slices.SortFunc(all, slices.Compare)
	return all
}

func (w *wants) setBlocked(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.blocked = err
}

func (w *wants) why() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.blocked
}

// giveWhole has an ENI for every ADD that waits for one whole, and gives up those
// that nobody has needed for long enough, or that are in the way of others.
func (b *balance) giveWhole() {
	for i := range b.whole {
		p := &b.whole[i]
		b.look(p.wait)
		if p.slot.Intent != "" || p.wait != nil {
			b.lookIn(pollPeriod)
		}
	}
	if b.want.observes() {
		return
	}
	taken := map[int]bool{}
	var lacking [][]string
	for _, groups := range b.view.wanted {
		i := slices.IndexFunc(b.whole, func(p slotPlan) bool {
			return !taken[p.slot.Number] && p.suits(groups, b.view.now)
		})
		if i < 0 {
			lacking = append(lacking, groups)
			continue
		}
		taken[b.whole[i].slot.Number] = true
		b.out.whole = cmp.Or(b.out.whole, b.whole[i].wait)
	}
	for _, groups := range lacking {
		wait := b.addWhole(groups, taken)
		b.look(wait)
		b.out.whole = cmp.Or(b.out.whole, wait)
	}
	for i := range b.whole {
		p := &b.whole[i]
		if !p.idle() || taken[p.slot.Number] {
			continue
		}
		b.out.idle = append(b.out.idle, p.eni.ID)
		if since, ok := b.view.idle[p.eni.ID]; !ok {
			b.lookIn(idlePeriod)
		} else if b.due(since, idlePeriod) && b.may(p, stepDetach) {
			p.detach(b.view.now)
		}
	}
}

// suits reports whether the slot has, or will soon have, an ENI with the groups for
// another pod.
func (p *slotPlan) suits(groups []string, now time.Time) bool {
	return p.held() && slices.Equal(p.slot.Groups, groups) && p.used+p.gone+p.cooling == 0 && p.grave == nil && !p.late(now)
}

// idle reports whether nobody has the slot's ENI, and nothing is done with it.
func (p *slotPlan) idle() bool { return p.ready && len(p.free) > 0 && p.used+p.gone == 0 }

// addWhole creates an ENI with the groups, or makes room for one, and returns what is
// to be waited for.
func (b *balance) addWhole(groups []string, taken map[int]bool) error {
	_, most := b.want.network.ShareENIs(b.state.Quota.ENIs, b.state.Quota.ExtendENIs)
	inUse := 0
	for i := range b.whole {
		if !b.whole[i].empty() {
			inUse++
		}
	}
	if inUse >= most {
		return b.makeRoom(groups, most, taken)
	}
	p := b.emptyWhole()
	if err := b.view.refusal(p.key(), throttleKey(stepCreate)); err != nil {
		return err
	}
	subnet, _, err := b.pickSubnet(1)
	if err != nil {
		return err
	}
	p.slot.Groups, p.slot.AttachType = groups, 0
	if b.state.Quota.ExtendENIs > 0 {
		p.slot.AttachType = tencent.AttachExtension
	}
	taken[p.slot.Number] = true
	p.create(b.want, subnet, 0, b.view.now, true)
	b.lookIn(pollPeriod)
	return node.Waiting("ENICreating", "an ENI with security groups %s is being created", strings.Join(groups, ", "))
}

// makeRoom gives up an ENI with other groups that no pod has.
func (b *balance) makeRoom(groups []string, most int, taken map[int]bool) error {
	for i := range b.whole {
		p := &b.whole[i]
		if p.retiring() && !taken[p.slot.Number] {
			taken[p.slot.Number] = true
			return node.Waiting("ENIDetaching", "%s with other security groups is being given up for it", p.slot.ENI)
		}
	}
	for i := range b.whole {
		p := &b.whole[i]
		if p.idle() && !taken[p.slot.Number] && b.want.owns(p.eni) && b.may(p, stepDetach) {
			taken[p.slot.Number] = true
			id := p.eni.ID
			p.detach(b.view.now)
			return node.Waiting("ENIDetaching", "%s with other security groups is given up for it", id)
		}
	}
	return waitingFor("ExclusiveENIsReached", "raise network.exclusiveENIs, or take a larger instance type",
		"%d ENIs for pods alone are all that %s may have (network.exclusiveENIs is %d, its quota %d standard and %d extension ENIs), "+
			"and each has a pod, or had one within %s; none with security groups %s is free",
		most, b.want.facts.InstanceID, b.want.network.ExclusiveENIs, b.state.Quota.ENIs, b.state.Quota.ExtendENIs, coolDown, strings.Join(groups, ", "))
}

// emptyWhole returns the lowest slot that is empty of those whose ENI pods get whole.
func (b *balance) emptyWhole() *slotPlan {
	for number := exclusiveSlot; ; number++ {
		i := slices.IndexFunc(b.whole, func(p slotPlan) bool { return p.slot.Number == number })
		if i >= 0 && !b.whole[i].empty() || b.state.awaits(number) {
			continue
		}
		if i < 0 {
			b.whole = append(b.whole, slotPlan{slot: Slot{Number: number}})
			i = len(b.whole) - 1
		}
		return &b.whole[i]
	}
}

// allocateWhole gives p an ENI with the groups, the one that has rested longest;
// ready maps slots to the MTU of their ENI. A pod that has one keeps it. It returns
// when the first of those that rest has done so.
func (l *ledger) allocateWhole(p Pod, groups []string, ready map[int]int, now time.Time) (Pod, time.Time, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(); err != nil {
		return Pod{}, time.Time{}, err
	}
	if old, ok := l.now.Pods[p.Attachment]; ok {
		old.Namespace, old.Name, old.NetNS = p.Namespace, p.Name, p.NetNS
		if old == l.now.Pods[p.Attachment] {
			return old, time.Time{}, nil
		}
		return old, time.Time{}, l.put(record{Pod: &old})
	}
	var next, best time.Time
	dual := p.Addr6 == wantsIPv6
	p.Addr6 = netip.Addr{}
	for number, mtu := range ready {
		slot := l.now.Slots[number]
		if !slices.Equal(slot.Groups, groups) {
			continue
		}
		short := shortageOf(dual)
		four, six := l.now.offer(slot, l.used, l.clean, now, &short)
		if until := short.until(); !until.IsZero() && (next.IsZero() || until.Before(next)) {
			next = until
		}
		if four.addr.IsValid() && (!p.Addr.IsValid() || four.since.Before(best) || four.since.Equal(best) && number < p.Slot) {
			p.Addr, p.Addr6, p.Slot, p.ENI, p.MTU, best = four.addr, six.addr, number, slot.ENI, mtu, four.since
			p.bind(slot)
		}
	}
	if !p.Addr.IsValid() {
		return Pod{}, next, nil
	}
	p.Groups, p.Since = strings.Join(groups, ","), now.UTC().Truncate(time.Millisecond)
	if err := l.put(record{Pod: &p}); err != nil {
		return Pod{}, next, err
	}
	for _, a := range p.addrs() {
		l.used[a] = p.Attachment
	}
	return p, next, nil
}

// The networks of TKE's annotation tke.cloud.tencent.com/networks.
const (
	networkShared    = "tke-route-eni"
	networkExclusive = "tke-direct-eni"
)

// whole reports whether the pod asks for an ENI of its own, and with which security
// groups; its error says what the NodeConfig or the pod would have to say.
func (n *Network) whole(req cni.Request) (groups []string, ok bool, err error) {
	refuse := func(format string, args ...any) error {
		return cni.Errorf(cni.CodeRefused, "the pod's network is refused", format, args...)
	}
	switch req.Network {
	case "", networkShared:
		if len(req.SecurityGroups) > 0 {
			return nil, false, refuse("it has the annotation %s: a pod with security groups of its own needs an ENI of its own; add the annotation %s: %s",
				cni.AnnotationGroups, cni.AnnotationNetwork, networkExclusive)
		}
		return nil, false, nil
	case networkExclusive:
	default:
		return nil, false, refuse("%s is %q, want %s or %s", cni.AnnotationNetwork, req.Network, networkShared, networkExclusive)
	}
	sealed, ok := n.sealed()
	if !ok {
		return nil, false, cni.Errorf(cni.CodeTryAgain, "no ENI for the pod", "the node has no sealed configuration yet")
	}
	network := sealed.Config.Network
	switch {
	case network.Allocator == node.AllocatorObserve:
		return nil, false, refuse("it asks for an ENI of its own by %s: %s, and network.allocator is observe on this node: the agent attaches no ENIs",
			cni.AnnotationNetwork, networkExclusive)
	case network.ExclusiveENIs == 0:
		return nil, false, refuse("it asks for an ENI of its own by %s: %s; set network.exclusiveENIs in the NodeConfig to how many this node may give away",
			cni.AnnotationNetwork, networkExclusive)
	}
	for _, g := range req.SecurityGroups {
		if !slices.Contains(network.PodSecurityGroupIDs, g) {
			return nil, false, refuse("it asks for security group %s; network.podSecurityGroupIDs of the NodeConfig permits %s",
				g, cmp.Or(strings.Join(network.PodSecurityGroupIDs, ", "), "none"))
		}
	}
	groups = req.SecurityGroups
	if len(groups) == 0 {
		groups = network.SecurityGroupIDs
	}
	return groups, true, nil
}

// addWhole gives the pod an ENI and moves it in.
func (n *Network) addWhole(ctx context.Context, p Pod, groups []string) (*cni.Result, error) {
	pod, err := n.waitWhole(ctx, p, groups)
	if err != nil {
		return nil, err
	}
	if err := n.whileSyncing(func() error { return n.paths.wire(pod) }); err != nil {
		return nil, errors.Join(err, n.del(p.Attachment))
	}
	host, hostMAC, mac := vethOf(pod.Attachment)
	result := &cni.Result{
		HostName: host, HostMAC: hostMAC, MAC: pod.MAC, MTU: pod.MTU,
		Addr: netip.PrefixFrom(pod.Addr, 32), Gateway: pod.Gateway,
		VethName: podVeth, VethMAC: mac,
	}
	if pod.Addr6.IsValid() {
		result.Addr6, result.Gateway6 = netip.PrefixFrom(pod.Addr6, 128), eniGateway6
	}
	return result, nil
}

// waitWhole waits for an ENI.
func (n *Network) waitWhole(ctx context.Context, p Pod, groups []string) (Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	defer n.wants.add(p.Attachment, groups)()
	for {
		changed := n.ledger.wait()
		got, next, err := n.ledger.allocateWhole(p, groups, n.paths.wholeSlots(), time.Now())
		if err != nil {
			return got, ledgerError{err}
		}
		if got.Addr.IsValid() {
			return got, nil
		}
		select {
		case n.demand <- struct{}{}:
		default:
		}
		rested := time.NewTimer(addTimeout)
		if !next.IsZero() {
			rested.Reset(time.Until(next))
		}
		select {
		case <-changed:
		case <-rested.C:
		case <-ctx.Done():
			rested.Stop()
			return Pod{}, n.noENI(groups, next)
		}
		rested.Stop()
	}
}

// noENI says why, for whoever reads the pod's events.
func (n *Network) noENI(groups []string, next time.Time) error {
	why := "none with security groups " + strings.Join(groups, ", ") + " is free"
	if !next.IsZero() {
		why += fmt.Sprintf(", one rests until %s", next.UTC().Format(time.RFC3339))
	}
	n.mu.Lock()
	pool := n.blocked
	n.mu.Unlock()
	if err := cmp.Or(n.wants.why(), pool); err != nil {
		why += fmt.Sprintf("; %s: %v", node.ReasonOf(err, "Error"), err)
	}
	return cni.Errorf(cni.CodeTryAgain, "no ENI for the pod", "%s", why)
}

// delWhole takes the ENI out of the pod before the ledger says that the pod has it
// no more: whoever has it next finds it on the node.
func (n *Network) delWhole(pod Pod) error {
	err := n.paths.unwireWhole(pod, func() error {
		if err := n.ledger.release(pod.Attachment, time.Now()); err != nil {
			return ledgerError{err}
		}
		return nil
	})
	if syncErr := n.ledger.sync(); syncErr != nil {
		err = errors.Join(err, ledgerError{syncErr})
	}
	return err
}
