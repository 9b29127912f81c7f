//go:build kernel

package eni

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// TestKernelAddressReuse holds that a pod gets an address only after the kernel
// has forgotten the connections of the pod that had it.
func TestKernelAddressReuse(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		old, other := newPod(t, "old"), newPod(t, "other")
		addr, otherAddr := old.add(), other.add()
		old.listen()
		n.listen(vpcPeer)
		n.reached(addr)
		n.reach(old, vpcPeer, addr)
		n.reach(other, vpcPeer, otherAddr)
		if _, err := old.plugin("DEL", nil); err != nil {
			t.Fatal(err)
		}
		if len(flows(t, addr)) == 0 {
			t.Fatal("the connections are not tracked")
		}

		// Its rest ends, as after coolDown.
		l := n.net.ledger
		must(t, l.record(record{Rest: &rest{Addr: addr, Until: time.Now()}}))
		ready := n.net.paths.readySlots()
		slot := l.now.Slots[0]
		slot.Addrs = []netip.Addr{addr}
		must(t, l.record(record{Slot: &slot}))
		if p, short, err := l.allocate(Pod{Attachment: keyOf("early")}, ready, time.Now()); err != nil || p.Addr.IsValid() {
			t.Errorf("allocated %s while %d connections are remembered: %v", p.Addr, len(flows(t, addr)), err)
		} else if short.String() != "0 of 1 addresses in use, 1 being made ready" {
			t.Errorf("shortage: %s", short)
		}
		if p := n.plan(); !p.Serving {
			t.Error("addresses that have rested are a reason to doubt the network")
		}
		if got := n.converge(); !strings.Contains(got, "forget connections of the last pods of ["+addr.String()+"]\n") {
			t.Errorf("plan:\n%s", got)
		}
		if left := flows(t, addr); len(left) > 0 {
			t.Errorf("remembered: %v", left)
		}
		if len(flows(t, otherAddr)) == 0 {
			t.Error("connections of another pod are forgotten")
		}
		if p, _, err := l.allocate(Pod{Attachment: keyOf("late")}, ready, time.Now()); err != nil || p.Addr != addr {
			t.Errorf("allocated %s, %v", p.Addr, err)
		}
	})
}

// flows returns the tracked connections of an address.
func flows(t *testing.T, a netip.Addr) (of []*netlink.ConntrackFlow) {
	t.Helper()
	all, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(familyOf(a.Is6())))
	must(t, err)
	for _, f := range all {
		if (flowsOf{a: true}).MatchConntrackFlow(f) {
			of = append(of, f)
		}
	}
	return of
}
