package eni

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// An ENI has as many IPv6 addresses for pods as it has of IPv4, and one that is its
// own. They follow the others: assigned after them, given back after them. One that
// pods get whole has one, which is the pod's.

// sixPlan is how a slot's IPv6 stands.
type sixPlan struct {
	wanted bool // every pod needs one

	bound   int          // addresses on the ENI, its own among them, but for those that leave
	pending int          // of them, those that are not usable yet
	cooling int          // of those for pods, those that rest
	free    []netip.Addr // of those for pods, those that a pod can get
	missing error        // why there can be none
}

// pairs is how many pods can get what they need.
func (p *slotPlan) pairs() int {
	if !p.six.wanted {
		return len(p.free)
	}
	return min(len(p.free), len(p.six.free))
}

// unpaired is how many addresses wait for one of IPv6 to come.
func (p *slotPlan) unpaired() int { return len(p.free) - p.pairs() }

// gives reports whether addresses are being given back.
func (s Slot) gives() bool { return s.Intent == stepUnassign || s.Intent == stepUnassign6 }

// count6 is how many IPv6 addresses the ENI has, its own among them.
func (s Slot) count6() int {
	if !s.Primary6.IsValid() {
		return len(s.Addrs6)
	}
	return 1 + len(s.Addrs6)
}

// learn6 takes over what the cloud says of the ENI's IPv6. A node that has been
// dual-stack goes on with what its pods have.
func (p *slotPlan) learn6(want poolWant, s state, before Slot, subnet tencent.Subnet, now time.Time, pods []Pod, states map[netip.Addr]string) {
	next := &p.slot
	p.six.wanted = want.network.DualStack()
	next.Subnet6, next.Addrs6 = netip.Prefix{}, nil
	if !p.six.wanted && !next.exclusive() && !slices.ContainsFunc(pods, func(p Pod) bool { return p.Addr6.IsValid() }) {
		next.Primary6 = netip.Addr{}
		return
	}
	if p.six.wanted && !subnet.CIDR6.IsValid() {
		p.six.missing = noIPv6(subnet.ID)
	}
	own := false
	for _, ip := range p.eni.IP6s {
		states[ip.Addr] = ip.State
		switch {
		case slices.Contains(before.Leaving, ip.Addr):
			next.Leaving = append(next.Leaving, ip.Addr)
			continue
		case ip.State == tencent.StateAvailable:
			next.Addrs6 = append(next.Addrs6, ip.Addr)
		default:
			p.six.pending++
		}
		p.six.bound++
		own = own || ip.Addr == before.Primary6
	}
	slices.SortFunc(next.Addrs6, netip.Addr.Compare)
	if next.exclusive() {
		return
	}
	if a := p.pick6(s, before, now, pods); !own && a.IsValid() {
		next.Primary6 = a // until then the last one stands: pods' way must not break
	}
	next.Addrs6 = slices.DeleteFunc(next.Addrs6, func(a netip.Addr) bool { return a == next.Primary6 })
	if next.Primary6.IsValid() {
		next.Subnet6 = subnet.CIDR6
	}
}

func noIPv6(subnet string) error {
	return node.Terminal("IPv6SubnetMissing", tencent.FixIPv6Subnet, fmt.Errorf("%s has no IPv6 range, and network.ipFamilies has IPv6", subnet))
}

// pick6 returns the address that is to be the ENI's own: one that the cloud calls
// primary, or else the first that no pod has. One that a pod has just had rests.
func (p *slotPlan) pick6(s state, before Slot, now time.Time, pods []Pod) netip.Addr {
	var first netip.Addr
	for _, a := range p.slot.Addrs6 {
		rests := slices.Contains(before.Addrs6, a) && s.restsUntil(a).After(now)
		if rests || slices.ContainsFunc(pods, func(p Pod) bool { return p.Addr6 == a }) {
			continue
		}
		if slices.ContainsFunc(p.eni.IP6s, func(ip tencent.IP6) bool { return ip.Primary && ip.Addr == a }) {
			return a
		}
		if !first.IsValid() {
			first = a
		}
	}
	return first
}

