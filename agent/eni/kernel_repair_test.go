//go:build kernel

package eni

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/lab/vpc"
)

// sh runs commands of iproute2 and nft, as an adversary or another program would.
func sh(t *testing.T, script string) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", script, err, out)
	}
}

// TestKernelRepairs breaks what the paths have made, one thing at a time. Each
// must show in the plan, and pods must be reached again once it is applied.
func TestKernelRepairs(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, client := newPod(t, "web"), newPod(t, "client")
		webAddr, clientAddr := web.add(), client.add()
		web.listen()
		host, hostMAC, _ := vethOf(keyOf(web.container()))
		tableText := "nft table inet tkenode: layout 4, 16 slots, outside by \"eth0\" as 10.0.0.5, inside [10.0.0.0/8 172.16.0.0/12]\n"

		for _, c := range []struct{ script, plan string }{
			{"ip rule del pref 512", "add rule 512 from all lookup 4000\n"},
			{"ip rule flush; ip rule add pref 32766 lookup main", "add rule 512 from all lookup 4000\nadd rule 1568 from 10.0.16.4 lookup 4001\nadd rule 1536 from all fwmark 0x1000000/0x3f000000 lookup 4001\n"},
			{"ip rule add pref 1537 proto 154 fwmark 0x2000000/0x3f000000 lookup 4002", "delete rule 1537 from all fwmark 0x2000000/0x3f000000 lookup 4002\n"},
			{"ip rule add pref 512 proto 154 iif lo lookup 4000", "delete rule 512 from all iif lo lookup 4000\n"},
			{"ip route flush table 4001", "add route default metric 4294967295 table 4001: unreachable\nadd route default table 4001: via 10.0.16.1 dev eth1 onlink\n"},
			{"ip route replace default via 10.0.0.1 dev eth0 onlink table 4001 proto 154", "set route default table 4001: via 10.0.16.1 dev eth1 onlink (was via 10.0.0.1 dev eth0 onlink)\n"},
			{"ip route flush table 4000", "add route " + webAddr.String() + " table 4000: dev " + host + "\n"},
			{"ip route add 10.0.31.9 dev eth0 table 4000", "delete route 10.0.31.9 table 4000: "},
			{"nft delete table inet tkenode", "add " + tableText},
			{"nft flush ruleset", "add " + tableText},
			{"nft flush chain inet tkenode pods", "set " + strings.TrimSuffix(tableText, "\n") + " (was rules of chain pods are not ours)\n"},
			{"nft insert rule inet tkenode pods drop", "set " + strings.TrimSuffix(tableText, "\n") + " (was rules of chain pods are not ours)\n"},
			{"nft add chain inet tkenode other", "set " + strings.TrimSuffix(tableText, "\n") + " (was with chains that are not ours)\n"},
			{"nft flush chain inet tkenode outside", "(was rules of chain outside are not ours)\n"},
			{"nft add element inet tkenode inside { 203.0.113.0/24 }", "(was another inside)\n"},
			{"nft flush chain inet tkenode guard", "(was rules of chain guard are not ours)\n"},
			{"nft add element inet tkenode metadata { 10.0.16.99 }", "delete nft metadata 10.0.16.99\n"},
			{"nft flush map inet tkenode pods", "add nft pod " + webAddr.String() + ": slot 0\n"},
			{"nft delete element inet tkenode pods { " + clientAddr.String() + " }; nft add element inet tkenode pods { " + clientAddr.String() + " : jump slot3 }",
				"set nft pod " + clientAddr.String() + ": slot 0 (was slot 3)\n"},
			{"nft add element inet tkenode pods { 10.0.16.99 : jump slot0 }", "delete nft pod 10.0.16.99: slot 0\n"},
			{"sysctl -qw net.ipv4.ip_forward=0", "set sysctl net/ipv4/ip_forward: 1 (was 0)\n"},
			{"sysctl -qw net.ipv4.conf.eth1.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1 net.ipv4.conf.all.rp_filter=1", "set sysctl net/ipv4/conf/eth1/rp_filter: 2 (was 1)\n"},
			{"sysctl -qw net.ipv4.conf.eth1.forwarding=0 net.ipv4.conf.eth0.forwarding=0", "set sysctl net/ipv4/conf/eth1/forwarding: 1 (was 0)\n"},
			{"sysctl -qw net.ipv4.conf." + host + ".forwarding=0", "set sysctl net/ipv4/conf/" + host + "/forwarding: 1 (was 0)\n"},
			{"sysctl -qw net.ipv6.conf." + host + ".disable_ipv6=0", "set sysctl net/ipv6/conf/" + host + "/disable_ipv6: 1 (was 0)\n"},
			{"ip link set eth1 down", "set link eth1: up mac 52:54:00:00:00:02 (was down mac 52:54:00:00:00:02)\nadd route default table 4001: via 10.0.16.1 dev eth1 onlink\n"},
			{"ip addr flush dev eth1", "add address 10.0.16.4 dev eth1\n"},
			{"ip link set " + host + " down", "set link " + host + ": up mac " + hostMAC + " mtu 1500 (was down "},
			{"ip link set " + host + " address 02:00:00:00:00:99", "(was up mac 02:00:00:00:00:99 mtu 1500)\n"},
			{"ip link set " + host + " mtu 1400", "(was up mac " + hostMAC + " mtu 1400)\n"},
			{"ip link set " + host + " alias ''", "set veth " + host + ": default/web address " + webAddr.String() + " slot 0 container c0ffeeweb eth0 (was no pod)\n"},
			{"ip link del " + host, "add veth " + host},
			{"ip link add eni0123456789a type veth peer name x; ip link set eni0123456789a alias 'tkenode 10.0.16.9 0 dead eth0 default/dead'", "delete veth eni0123456789a: default/dead address 10.0.16.9 slot 0 container dead eth0\n"},
			{"rm -r " + n.net.paths.conflist + " /run/tkenode/network-configured", "add file /run/tkenode/network-configured"},
		} {
			sh(t, c.script)
			if got := n.converge(); !strings.Contains(got, c.plan) {
				t.Errorf("%s: plan:\n%swant in it:\n%s", c.script, got, c.plan)
			}
			n.reached(webAddr)
			n.reach(client, webAddr, clientAddr)
		}
	})
}

