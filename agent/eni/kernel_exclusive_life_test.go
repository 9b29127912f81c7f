//go:build kernel

package eni

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/vpc"
)

// plugger plugs the ENIs that the lab's cloud attaches into the test's node, as taps.
type plugger struct {
	idle
	n *testNode

	mu    sync.Mutex
	ports map[string]vpc.Port
	taps  map[string]*os.File
	count int // of NICs that were plugged
}

func (p *plugger) Attach(port cloud.Port) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ports[port.ENI] = vpc.Port{ENI: port.ENI, MAC: port.MAC, Subnet: port.Subnet, Addrs: port.Addrs}
	return nil
}

func (p *plugger) Detach(eni string) error { return p.n.vpc.Detach(eni) }

func (p *plugger) PlugNIC(_ context.Context, _ string, nic cloud.NIC) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	tap, err := vpc.NewTap(fmt.Sprint("tap", p.count), nic.MAC)
	p.count++
	if err != nil {
		return err
	}
	p.taps[nic.ENI] = tap
	return p.n.vpc.AttachTap(p.ports[nic.ENI], tap)
}

func (p *plugger) UnplugNIC(_ context.Context, _, eni string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taps[eni].Close() // with the file the link goes, wherever it is
}

func (p *plugger) plugged() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.count
}

// inWholeRegion makes the node an instance of the lab's region whose attached ENIs
// are plugged in.
func (n *testNode) inWholeRegion() (*plugger, *tencent.Client) {
	t := n.t
	config := cloud.Default()
	config.Log, config.Delays = slog.New(slog.DiscardHandler), cloud.Delays{Attach: 20 * time.Millisecond}
	p := &plugger{n: n, ports: map[string]vpc.Port{}, taps: map[string]*os.File{}}
	region, err := cloud.New(config, p, p)
	must(t, err)
	t.Cleanup(region.Close)
	in, err := region.Launch(t.Context(), cloud.InstanceSpec{UserData: []byte("kind: NodeConfig\n")})
	must(t, err)
	metadata := tencent.NewMetadata(tencent.MetadataURL)
	metadata.HTTP.Transport = direct{region.Metadata(), in.PrivateIP.String()}
	api, err := tencent.NewClient(node.CloudConfig{APIDomain: config.Domain}, config.Region, metadata)
	must(t, err)
	api.HTTP.Transport = direct{region.API(), in.PrivateIP.String()}
	n.cloud, n.sealed.Facts.InstanceID, n.sealed.Facts.VPCID = api, in.ID, config.VPCID
	n.permitWhole()
	c := &n.sealed.Config
	c.Cluster.ID = "cls-lab00001"
	c.Network.SubnetIDs, c.Network.SecurityGroupIDs, c.Network.PodSecurityGroupIDs = []string{"subnet-pods0001"}, groupsOne, groupsTwo
	c.Network.ENIs, c.Network.WarmIPs = 1, node.WarmIPs{Min: 2, Max: 2}
	n.restart()
	return p, api
}