// changes6 says what the pool learns of an ENI's IPv6.
func changes6(after Slot) string {
	if !after.Primary6.IsValid() {
		return fmt.Sprintf("use no IPv6 address of %s any more", after.ENI)
	}
	return fmt.Sprintf("take %s as the IPv6 address of %s's own: subnet %s", after.Primary6, after.ENI, after.Subnet6)
}

// count6 counts IPv6 addresses, and says which pods have lost theirs.
func (p *slotPlan) count6(s state, now time.Time, pods []Pod, states map[netip.Addr]string) {
	has := map[netip.Addr]bool{}
	for _, pod := range pods {
		if !pod.Addr6.IsValid() {
			continue
		}
		has[pod.Addr6] = true
		if slices.Contains(p.slot.Addrs6, pod.Addr6) {
			continue
		}
		p.gone++
		p.grave = cmp.Or(p.grave, p.addressGone(pod, pod.Addr6, states))
	}
	for _, a := range p.slot.Addrs6 {
		switch {
		case has[a]:
		case s.restsUntil(a).After(now):
			p.six.cooling++
		default:
			p.six.free = append(p.six.free, a)
		}
	}
}

// pair has each ENI get the IPv6 addresses that its others lack. It returns what is in
// the way.
func (b *balance) pair(spared bool) (blocked error) {
	for i := range b.slots {
		p := &b.slots[i]
		err := b.assign6(p, p.bound+1, spared)
		blocked = cmp.Or(blocked, err)
	}
	for i := range b.whole {
		err := b.assign6(&b.whole[i], 1, true)
		b.out.whole = cmp.Or(b.out.whole, err, b.whole[i].six.missing)
	}
	return blocked
}

// assign6 has the slot's ENI get IPv6 addresses until it has so many, its own among
// them. It returns what is in the way.
func (b *balance) assign6(p *slotPlan, count int, spared bool) error {
	lack := count - p.six.bound
	if !p.six.wanted || lack <= 0 || p.six.missing != nil || !p.ready {
		return nil
	}
	if err := b.view.refusal(p.key(), throttleKey(stepAssign6)); err != nil {
		b.look(err)
		return err
	}
	p.assign6(min(lack, maxBatch), b.view.now, spared)
	return nil
}

// without6 returns what is in the way of more addresses: where the quota is reached, an
// ENI whose subnet has no IPv6 says more.
func (b *balance) without6(blocked error) error {
	if node.ReasonOf(blocked, "") != "QuotaReached" {
		return blocked
	}
	for _, p := range b.slots {
		blocked = cmp.Or(p.six.missing, blocked)
	}
	return blocked
}

func (p *slotPlan) assign6(n int, now time.Time, spared bool) {
	p.slot.intend(stepAssign6, now)
	p.slot.Target = p.six.bound + n
	p.ready = false
	p.steps = append(p.steps, poolStep{
		text: fmt.Sprintf("assign %d IPv6 addresses to %s", n, p.eni.ID),
		slot: p.slot, call: stepAssign6, n: n, spared: spared,
	})
}

// unpair gives back IPv6 addresses that have no others to go with, the highest of
// those that are free.
func (b *balance) unpair() {
	for i := range b.slots {
		p := &b.slots[i]
		n := min(p.six.bound-p.bound-1, len(p.six.free), maxBatch)
		if !p.six.wanted || !p.ready || n <= 0 || !b.want.owns(p.eni) || !b.may(p, stepUnassign6) {
			continue
		}
		addrs := slices.Clone(p.six.free[len(p.six.free)-n:])
		p.slot.Addrs6 = slices.DeleteFunc(slices.Clone(p.slot.Addrs6), func(a netip.Addr) bool { return slices.Contains(addrs, a) })
		p.callUnassign(stepUnassign6, addrs, addrs, b.view.now)
	}
}

func listed(addrs []netip.Addr) string {
	var text []string
	for _, a := range addrs {
		text = append(text, a.String())
	}
	return strings.Join(text, ", ")
}