// TestKernelLeavesOthersAlone holds that what is not ours survives.
func TestKernelLeavesOthersAlone(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		others := []string{
			"ip rule add pref 1000 lookup 77", "ip rule add pref 1536 fwmark 0x99 lookup 77", "ip route add 192.0.2.0/24 via 10.0.0.1 table 77",
			"ip route add 192.0.2.0/24 via 10.0.0.1", "ip link add eni-other type veth peer name enip0", "nft add table inet other",
			"ip link add eni00000000000 type veth peer name z", "nft 'add table ip tkenode'",
		}
		for _, s := range others {
			sh(t, s)
		}
		before := n.kernelDump()
		n.attach("eth1")
		n.converge()
		after := n.kernelDump()
		for line := range strings.Lines(before) {
			if !strings.Contains(after, line) && !strings.Contains(line, "eth1") {
				t.Errorf("gone or changed: %s", line)
			}
		}
	})
}

// TestKernelInterrupted stops an ADD after every step, as a kill does, and starts
// the agent anew: the pod is whole after one plan, or nothing is left of it.
func TestKernelInterrupted(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		before := n.kernelDump()
		p := newPod(t, "web")
		pod := Pod{Attachment: keyOf(p.container()), Namespace: "default", Name: "web", NetNS: p.path()}
		steps := len(n.net.policy().podObjects(pod))
		for done := range steps + 1 {
			now := time.Now().Add(time.Duration(done) * 2 * coolDown)
			rested, _ := n.net.ledger.unclean(now)
			n.net.ledger.cleaned(rested)
			got, _, err := n.net.ledger.allocate(pod, map[int]int{0: 1500}, now)
			must(t, err)
			k, err := n.net.paths.begin()
			must(t, err)
			for _, o := range n.net.policy().podObjects(got)[:done] {
				must(t, o.put(k))
			}
			n.net.paths.end(k)
			n.restart()
			n.converge()
			stop := n.serve()
			if _, err := p.plugin("ADD", nil); err != nil { // as the runtime repeats it
				t.Error(err)
			}
			if _, err := p.plugin("CHECK", map[string]any{"prevResult": map[string]any{}}); err != nil {
				t.Errorf("stopped after %d of %d steps: %v", done, steps, err)
			}
			if _, err := p.plugin("DEL", nil); err != nil {
				t.Error(err)
			}
			stop()
			n.restart()
			n.converge()
			if after := n.kernelDump(); after != before {
				t.Errorf("stopped after %d of %d steps, after DEL:\n%s\nbefore:\n%s", done, steps, after, before)
			}
		}
	})
}