// keep runs both modules until stop is called, as the engine does.
func (n *testNode) keep() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for _, m := range []interface {
		Plan(context.Context) (node.Plan, error)
		Apply(context.Context, node.Plan) error
	}{n.net.Pool(), n.net.Paths()} {
		running.Go(func() {
			for ctx.Err() == nil {
				if p, err := m.Plan(ctx); err == nil {
					_ = m.Apply(ctx, p) // the next plan sees
				}
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	return func() {
		cancel()
		running.Wait()
	}
}

// eventually waits until something holds.
func (n *testNode) eventually(what string, holds func() bool) {
	n.t.Helper()
	for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("not %s after 20 s", what)
		}
	}
}

// replies reports whether the VPC reaches something at the address.
func (n *testNode) replies(to netip.Addr) bool {
	got, err := originAt(n.dialFrom(vpcPeer), netip.AddrPortFrom(to, 80))
	return err == nil && got == vpcPeer.String()
}

// TestKernelExclusiveLife has a pod ask for an ENI with security groups: it is made in
// the cloud, moved into the pod, torn out, attached again, and outlives the agent.
func TestKernelExclusiveLife(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		nics, api := n.inWholeRegion()
		stop, stopServing := n.keep(), n.serve()
		n.eventually("configured", func() bool { return len(n.net.paths.readySlots()) == 1 })
		db := newPod(t, "db")
		result, err := db.plugin("ADD", asks(networkExclusive, "sg-lab00002, sg-lab00001"))
		must(t, err)
		addr := netip.MustParsePrefix(result["ips"].([]any)[0].(map[string]any)["address"].(string)).Addr()
		db.listen()
		n.listen(vpcPeer)
		n.reached(addr)
		n.reach(db, vpcPeer, addr)
		s, err := n.net.State()
		must(t, err)
		e := s.ENIs[1]
		if !e.Exclusive || e.Device != "eth0 in default/db" || !slices.Equal(e.SecurityGroups, groupsTwo) || s.Pods[0].State != "wired" {
			t.Errorf("state %+v", s)
		}
		n.explainsWhole(api)

		// Another agent finds everything as it should be.
		stop()
		stopServing()
		n.restart()
		p, err := n.net.Paths().Plan(t.Context())
		if err != nil || !p.Empty() {
			t.Errorf("plan of the next agent: %v\n%s", err, p)
		}
		stop, stopServing = n.keep(), n.serve()
		n.reached(addr)

		// Somebody detaches it.
		_, err = api.DetachENI(t.Context(), e.ENI, n.sealed.Facts.InstanceID, "torn")
		must(t, err)
		n.eventually("plugged in again", func() bool { return nics.plugged() == 3 })
		n.eventually("attached again, and in the pod", func() bool { return n.replies(addr) })
		if _, err := db.plugin("CHECK", map[string]any{"prevResult": map[string]any{"ips": []any{}}}); err != nil {
			t.Error(err)
		}
		// Its link comes to the node, as if somebody moved it.
		n.moveOut(db, e.MAC)
		n.eventually("in the pod again", func() bool { return n.replies(addr) })
		n.noWrongFrames()

		for _, c := range []struct{ network, groups, want string }{
			{"", "sg-lab00001", `"code":104`}, {networkExclusive, "sg-other001", "network.podSecurityGroupIDs"}, {networkExclusive, "../x", `"code":104`},
		} {
			if _, err := newPod(t, "refused").plugin("ADD", asks(c.network, c.groups)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%+v: %v", c, err)
			}
		}
		if _, err := db.plugin("DEL", nil); err != nil {
			t.Error(err)
		}
		l, err := netlink.LinkByName(parkedName(e.MAC))
		must(t, err)
		all, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil || len(all) > 0 || l.Attrs().Flags&net.FlagUp != 0 {
			t.Errorf("the link after DEL: %+v, %v, %v", l.Attrs(), all, err)
		}
		stop()
		stopServing()
		n.noWrongFrames()
	})
}

// explainsWhole asks about the pod while all is well, and when somebody has changed
// its security groups.
func (n *testNode) explainsWhole(api *tencent.Client) {
	n.t.Helper()
	e, err := n.net.Explain(n.t.Context(), Question{Pod: "default/db"})
	must(n.t, err)
	text := fmt.Sprintf("%+v", e)
	for _, want := range []string{"security groups sg-lab00002, sg-lab00001", "none, it leaves as", "chain exclusive", "it leaves as 10.0.0.5, the node's own"} {
		if !strings.Contains(text, want) {
			n.t.Errorf("%q is not explained", want)
		}
	}
	if e.Problems() > 0 {
		n.t.Errorf("problems in %s", text)
	}
	s, err := n.net.ledger.state()
	must(n.t, err)
	pod := s.pods()[0]
	pod.Groups = "sg-lab00002"
	must(n.t, n.net.ledger.record(record{Pod: &pod}))
	if e, err = n.net.Explain(n.t.Context(), Question{Pod: "default/db"}); err != nil || e.Problems() != 1 {
		n.t.Errorf("other groups: %+v, %v", e, err)
	}
	pod.Groups = "sg-lab00002,sg-lab00001"
	must(n.t, n.net.ledger.record(record{Pod: &pod}))
}

// moveOut moves an ENI's link out of the pod to the node, under the name that it has.
func (n *testNode) moveOut(p *pod, mac string) {
	n.t.Helper()
	home, err := os.Open("/proc/thread-self/ns/net")
	must(n.t, err)
	defer home.Close()
	must(n.t, p.enter(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetDown(l); err != nil {
			return err
		}
		if err := netlink.LinkSetName(l, "dev7"); err != nil {
			return err
		}
		return netlink.LinkSetNsFd(l, int(home.Fd()))
	}))
}

