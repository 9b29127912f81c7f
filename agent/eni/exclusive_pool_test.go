package eni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

var (
	groupsOne = []string{"sg-lab00001"}
	groupsTwo = []string{"sg-lab00002", "sg-lab00001"}
)

// newWholeNode is a node that gives so many ENIs to pods whole, and has its shared one.
func newWholeNode(t *testing.T, enis int) *poolNode {
	n := newPoolNode(t)
	n.sealed.Config.Network.ExclusiveENIs = enis
	if _, err := n.run(time.Minute); err != nil {
		t.Fatal(err)
	}
	return n
}

// noExtension is a cloud whose instance types have no extension ENIs.
type noExtension struct{ Cloud }

func (c noExtension) ENILimit(ctx context.Context, instance string) (tencent.ENILimit, error) {
	limit, err := c.Cloud.ENILimit(ctx, instance)
	limit.ExtendENIs = 0
	return limit, err
}

// give does what an ADD does until the pod has an ENI, for so long.
func (n *poolNode) give(name string, groups []string, limit time.Duration) (Pod, error) {
	n.t.Helper()
	p := Pod{Attachment: cni.Attachment{ContainerID: name, IfName: "eth0"}, Namespace: "default", Name: name}
	if n.sealed.Config.Network.DualStack() {
		p.Addr6 = wantsIPv6
	}
	defer n.net.wants.add(p.Attachment, groups)()
	var got Pod
	err := n.engine(limit, func() bool {
		s, ready := n.state(), map[int]int{}
		for _, slot := range s.slots() {
			if slot.exclusive() && slot.taken() {
				ready[slot.Number] = 1500
			}
		}
		rested, _ := n.net.ledger.unclean(time.Now())
		n.net.ledger.cleaned(rested)
		var err error
		if got, _, err = n.net.ledger.allocateWhole(p, groups, ready, time.Now()); err != nil {
			n.t.Fatal(err)
		}
		return got.Addr.IsValid()
	})
	return got, err
}

func (n *poolNode) end(p Pod) {
	n.t.Helper()
	if err := n.net.ledger.release(p.Attachment, time.Now()); err != nil {
		n.t.Fatal(err)
	}
}

// wholes are the ENIs in the cloud that pods get whole.
func (n *poolNode) wholes() (all []cloud.ENI) {
	for _, e := range n.region.Snapshot().ENIs {
		if slices.ContainsFunc(e.Tags, func(t cloud.Tag) bool { return t.Key == tagSlot && len(t.Value) > 2 }) {
			all = append(all, e)
		}
	}
	return all
}

// TestWholeLife is the life of ENIs that pods get whole: made as asked, kept for the
// next pod with the same groups, given up for one with others, and in the end.
func TestWholeLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWholeNode(t, 1)
		began := time.Now()
		web, err := n.give("web", groupsTwo, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 8*time.Second {
			t.Errorf("took %s with the lab's delays", took)
		}
		all := n.wholes()
		if len(all) != 1 || !slices.Equal(all[0].SecurityGroups, groupsTwo) || all[0].AttachType != tencent.AttachExtension || len(all[0].IPs) != 1 ||
			all[0].IPs[0].Addr != web.Addr || web.MAC != all[0].MAC || web.Gateway.String() != "10.0.16.1" || web.Groups != "sg-lab00002,sg-lab00001" {
			t.Fatalf("ENIs %+v for %+v", all, web)
		}
		first := all[0].ID
		if _, err := n.give("second", groupsTwo, time.Minute); err == nil {
			t.Error("one ENI has two pods")
		}
		if why := n.net.wants.why(); node.ReasonOf(why, "") != "ExclusiveENIsReached" {
			t.Errorf("blocked by %v", why)
		}
		n.end(web)
		began = time.Now()
		again, err := n.give("again", groupsTwo, 5*time.Minute)
		if took := time.Since(began); err != nil || again.ENI != first || took < coolDown-time.Second || took > coolDown+time.Minute {
			t.Errorf("after %s: %+v, %v; want %s", took, again, err, first)
		}
		n.end(again)
		other, err := n.give("other", groupsOne, 5*time.Minute)
		if all = n.wholes(); err != nil || len(all) != 1 || all[0].ID == first || other.ENI != all[0].ID || !slices.Equal(all[0].SecurityGroups, groupsOne) {
			t.Errorf("%v: %+v has %+v", err, other, all)
		}
		n.end(other)
		if err := n.engine(time.Hour, func() bool { return len(n.wholes()) == 0 }); err != nil {
			t.Error(err)
		}
		if took := time.Since(again.Since); took < idlePeriod {
			t.Errorf("given up after %s", took)
		}
		n.holds(8) // of the shared one
	})
}