// TestKernelENILost tears the ENI out under a pod, and plugs it in again as
// another device. Meanwhile no packet of the pod leaves by the primary ENI.
func TestKernelENILost(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		tap := n.plug(n.eni, "eth1")
		n.record()
		n.converge()
		defer n.serve()()
		web := newPod(t, "web")
		addr := web.add()
		web.listen()
		n.reached(addr)

		must(t, n.vpc.Detach(n.eni.ENI))
		tap.Close()
		waitGone(t, "eth1")
		primary := n.vpc.Counters()["eni-primary"].Tx
		if _, err := n.net.Paths().Plan(t.Context()); node.ReasonOf(err, "") != "LinkMissing" {
			t.Errorf("plan without the link: %v", err)
		}
		if err := web.enter(func() error {
			_, err := origin((&net.Dialer{}).DialContext, vpcPeer)
			return err
		}); err == nil || !strings.Contains(err.Error(), "no route to host") {
			t.Errorf("connect without the ENI: %v, want no route to host", err)
		}
		if now := n.vpc.Counters()["eni-primary"].Tx; now != primary {
			t.Errorf("%d packets left by the primary ENI", now.Packets-primary.Packets)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := n.net.allocate(ctx, Pod{Attachment: keyOf("other")}); err == nil || !strings.Contains(err.Error(), "no ENI is ready") {
			t.Errorf("address of a lost ENI: %v", err)
		}

		n.plug(n.eni, "eth7")
		n.converge()
		n.reached(addr)
		n.noWrongFrames()
	})
}

func waitGone(t *testing.T, dev string) {
	t.Helper()
	for range 100 {
		if _, err := os.Stat("/proc/sys/net/ipv4/conf/" + dev); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("%s stays", dev)
}

// TestKernelPodCannotSpoof holds that a pod has its own address and no other.
func TestKernelPodCannotSpoof(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web := newPod(t, "web")
		addr := web.add()
		must(t, web.enter(func() error {
			out, err := exec.Command("sh", "-ec", "ip addr add 10.0.16.200/32 dev eth0").CombinedOutput()
			if err != nil {
				t.Logf("%s", out)
			}
			return err
		}))
		before := n.vpc.Counters()
		err := web.enter(func() error {
			_, err := origin((&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 0, 16, 200)}, Timeout: time.Second}).DialContext, vpcPeer)
			return err
		})
		if err == nil {
			t.Error("connected with another address")
		}
		after := n.vpc.Counters()
		for eni := range after {
			if eni != vpc.Lab && after[eni].Tx.Packets > before[eni].Tx.Packets+1 { // a question for a MAC may be under way
				t.Errorf("%s sent %d packets", eni, after[eni].Tx.Packets-before[eni].Tx.Packets)
			}
		}
		web.listen()
		n.reached(addr)
		n.noWrongFrames()
	})
}

// TestKernelWatch holds that every kind of change wakes the paths.
func TestKernelWatch(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		ctx, cancel := context.WithCancel(t.Context())
		woken := make(chan struct{}, 1)
		done := make(chan error)
		go func() {
			done <- n.net.Paths().Watch(ctx, func() {
				select {
				case woken <- struct{}{}:
				default:
				}
			})
		}()
		time.Sleep(200 * time.Millisecond)
		for _, script := range []string{
			"ip rule del pref 512", "ip route flush table 4001", "nft flush ruleset", "ip link set eth1 down", "ip addr flush dev eth0",
			"sysctl -qw net.ipv4.ip_forward=0", "sysctl -qw net.ipv4.conf.eth1.rp_filter=1", "ip link add dev x type veth peer name y",
		} {
			drain(woken)
			sh(t, script)
			select {
			case <-woken:
			case <-time.After(2 * time.Second):
				t.Errorf("%s: not woken", script)
			}
		}
		drain(woken)
		must(t, n.net.ledger.record(record{Slot: &Slot{Number: 1}}))
		select {
		case <-woken:
		case <-time.After(2 * time.Second):
			t.Error("the ledger does not wake")
		}
		cancel()
		if err := <-done; err == nil {
			t.Error("watch ended without an error")
		}
	})
}

// drain takes wakes until there are none for a while.
func drain(woken chan struct{}) {
	for {
		select {
		case <-woken:
		case <-time.After(150 * time.Millisecond):
			return
		}
	}
}

// TestKernelADDWaitsForAddress holds that an ADD waits for the ENI, and gets its
// address as soon as the paths are there.
func TestKernelADDWaitsForAddress(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		_, err := n.net.ledger.state()
		must(t, err)
		defer n.serve()()
		web := newPod(t, "web")
		added := make(chan netip.Addr)
		go func() { added <- web.add() }()
		select {
		case a := <-added:
			t.Fatalf("got %s without an ENI", a)
		case <-time.After(300 * time.Millisecond):
		}
		n.attach("eth1")
		n.converge()
		select {
		case a := <-added:
			web.listen()
			n.reached(a)
		case <-time.After(5 * time.Second):
			t.Fatal("still waiting")
		}
	})
}
