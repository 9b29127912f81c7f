//go:build kernel

package eni

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// TestKernelDualStackNodePort sends connections through destination NAT as kube-proxy
// makes it. What came in by the primary ENI is answered by it; what a pod opens leaves
// by the pod's ENI, wherever it goes.
func TestKernelDualStackNodePort(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.primary6()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, client := newPod(t, "web"), newPod(t, "client")
		_, web6 := web.add6()
		_, client6 := client.add6()
		web.listen()
		n.listen(outsider6)
		sh(t, `nft -f - <<EOF
table ip6 proxy {
	chain nat-prerouting {
		type nat hook prerouting priority dstnat
		ip6 daddr `+nodeAddr6.String()+` tcp dport 30080 dnat to [`+web6.String()+`]:80
		ip6 daddr fd00::10 tcp dport 80 dnat to [`+web6.String()+`]:80
	}
}
EOF`)
		for range 2 {
			for _, from := range []netip.Addr{outsider6, vpcPeer6} {
				n.reachedAt(from, netip.AddrPortFrom(nodeAddr6, 30080), from)
			}
			n.reach(client, netip.MustParseAddr("fd00::10"), client6)
			n.reach(client, outsider6, client6)
			n.noWrongFrames()
			n.sealed.Config.Network.Layout = node.LayoutTKECompat
			n.converge()
		}
	})
}

// TestKernelDualStackTKECompat switches a node with pods to TKE's layout and back.
func TestKernelDualStackTKECompat(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, client := newPod(t, "web"), newPod(t, "client")
		_, web6 := web.add6()
		_, client6 := client.add6()
		web.listen()
		n.listen(vpcPeer6)
		mark := n.kernelDump()
		n.sealed.Config.Network.Layout = node.LayoutTKECompat
		n.converge()
		compat := n.kernelDump()
		for _, want := range []string{
			"512:	from all to " + web6.String() + " lookup main proto 154\n", "1536:	from " + web6.String() + " lookup 4001 proto 154\n",
		} {
			if !strings.Contains(compat, want) {
				t.Errorf("no rule %q in\n%s", want, compat)
			}
		}
		third := newPod(t, "third")
		third.listen()
		_, third6 := third.add6()
		for _, a := range []netip.Addr{web6, third6} {
			n.reached(a)
			n.reach(client, a, client6)
		}
		n.reach(client, vpcPeer6, client6)
		third.del()
		must(t, n.net.paths.reap())
		if after := n.kernelDump(); sorted(after) != sorted(compat) {
			t.Errorf("after DEL:\n%s\nbefore ADD:\n%s", after, compat)
		}
		n.sealed.Config.Network.Layout = node.LayoutMark
		n.converge()
		if after := n.kernelDump(); sorted(after) != sorted(mark) {
			t.Errorf("after both switches:\n%s\nbefore:\n%s", after, mark)
		}
		n.reached(web6)
		n.noWrongFrames()
	})
}

// TestKernelDualStackComesAndGoes turns IPv6 on and off under pods: each keeps what it
// was made with, and nothing of IPv6 is left when the last pod that has it ends.
func TestKernelDualStackComesAndGoes(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		four := n.eni.Addrs
		n.dual()
		dual := n.eni.Addrs
		n.plug(n.eni, "eth1")
		n.sealed.Config.Network.IPFamilies, n.eni.Addrs = nil, four
		n.record()
		n.converge()
		defer n.serve()()
		before := n.kernelDump()
		old := newPod(t, "old")
		oldAddr := old.add()
		old.listen()

		n.sealed.Config.Network.IPFamilies = []node.IPFamily{node.IPv4, node.IPv6}
		if _, err := n.net.Paths().Plan(t.Context()); node.ReasonOf(err, "") != "IPv6Missing" {
			t.Errorf("plan before there is an IPv6 address: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := n.net.allocate(ctx, Pod{Attachment: keyOf("early"), Addr6: wantsIPv6}); err == nil || !strings.Contains(err.Error(), "no ENI is ready") {
			t.Errorf("allocated without IPv6: %v", err)
		}
		n.eni.Addrs = dual
		n.record()
		n.converge()
		young := newPod(t, "young")
		_, six := young.add6()
		young.listen()
		n.reached(six)
		n.reached(oldAddr)
		if again := old.add(); again != oldAddr {
			t.Errorf("repeated ADD: %s, want %s", again, oldAddr)
		}

		n.sealed.Config.Network.IPFamilies = nil
		n.converge()
		n.reached(six)
		young.del()
		old.del()
		n.eni.Addrs = four
		n.record() // as the pool does
		n.converge()
		must(t, n.net.paths.reap())
		if after := n.kernelDump(); sorted(after) != sorted(before) {
			t.Errorf("after IPv6 is gone:\n%s\nbefore:\n%s", after, before)
		}
		n.noWrongFrames()
	})
}