// TestWholeSharesTheQuota: without extension ENIs, neither kind takes the other's.
func TestWholeSharesTheQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newLifeNode(t, cloud.Default())
		n.sealed.Config.Network.ExclusiveENIs = 1
		n.cloud = noExtension{n.api}
		n.restart()
		if err := n.add(0, 18); err != nil { // two ENIs of nine
			t.Fatal(err)
		}
		if err := n.add(18, 1); err == nil {
			t.Error("a third ENI is shared")
		}
		n.net.waiting.Store(0)
		if _, err := n.give("web", groupsOne, time.Minute); err != nil {
			t.Fatal(err)
		}
		if all := n.wholes(); len(all) != 1 || all[0].AttachType != 0 {
			t.Errorf("%+v", all)
		}
	})
}

// TestWholeSurvivesKills kills the agent before and after every call of an ENI's
// life, with the ledger and without it: there is never a second ENI, and none is left.
func TestWholeSurvivesKills(t *testing.T) {
	for _, call := range []string{"create", "attach", "detach", "delete"} {
		for _, after := range []bool{false, true} {
			for _, lost := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s,after=%v,ledger lost=%v", call, after, lost), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { wholeKilled(t, call, after, lost) })
				})
			}
		}
	}
}

func wholeKilled(t *testing.T, call string, after, lost bool) {
	n := newWholeNode(t, 1)
	k := &killer{Cloud: n.api, at: map[string]int{"create": 1, "attach": 2, "detach": 2, "delete": 3}[call], after: after}
	if call == "attach" {
		n.region.Inject(cloud.Fault{Action: "vpc:CreateAndAttachNetworkInterface", Fail: true})
	}
	n.net.pool.cloud = k
	web, err := n.give("web", groupsTwo, time.Minute)
	if err == nil {
		n.end(web)
		err = n.engine(time.Hour, func() bool { return len(n.wholes()) == 0 })
	}
	if !errors.Is(err, errKilled) {
		t.Fatalf("not killed: %v", err)
	}
	if lost {
		time.Sleep(3 * time.Second) // as long as the cloud shows nothing, nobody can know
		n.net.Close()
		if err := os.RemoveAll(n.dir); err != nil {
			t.Fatal(err)
		}
	}
	n.restart()
	if _, err := n.give("web", groupsTwo, 5*time.Minute); err != nil {
		t.Fatal(err)
	}
	if all := n.wholes(); len(all) != 1 || !slices.Equal(all[0].SecurityGroups, groupsTwo) {
		t.Errorf("ENIs %+v", all)
	}
	n.end(n.state().pods()[0])
	if err := n.engine(2*time.Hour, func() bool { return len(n.wholes()) == 0 }); err != nil {
		t.Error(err)
	}
	n.holds(8)
}

// TestWholeTornOut: the condition names the pod, and the ENI is attached again as it was.
func TestWholeTornOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWholeNode(t, 1)
		web, err := n.give("web", groupsTwo, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.api.DetachENI(t.Context(), web.ENI, n.sealed.Facts.InstanceID, "torn"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		var seen error
		if err := n.engine(time.Minute, func() bool {
			if plan, err := n.net.pool.Plan(t.Context()); err != nil && plan.Empty() {
				seen = err
			}
			e := n.eni(web.ENI)
			return e.Instance != "" && e.State == tencent.StateAvailable
		}); err != nil {
			t.Fatal(err)
		}
		if node.ReasonOf(seen, "") != "ENIDetached" || !strings.Contains(seen.Error(), "default/web") {
			t.Errorf("condition %v", seen)
		}
		if e := n.eni(web.ENI); e.AttachType != tencent.AttachExtension {
			t.Errorf("%+v", e)
		}
		if _, err := n.run(time.Minute); err != nil {
			t.Error(err)
		}
	})
}

