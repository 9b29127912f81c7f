package eni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

var dualStack = []node.IPFamily{node.IPv4, node.IPv6}

// newDualNode is a node of the same life whose pods have addresses of both families.
func newDualNode(t *testing.T, config cloud.Config) *poolNode {
	n := newLifeNode(t, config)
	n.sealed.Config.Network.IPFamilies = dualStack
	return n
}

// TestPoolDualStackLife counts the calls of a whole life.
func TestPoolDualStackLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newDualNode(t, cloud.Default())
		if stage, err := n.live(0); err != nil {
			t.Fatalf("stage %d: %v", stage, err)
		}
		calls := n.mutations()
		t.Logf("calls: %v", calls)
		for four, six := range map[string]string{
			"vpc:AssignPrivateIpAddresses": "vpc:AssignIpv6Addresses", "vpc:UnassignPrivateIpAddresses": "vpc:UnassignIpv6Addresses",
		} {
			if calls[six] == 0 || calls[six] > calls[four]+6 {
				t.Errorf("calls: %v", calls)
			}
		}
		for _, p := range n.state().pods() {
			if !p.Addr6.IsValid() {
				t.Errorf("pod %s has no IPv6 address", p)
			}
		}
	})
}

// killer6 kills the agent at a call of IPv6.
type killer6 struct {
	Cloud
	killer *killer
}

func (k *killer6) UnassignIP6s(ctx context.Context, eni string, addrs []netip.Addr) (task string, err error) {
	err = k.killer.call(func() error { task, err = k.Cloud.UnassignIP6s(ctx, eni, addrs); return err })
	return task, err
}

func (k *killer6) AssignIP6s(ctx context.Context, eni string, count int, token string) (ips []tencent.IP6, task string, err error) {
	err = k.killer.call(func() error { ips, task, err = k.Cloud.AssignIP6s(ctx, eni, count, token); return err })
	return ips, task, err
}

// TestPoolDualStackSurvivesKills kills the agent at every call of IPv6 of its whole life.
func TestPoolDualStackSurvivesKills(t *testing.T) {
	survivesKills(t, 6, newDualNode, func(api Cloud, k killer) (Cloud, *killer) { return &killer6{api, &k}, &k })
}

// TestPoolDualStackLosesLedger kills the agent at the calls of IPv6 and takes the ledger
// away.
func TestPoolDualStackLosesLedger(t *testing.T) {
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprint("after=", after), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newPoolNode(t)
				n.sealed.Config.Network.IPFamilies = dualStack
				n.net.pool.cloud = &killer6{n.api, &killer{at: 1, after: after}}
				if _, err := n.run(time.Minute); !errors.Is(err, errKilled) {
					t.Fatalf("not killed: %v", err)
				}
				time.Sleep(3 * time.Second)
				n.net.Close()
				if err := os.RemoveAll(n.dir); err != nil {
					t.Fatal(err)
				}
				n.restart()
				if _, err := n.run(2 * time.Minute); err != nil {
					t.Fatal(err)
				}
				n.holds(8)
			})
		})
	}
}

// TestPoolDualStackOutlivesFaults has the cloud fail at IPv6 in every way that is known
// of it: no address is lost or doubled. A usual run has half of them.
func TestPoolDualStackOutlivesFaults(t *testing.T) {
	for i, action := range []string{"vpc:AssignIpv6Addresses", "vpc:UnassignIpv6Addresses"} {
		for j, f := range []cloud.Fault{
			{Code: "LimitExceeded.ActionLimited", Times: 12},
			{Code: tencent.CodeMutexTaskRunning, Times: 6},
			{Stuck: 5 * time.Minute},
			{Partial: 2, Times: 3},
			{Drop: true, Times: 2},
			{Vanish: true, Times: 2},
			{Code: "InternalError", Times: 2},
			{Fail: true, Times: 2},
		} {
			if (i+j)%2 != 0 && !*whole {
				continue
			}
			t.Run(fmt.Sprintf("%s %+v", action, f), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					n := newDualNode(t, cloud.Default())
					f.Action = action
					n.region.Inject(f)
					if stage, err := n.live(0); err != nil {
						t.Fatalf("stage %d: %v", stage, err)
					}
				})
			})
		}
	}
}

// TestPoolDualStackFollowsTheCloud changes the cloud behind the pool's back.
func TestPoolDualStackFollowsTheCloud(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPoolNode(t)
		n.sealed.Config.Network.IPFamilies = dualStack
		if _, err := n.run(time.Minute); err != nil {
			t.Fatal(err)
		}
		n.holds(8)
		slot := n.state().Slots[0]
		for _, gone := range []netip.Addr{slot.Addrs6[2], slot.Primary6} {
			if _, err := n.api.UnassignIP6s(t.Context(), slot.ENI, []netip.Addr{gone}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Second)
			applied, err := n.run(time.Minute)
			if err != nil || !slices.Contains(applied, "assign 1 IPv6 addresses to "+slot.ENI) {
				t.Fatalf("%v, applied %q", err, applied)
			}
			n.holds(8)
		}
		if now := n.state().Slots[0]; now.Primary6 == slot.Primary6 || now.Primary6 != slot.Addrs6[0] {
			t.Errorf("the ENI's own was %s, is %s, pods had %s", slot.Primary6, now.Primary6, slot.Addrs6)
		}

		// Of a pod's it says so.
		p, short, err := n.net.ledger.allocate(Pod{Attachment: keyOf("web"), Namespace: "default", Name: "web", Addr6: wantsIPv6}, map[int]int{0: 1500}, time.Now())
		if err != nil || !p.Addr6.IsValid() {
			t.Fatalf("no address: %s, %v", short, err)
		}
		if _, err := n.api.UnassignIP6s(t.Context(), p.ENI, []netip.Addr{p.Addr6}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		var told []string
		for range 5 {
			_, err := n.run(time.Millisecond)
			told = append(told, fmt.Sprint(node.ReasonOf(err, ""), ": ", err))
		}
		if !strings.Contains(strings.Join(told, "\n"), p.Addr6.String()+" of pod default/web is no longer an address of") {
			t.Errorf("a pod's address is gone: %v", told)
		}
	})
}

// TestPoolDualStackNeedsARange has a subnet without an IPv6 range, and IPv6 turned on
// and off on a node that is there.
func TestPoolDualStackNeedsARange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := cloud.Default()
		config.Subnets[1].CIDR6 = netip.Prefix{}
		n := newPoolNodeIn(t, config)
		n.sealed.Config.Network.IPFamilies = dualStack
		_, err := n.run(time.Minute)
		if node.ClassOf(err) != node.ClassTerminal || node.ReasonOf(err, "") != "IPv6SubnetMissing" || !strings.Contains(err.Error(), "give the subnet an IPv6 range") {
			t.Errorf("without a range: %v", err)
		}
		if calls := n.mutations(); len(calls) != 0 {
			t.Errorf("calls: %v", calls)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		n := newPoolNode(t)
		for _, families := range [][]node.IPFamily{nil, dualStack} {
			n.sealed.Config.Network.IPFamilies = families
			if _, err := n.run(time.Minute); err != nil {
				t.Fatal(err)
			}
			n.holds(8)
		}
		n.sealed.Config.Network.IPFamilies = nil
		if applied, err := n.run(time.Minute); err != nil || len(applied) != 1 || !strings.HasPrefix(applied[0], "use no IPv6 address") {
			t.Errorf("turned off: %v, applied %q", err, applied)
		}
		if n.state().dual() {
			t.Error("there is IPv6 in the ledger")
		}
	})
}