// TestKernelDualStackReuse holds that a pod gets an IPv6 address only after the kernel
// has forgotten the connections of the pod that had it, and not while it is routed.
func TestKernelDualStackReuse(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		old := newPod(t, "old")
		four, six := old.add6()
		old.listen()
		n.reached(six)
		for a, want := range map[netip.Addr]bool{six: true, n.eni.Addrs[6]: false} {
			if there, err := routed(a); there != want || err != nil {
				t.Errorf("%s is routed: %v, %v", a, there, err)
			}
		}
		old.del()
		if len(flows(t, six)) == 0 {
			t.Fatal("the connections are not tracked")
		}
		l := n.net.ledger
		must(t, l.record(record{Rest: &rest{Addr: four, Addr6: six, Until: time.Now()}}))
		slot := l.now.Slots[0]
		slot.Addrs6 = []netip.Addr{six}
		must(t, l.record(record{Slot: &slot}))
		ready := n.net.paths.readySlots()
		asks := Pod{Attachment: keyOf("early"), Addr6: wantsIPv6}
		if p, short, err := l.allocate(asks, ready, time.Now()); err != nil || p.Addr.IsValid() ||
			short.String() != "IPv4: 0 of 3 addresses in use, 1 being made ready; IPv6: 0 of 1 addresses in use, 1 being made ready" {
			t.Errorf("allocated %s while connections are remembered: %s, %v", p.Addr6, short, err)
		}
		if got := n.converge(); !strings.Contains(got, "forget connections of the last pods of ["+four.String()+" "+six.String()+"]\n") {
			t.Errorf("plan:\n%s", got)
		}
		if left := flows(t, six); len(left) > 0 {
			t.Errorf("remembered: %v", left)
		}
		if p, _, err := l.allocate(asks, ready, time.Now()); err != nil || p.Addr6 != six {
			t.Errorf("allocated %s, %v", p.Addr6, err)
		}
	})
}

// TestKernelDualStackRebuilt loses the ledger under a pod: the kernel knows both of
// its addresses.
func TestKernelDualStackRebuilt(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		n.converge()
		stop := n.serve()
		web := newPod(t, "web")
		four, six := web.add6()
		web.listen()
		stop()
		must(t, n.net.Close())
		must(t, os.Remove(filepath.Join(n.dir, "ledger")))
		n.start()
		s, err := n.net.ledger.state()
		must(t, err)
		if p := s.Pods[keyOf(web.container())]; len(s.Pods) != 1 || p.Addr != four || p.Addr6 != six {
			t.Fatalf("pods %+v", s.Pods)
		}
		if p, err := n.net.Paths().Plan(t.Context()); !p.Empty() || node.ReasonOf(err, "") != "ENIUnknown" {
			t.Errorf("plan before the cloud has said anything: %v\n%s", err, p)
		}
		// The pool cannot know which address was the ENI's own, and takes another.
		slices.Reverse(n.eni.Addrs[5:])
		n.eni.Addrs[4], n.eni.Addrs[5] = n.eni.Addrs[5], n.eni.Addrs[4]
		n.record()
		if got := n.converge(); !strings.Contains(got, "delete address "+n.eni.Addrs[5].String()+" dev eth1\n") {
			t.Errorf("plan:\n%s", got)
		}
		n.reached(six)
		n.reached(four)
	})
}

// TestKernelDualStackInterrupted stops an ADD after every step, as a kill does.
func TestKernelDualStackInterrupted(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		n.converge()
		before := n.kernelDump()
		p := newPod(t, "web")
		pod := Pod{Attachment: keyOf(p.container()), Namespace: "default", Name: "web", NetNS: p.path(), Addr6: wantsIPv6}
		steps := 1
		for done := 0; done <= steps; done++ {
			now := time.Now().Add(time.Duration(done) * 2 * coolDown)
			rested, _ := n.net.ledger.unclean(now)
			n.net.ledger.cleaned(rested)
			got, short, err := n.net.ledger.allocate(pod, map[int]int{0: 1500}, now)
			must(t, err)
			if !got.Addr6.IsValid() {
				t.Fatalf("no address: %s", short)
			}
			objects := n.net.policy().podObjects(got)
			steps = len(objects)
			k, err := n.net.paths.begin()
			must(t, err)
			for _, o := range objects[:done] {
				must(t, o.put(k))
			}
			n.net.paths.end(k)
			n.restart()
			n.converge()
			stop := n.serve()
			p.add6() // as the runtime repeats it
			if _, err := p.plugin("CHECK", map[string]any{"prevResult": map[string]any{}}); err != nil {
				t.Errorf("stopped after %d of %d steps: %v", done, steps, err)
			}
			p.del()
			stop()
			n.restart()
			n.converge()
			if after := n.kernelDump(); after != before {
				t.Errorf("stopped after %d of %d steps, after DEL:\n%s\nbefore:\n%s", done, steps, after, before)
			}
		}
	})
}

