package eni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// TestPoolRestsWithACronJob: a pod that comes and goes every minute makes the pool
// grow once, and then causes no call.
func TestPoolRestsWithACronJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newLifeNode(t, cloud.Default())
		n.pause = 5 * time.Second
		if err := n.converges(time.Minute); err != nil {
			t.Fatal(err)
		}
		var before map[string]int
		for i := range 60 {
			if i == 10 {
				before = n.mutations()
			}
			if err := n.add(i, 1); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			n.engine(30*time.Second, func() bool { return time.Since(began) > 20*time.Second })
			n.del(0, 0)
			n.engine(time.Minute, func() bool { return time.Since(began) > time.Minute })
		}
		if after := n.mutations(); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("calls in 50 minutes: %v, after %v", after, before)
		}
	})
}

// TestPoolTakesTheNextSubnet: the first has room for one ENI with two addresses.
func TestPoolTakesTheNextSubnet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := cloud.Default()
		config.Subnets = append(config.Subnets, config.Subnets[1])
		config.Subnets[1] = cloud.Subnet{ID: "subnet-tiny0001", CIDR: netip.MustParsePrefix("10.0.15.0/29"), Zone: "ap-guangzhou-3", First: netip.MustParseAddr("10.0.15.4")}
		n := newLifeNode(t, config)
		n.sealed.Config.Network.SubnetIDs = []string{"subnet-tiny0001", "subnet-pods0001"}
		if err := n.converges(5 * time.Minute); err != nil {
			t.Fatal(err)
		}
		subnets := map[string]int{}
		for _, e := range n.region.Snapshot().ENIs {
			if !e.Primary {
				subnets[e.Subnet] += len(e.IPs) - 1
			}
		}
		if subnets["subnet-tiny0001"] != 2 || subnets["subnet-pods0001"] != 3 {
			t.Errorf("addresses by subnet: %v", subnets)
		}

		// With the tiny one alone there is a reason, with since when and until when.
		n.sealed.Config.Network.SubnetIDs = []string{"subnet-tiny0001"}
		n.net.waiting.Store(8)
		var err error
		n.engine(time.Minute, func() bool {
			err = n.net.noAddress(shortage{usable: 5, used: 5})
			return strings.Contains(err.Error(), "SubnetExhausted")
		})
		if text := err.Error(); !strings.Contains(text, "5 of 5 addresses in use") || !strings.Contains(text, "subnet-tiny0001: refused ") || !strings.Contains(text, "since ") {
			t.Errorf("an ADD is told: %v", err)
		}
	})
}

// TestPoolReportsWhatIsTaken: an address that the cloud takes away from a pod is
// said to be gone, and no other pod gets it.
func TestPoolReportsWhatIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newLifeNode(t, cloud.Default())
		if err := errors.Join(n.converges(time.Minute), n.add(0, 1)); err != nil {
			t.Fatal(err)
		}
		if err := n.converges(time.Minute); err != nil {
			t.Fatal(err)
		}
		pod := n.state().pods()[0]
		if _, err := n.api.UnassignIPs(t.Context(), pod.ENI, []netip.Addr{pod.Addr}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		var err error
		for range 5 {
			var plan node.Plan
			if plan, err = n.net.Pool().Plan(t.Context()); err == nil {
				err = n.net.Pool().Apply(t.Context(), plan)
			}
		}
		if node.ReasonOf(err, "") != "AddressGone" || node.ClassOf(err) != node.ClassWaiting || !strings.Contains(err.Error(), pod.String()) {
			t.Errorf("condition: %v", err)
		}
		st, err := n.net.State()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(st.ENIs[0].Addresses, func(a AddressState) bool { return a.Addr == pod.Addr && a.State == "gone" && a.Pod == pod.String() }) {
			t.Errorf("addresses: %+v", st.ENIs[0].Addresses)
		}
		if err := n.add(1, 8); err != nil {
			t.Fatal(err)
		}
		for _, p := range n.state().pods() {
			if p.Addr == pod.Addr && p.Attachment != pod.Attachment {
				t.Errorf("%s has been given to %s", p.Addr, p)
			}
		}
		n.del(0, 0)
		if err := n.converges(2 * time.Hour); err != nil {
			t.Error(err)
		}
	})
}

// TestPoolReapsItsOwn: a detached ENI of this node in no slot is deleted, one of
// somebody else's never.
func TestPoolReapsItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newLifeNode(t, cloud.Default())
		if err := n.converges(time.Minute); err != nil {
			t.Fatal(err)
		}
		create := func(tags ...tencent.Tag) string {
			var on []cloud.Tag
			for _, t := range tags {
				on = append(on, cloud.Tag(t))
			}
			e, err := n.region.CreateENI("subnet-pods0001", on...)
			if err != nil {
				t.Fatal(err)
			}
			return e.ID
		}
		want := poolWant{cluster: n.sealed.Config.Cluster.ID, facts: n.sealed.Facts}
		ours, foreign := create(want.tags(0)...), create()
		want.facts.InstanceID = "ins-other001"
		others := create(want.tags(0)...)
		began := time.Now()
		has := func(id string) bool {
			return slices.ContainsFunc(n.region.Snapshot().ENIs, func(e cloud.ENI) bool { return e.ID == id })
		}
		n.engine(30*time.Minute, func() bool { return !has(ours) })
		if age := time.Since(began); has(ours) || age < reapAge {
			t.Errorf("after %s the ENI is there: %v", age, has(ours))
		}
		n.engine(30*time.Minute, func() bool { return time.Since(began) > 29*time.Minute })
		if !has(foreign) || !has(others) {
			t.Error("an ENI of somebody else's is deleted")
		}
	})
}