// TestWholeFaults: what keeps a pod from an ENI of its own is told to it, and is no
// trouble of the others.
func TestWholeFaults(t *testing.T) {
	const create = "vpc:CreateAndAttachNetworkInterface"
	for code, want := range map[string]string{
		"LimitExceeded": "QuotaExceeded", "RequestLimitExceeded": "Throttled", "ResourceInsufficient.Subnet": "SubnetExhausted", "UnauthorizedOperation": "Unauthorized",
	} {
		t.Run(code, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newWholeNode(t, 1)
				n.region.Inject(cloud.Fault{Action: create, Code: code, Times: 3})
				seen := map[string]bool{}
				p := Pod{Attachment: cni.Attachment{ContainerID: "web", IfName: "eth0"}}
				done := n.net.wants.add(p.Attachment, groupsOne)
				for range 20 {
					plan, err := n.net.pool.Plan(t.Context())
					if err == nil {
						err = n.net.pool.Apply(t.Context(), plan)
					}
					if err != nil {
						t.Fatalf("the pool's condition: %v", err)
					}
					seen[node.ReasonOf(n.net.wants.why(), "")] = true
					time.Sleep(200 * time.Millisecond)
				}
				done()
				if !seen[want] {
					t.Errorf("reasons %v, want %s", seen, want)
				}
				if _, err := n.give("web", groupsOne, 10*time.Minute); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestWholeGroupsChanged: an ENI whose groups somebody has changed is not given to
// pods that ask for what it had.
func TestWholeGroupsChanged(t *testing.T) {
	s := Slot{Number: exclusiveSlot, Groups: groupsTwo}
	for _, c := range []struct{ found, want []string }{
		{[]string{"sg-lab00001", "sg-lab00002"}, groupsTwo}, // in another order
		{groupsOne, groupsOne},
	} {
		slot := s
		if slot.regroup(tencent.ENI{SecurityGroups: c.found}); !slices.Equal(slot.Groups, c.want) {
			t.Errorf("%v are taken for %v", c.found, slot.Groups)
		}
	}
}

// TestWholeRefused holds what a pod is told that asks for more than the NodeConfig
// gives.
func TestWholeRefused(t *testing.T) {
	network := node.NetworkConfig{ExclusiveENIs: 1, SecurityGroupIDs: groupsOne, PodSecurityGroupIDs: groupsTwo}
	for _, c := range []struct {
		network node.NetworkConfig
		req     cni.Request
		groups  []string
		want    string // of the error
	}{
		{network, cni.Request{}, nil, ""},
		{network, cni.Request{Network: networkShared}, nil, ""},
		{network, cni.Request{Network: networkExclusive}, groupsOne, ""},
		{network, cni.Request{Network: networkExclusive, SecurityGroups: groupsTwo[:1]}, groupsTwo[:1], ""},
		{network, cni.Request{SecurityGroups: groupsTwo}, nil, "add the annotation tke.cloud.tencent.com/networks: tke-direct-eni"},
		{network, cni.Request{Network: "tke-bridge"}, nil, `"tke-bridge", want tke-route-eni or tke-direct-eni`},
		{network, cni.Request{Network: networkExclusive, SecurityGroups: []string{"sg-other001"}}, nil, "permits sg-lab00002, sg-lab00001"},
		{node.NetworkConfig{}, cni.Request{Network: networkExclusive}, nil, "set network.exclusiveENIs"},
		{node.NetworkConfig{ExclusiveENIs: 1}, cni.Request{Network: networkExclusive, SecurityGroups: groupsOne}, nil, "permits none"},
		{node.NetworkConfig{Allocator: node.AllocatorObserve}, cni.Request{Network: networkExclusive}, nil, "network.allocator is observe"},
	} {
		n := &Network{sealed: func() (node.Sealed, bool) { return node.Sealed{Config: node.Config{Network: c.network}}, true }}
		groups, whole, err := n.whole(c.req)
		if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "the pod's network is refused")) ||
			c.want == "" && err != nil || whole != (c.groups != nil) || !slices.Equal(groups, c.groups) {
			t.Errorf("%+v: %v, %v, %v; want %v, %q", c.req, groups, whole, err, c.groups, c.want)
		}
	}
	for _, groups := range [][]string{{"sg-"}, {"SG-12345678"}, {"sg-12345678;x"}, slices.Repeat(groupsOne, maxGroups+1)} {
		req := cni.Request{Command: cni.Add, Attachment: cni.Attachment{ContainerID: "c", IfName: "eth0"}, NetNS: "/n", Network: networkExclusive, SecurityGroups: groups}
		if err := validate(req); err == nil || err.Code != cni.CodeRefused {
			t.Errorf("%q: %v", groups, err)
		}
	}
}

// TestWholeDualStack: on a node of both families an ENI has an IPv6 address before a
// pod gets it, and the pod gets both; also where the node becomes one of both later.
func TestWholeDualStack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newWholeNode(t, 2)
		four, err := n.give("four", groupsOne, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		n.sealed.Config.Network.IPFamilies = dualStack
		both, err := n.give("both", groupsOne, time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.engine(time.Minute, func() bool { return len(n.state().Slots[four.Slot].Addrs6) == 1 }); err != nil {
			t.Fatal(err)
		}
		if four.Addr6.IsValid() || !both.Addr6.IsValid() || both.ENI == four.ENI {
			t.Errorf("%+v and %+v", four, both)
		}
		for _, e := range n.wholes() {
			if len(e.IP6s) != 1 || len(e.IPs) != 1 || e.ID == both.ENI && e.IP6s[0].Addr != both.Addr6 {
				t.Errorf("%+v", e)
			}
		}
		n.end(both)
		rests := n.state().Rested
		if !rests[both.Addr].After(time.Now()) || !rests[both.Addr6].After(time.Now()) {
			t.Errorf("rests: %v", rests)
		}
		again, err := n.give("again", groupsOne, 5*time.Minute)
		if err != nil || again.ENI != both.ENI || again.Addr6 != both.Addr6 {
			t.Errorf("%+v, %v", again, err)
		}
		n.end(four)
		n.end(again)
		if err := n.engine(time.Hour, func() bool { return len(n.wholes()) == 0 }); err != nil {
			t.Error(err)
		}
	})
}