// TestKernelDualStackWatch holds that every kind of change of IPv6 wakes the paths, that
// neighbours that come and go do not, and that it is known who did it.
func TestKernelDualStackWatch(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web := newPod(t, "web")
		_, six := web.add6()
		host, _, _ := vethOf(keyOf(web.container()))
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
		ip, say := batch(t, "ip", "-6", "-batch", "-")
		for _, c := range []struct {
			script string
			wakes  bool
		}{
			{"rule del pref 512", true},
			{"route del default via fe80::feee:ffff:feff:ffff table 4001", true},
			{"addr del " + n.eni.Addrs[4].String() + "/128 dev eth1", true},
			{"sh sysctl -qw net.ipv6.conf.all.forwarding=0", true},
			{"neigh del " + six.String() + " dev " + host, true},
			{"neigh add 2402:4e00:0:16::77 lladdr 02:00:00:00:00:01 dev eth1 nud reachable", false},
			{"sh ip neigh add 10.0.16.77 lladdr 02:00:00:00:00:01 dev eth1 nud permanent", false},
		} {
			drain(woken)
			if line := strings.TrimPrefix(c.script, "sh "); line != c.script {
				sh(t, line)
			} else {
				say(line)
			}
			select {
			case <-woken:
				if !c.wakes {
					t.Errorf("%s: woken", c.script)
				}
			case <-time.After(500 * time.Millisecond):
				if c.wakes {
					t.Errorf("%s: not woken", c.script)
				}
			}
		}
		cancel()
		<-done
		n.net.paths.fights.mu.Lock()
		defer n.net.paths.fights.mu.Unlock()
		for _, kind := range []string{"rule6", "route6", "neighbour"} {
			if by := n.net.paths.fights.culprit[kind]; by.name != "ip" || by.pid != ip.Process.Pid {
				t.Errorf("%s was changed by %s", kind, by)
			}
		}
	})
}

// TestKernelDualStackDisabled has a kernel without IPv6: it is said what to do.
func TestKernelDualStackDisabled(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		sh(t, "mount -t tmpfs tmpfs /proc/sys/net/ipv6")
		_, err := n.net.Paths().Plan(t.Context())
		if node.ClassOf(err) != node.ClassTerminal || node.ReasonOf(err, "") != "IPv6Disabled" {
			t.Errorf("plan: %v", err)
		}
	})
}

// TestKernelDualStackLeavesOthersAlone holds that what is not ours survives, and that
// the primary ENI goes on listening to its routers if it did.
func TestKernelDualStackLeavesOthersAlone(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.primary6()
		for before, after := range map[string]string{"0": "0", "1": "2"} {
			sh(t, "sysctl -qw net.ipv6.conf.all.forwarding=0 net.ipv6.conf.eth0.accept_ra="+before)
			must(t, forwarding6{dev: "eth0"}.put(nil))
			if got, err := os.ReadFile("/proc/sys/net/ipv6/conf/eth0/accept_ra"); err != nil || strings.TrimSpace(string(got)) != after {
				t.Errorf("accept_ra was %s and is %s, %v", before, got, err)
			}
		}
		sh(t, `ip -6 rule add pref 1000 lookup 77; ip -6 rule add pref 1536 fwmark 0x99 lookup 77
			ip -6 route add 2001:db8:9::/64 via fe80::feee:ffff:feff:ffff dev eth0 table 77; ip -6 route add 2001:db8:9::/64 via fe80::feee:ffff:feff:ffff dev eth0
			ip addr add 2402:4e00::6/128 dev eth0 nodad; ip neigh add 2402:4e00::7 lladdr 02:00:00:00:00:01 dev eth0 nud permanent
			ip link add eni-other type veth peer name enip0; ip addr add fe80::9/64 dev eni-other nodad`)
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

// TestKernelTableRepairedLater has the table go long after it was last written to.
func TestKernelTableRepairedLater(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		must(t, n.net.paths.hands.nft.sock.SetDeadline(time.Now().Add(-time.Second)))
		sh(t, "nft delete table inet tkenode")
		if got := n.converge(); !strings.HasPrefix(got, "add nft table inet tkenode") {
			t.Errorf("plan:\n%s", got)
		}
	})
}