// TestKernelExclusiveInterrupted stops an ADD and a DEL after every step, as a kill
// does, and starts the agent anew.
func TestKernelExclusiveInterrupted(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.permitWhole()
		n.attach("eth1")
		n.attachWhole("eth2")
		n.converge()
		before := n.kernelDump()
		db := newPod(t, "db")
		pod := Pod{Attachment: keyOf(db.container()), Namespace: "default", Name: "db", NetNS: db.path()}
		n.listen(vpcPeer)
		steps := len(n.net.policy().podObjects(Pod{Slot: exclusiveSlot}))
		for done := range steps + 1 {
			now := time.Now().Add(time.Duration(done) * 2 * coolDown)
			rested, _ := n.net.ledger.unclean(now)
			n.net.ledger.cleaned(rested)
			got, _, err := n.net.ledger.allocateWhole(pod, []string{"sg-web00001"}, map[int]int{exclusiveSlot: 1500}, now)
			must(t, err)
			if !got.Addr.IsValid() {
				t.Fatalf("step %d: no ENI", done)
			}
			n.putFirst(n.net.policy().podObjects(got), done)
			n.restart()
			n.converge()
			if steps, err := n.net.paths.check(got); err != nil || len(steps) > 0 && !n.repeats(got) {
				t.Errorf("after %d steps: %v, %v", done, steps, err)
			}
			n.reach(db, vpcPeer, wholeAddr)

			// The DEL, killed when the link is out and nothing is recorded; then the next.
			k, err := n.net.paths.begin()
			must(t, err)
			must(t, k.takeOut(got))
			n.net.paths.end(k)
			n.restart()
			n.converge()
			n.reach(db, vpcPeer, wholeAddr)
			must(t, n.net.del(got.Attachment))
			must(t, n.net.paths.reap())
			n.restart()
			n.converge()
			if after := n.kernelDump(); !sameLinks(after, before) {
				t.Fatalf("after %d steps and DEL:\n%s\nbefore:\n%s", done, after, before)
			}
		}
		n.noWrongFrames()
	})
}

// sameLinks compares dumps but for the index of the link that was in the pod.
func sameLinks(a, b string) bool {
	plain := func(s string) string { return regexp.MustCompile(`\d+: eth5254`).ReplaceAllString(s, "eth5254") }
	return plain(a) == plain(b)
}

func (n *testNode) putFirst(objects []object, count int) {
	n.t.Helper()
	k, err := n.net.paths.begin()
	must(n.t, err)
	defer n.net.paths.end(k)
	for _, o := range objects[:count] {
		must(n.t, o.put(k))
	}
}

// repeats reports whether the ADD, which the runtime repeats, makes the pod whole: a
// veth that is there says that its inside was made, and that is left alone.
func (n *testNode) repeats(p Pod) bool {
	must(n.t, n.net.paths.wire(p))
	steps, err := n.net.paths.check(p)
	return err == nil && len(steps) == 0
}

// TestKernelExclusiveRepaired deletes everything of a pod on the node, step by step.
func TestKernelExclusiveRepaired(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.permitWhole()
		n.attach("eth1")
		n.attachWhole("eth2")
		n.converge()
		defer n.serve()()
		db := newPod(t, "db")
		db.addWhole()
		db.listen()
		n.listen(vpcPeer)
		l, err := net.Listen("tcp", netip.AddrPortFrom(nodeAddr, 80).String())
		must(t, err)
		defer l.Close()
		go tellOrigin(l)
		host, _, _ := vethOf(keyOf(db.container()))
		for _, s := range []string{
			"ip rule del pref 511 iif lo", "ip rule del pref 511 fwmark 0x22000000/0x3f000000", "ip route flush table 4017", "nft delete table inet tkenode",
			"nft flush map inet tkenode pods", "nft flush chain inet tkenode exclusive", "ip link set " + host + " down", "ip link del " + host,
		} {
			sh(t, s)
			if got := n.converge(); got == "" {
				t.Errorf("%s: nothing to do", s)
			}
			n.probe(wholeAddr)
			n.reach(db, vpcPeer, wholeAddr)
			n.reach(db, nodeAddr, wholeAddr)
			if _, err := db.plugin("CHECK", map[string]any{"prevResult": map[string]any{"ips": []any{}}}); err != nil {
				t.Errorf("%s: %v", s, err)
			}
		}
		// What is wrong inside, CHECK says.
		must(t, db.enter(func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", []byte("0"), 0)
		}))
		if _, err := db.plugin("CHECK", map[string]any{"prevResult": map[string]any{"ips": []any{}}}); err == nil || !strings.Contains(err.Error(), "eth0 up (was eth0 up with disable_ipv6=0)") {
			t.Errorf("CHECK with IPv6: %v", err)
		}
		must(t, db.enter(func() error {
			return os.WriteFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", []byte("1"), 0)
		}))
	})
}