// TestPoolObserves: with network.allocator observe the pool uses what is attached,
// with credentials that can change nothing, and does not even try to.
func TestPoolObserves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newLifeNode(t, cloud.Default())
		n.sealed.Config.Network.Allocator = node.AllocatorObserve
		if _, err := n.run(10 * time.Second); node.ReasonOf(err, "") != "ENINotAttached" {
			t.Errorf("without an ENI: %v", err)
		}
		if _, _, err := n.api.CreateENI(t.Context(), tencent.ENISpec{VPCID: "vpc-lab00001", SubnetID: "subnet-pods0001", Name: "terraform",
			SecurityGroupIDs: []string{"sg-lab00001"}, InstanceID: n.sealed.Facts.InstanceID, ClientToken: "t", SecondaryIPs: 6}); err != nil {
			t.Fatal(err)
		}
		before := n.mutations()
		if err := n.converges(time.Minute); err == nil {
			t.Error("six of five addresses count as settled")
		}
		if err := n.add(0, 6); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		n.net.waiting.Store(1)
		n.engine(time.Hour, func() bool { return time.Since(began) > 20*time.Minute })
		if text := n.net.noAddress(shortage{usable: 6, used: 6}).Error(); !strings.Contains(text, "AddressesNotAssigned") {
			t.Errorf("an ADD is told: %s", text)
		}
		n.net.waiting.Store(0)
		n.del(0, 0)
		n.restart()
		n.engine(3*time.Hour, func() bool { return time.Since(began) > 2*time.Hour })
		if after := n.mutations(); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("calls %v, before %v", after, before)
		}
	})
}

// TestPoolObservesWithLess holds the read-only policy to what the pool asks for.
func TestPoolObservesWithLess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := cloud.Default()
		config.Policy = tencent.PolicyObserve
		n := newLifeNode(t, config)
		n.sealed.Config.Network.Allocator = node.AllocatorObserve
		e, err := n.region.CreateENI("subnet-pods0001")
		if err != nil {
			t.Fatal(err)
		}
		in, err := n.region.Launch(t.Context(), cloud.InstanceSpec{ENIs: []string{e.ID}})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		n.sealed.Facts.InstanceID = in.ID
		if _, err := n.run(time.Minute); node.ReasonOf(err, "") != "AddressesNotAssigned" {
			t.Errorf("with an ENI without addresses: %v", err)
		}
		if s := n.state(); s.Slots[0].ENI != e.ID || !s.Slots[0].taken() {
			t.Errorf("slot %+v", s.Slots[0])
		}
	})
}

// TestPoolNeverGivesBackWhatIsTaken: between plan and apply a pod has got the address.
func TestPoolNeverGivesBackWhatIsTaken(t *testing.T) {
	l := openLedger(t, t.TempDir(), "boot")
	l.record(record{Slot: &testSlot})
	addr := l.mustAllocate(t, "a", time.Now())
	next := testSlot
	next.Addrs, next.Intent, next.Leaving = nil, stepUnassign, testSlot.Addrs
	if err := l.withdraw(next, []netip.Addr{addr}, time.Now()); err == nil {
		t.Error("an address that a pod has is withdrawn")
	}
	l.release(keyOf("a"), time.Now())
	if err := l.withdraw(next, []netip.Addr{addr}, time.Now()); err == nil {
		t.Error("an address that rests is withdrawn")
	}
	later := time.Now().Add(coolDown + time.Second)
	if err := l.withdraw(next, testSlot.Addrs, later); err != nil {
		t.Fatal(err)
	}
	if p, _, err := l.allocate(Pod{Attachment: keyOf("b")}, map[int]int{0: 1500}, later); err != nil || p.Addr.IsValid() {
		t.Errorf("allocated %v, %v", p.Addr, err)
	}
	// The cloud shows them again: they rest first.
	l.record(record{Slot: &testSlot})
	if p, short, _ := l.allocate(Pod{Attachment: keyOf("b")}, map[int]int{0: 1500}, later.Add(time.Minute)); p.Addr.IsValid() || short.resting != 2 {
		t.Errorf("allocated %v, %s", p.Addr, short)
	}
}

// TestPoolAsksForTheQuotaAgain: the instance has become smaller than the ledger says.
func TestPoolAsksForTheQuotaAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newLifeNode(t, cloud.Default())
		if err := n.converges(time.Minute); err != nil {
			t.Fatal(err)
		}
		if err := n.net.ledger.record(record{Quota: &tencent.ENILimit{ENIs: 8, IPsPerENI: 30}}); err != nil {
			t.Fatal(err)
		}
		if err := n.add(0, 20); err != nil {
			t.Fatal(err)
		}
		if err := n.converges(time.Hour); err != nil {
			t.Fatal(err)
		}
		if s := n.state(); s.Quota != (tencent.ENILimit{ENIs: 4, IPsPerENI: 10, ExtendENIs: 10}) {
			t.Errorf("quota %+v", s.Quota)
		}
	})
}
