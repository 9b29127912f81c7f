//go:build kernel

package eni

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/lab/vpc"
)

var (
	nodeAddr6 = netip.MustParseAddr("2402:4e00::5")
	outsider6 = netip.MustParseAddr("2001:db8::9")
)

// dual gives the ENI as many IPv6 addresses for pods as it has of IPv4, and has pods
// get them.
func (n *testNode) dual() {
	n.sealed.Config.Network.IPFamilies = []node.IPFamily{node.IPv4, node.IPv6}
	six := podSubnet6.Addr()
	for range 3 {
		six = six.Next()
	}
	for range len(n.eni.Addrs) { // one is the ENI's own
		six = six.Next()
		n.eni.Addrs = append(n.eni.Addrs, six)
	}
}

// primary6 gives the primary ENI an IPv6 address, and the node a way out by it.
func (n *testNode) primary6() {
	must(n.t, n.vpc.SetAddrs("eni-primary", []netip.Addr{nodeAddr, nodeAddr6}))
	// It says nothing by itself, so that what it says can be counted.
	sh(n.t, "sysctl -qw net.ipv6.conf.eth0.accept_dad=0 net.ipv6.conf.eth0.router_solicitations=0 net.ipv6.conf.eth0.disable_ipv6=0; ip addr add "+nodeAddr6.String()+"/64 dev eth0 nodad; ip -6 route add default via "+
		vpc.Gateway6.String()+" dev eth0")
}

// add6 wires the pod and returns its addresses.
func (p *pod) add6() (four, six netip.Addr) {
	p.t.Helper()
	result, err := p.plugin("ADD", nil)
	must(p.t, err)
	var all []netip.Addr
	for _, ip := range result["ips"].([]any) {
		all = append(all, netip.MustParsePrefix(ip.(map[string]any)["address"].(string)).Addr())
	}
	if len(all) != 2 || !all[0].Is4() || !podSubnet6.Contains(all[1]) {
		p.t.Fatalf("addresses %v", all)
	}
	return all[0], all[1]
}

func TestKernelDualStack(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		t.Logf("first plan:\n%s", n.converge())
		defer n.serve()()
		before := n.kernelDump()
		web, client := newPod(t, "web"), newPod(t, "client")
		web4, web6 := web.add6()
		client4, client6 := client.add6()
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan after ADD:\n%s", p)
		}
		web.listen()
		for _, peer := range []netip.Addr{vpcPeer, vpcPeer6} {
			n.listen(peer)
		}
		for to, as := range map[netip.Addr]netip.Addr{web4: client4, web6: client6, vpcPeer: client4, vpcPeer6: client6} {
			n.reach(client, to, as)
		}
		n.reached(web4)
		n.reached(web6)
		n.noWrongFrames()
		for _, p := range []*pod{web, client} {
			ips := []any{map[string]any{"address": web4.String() + "/32"}, map[string]any{"address": web6.String() + "/128"}}
			_, err := p.plugin("CHECK", map[string]any{"prevResult": map[string]any{"ips": ips}})
			if (err == nil) != (p == web) {
				t.Errorf("CHECK of %s: %v", p.name, err)
			}
		}
		for range 2 {
			web.del()
			client.del()
		}
		must(t, n.net.paths.reap())
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan after DEL:\n%s", p)
		}
		if after := n.kernelDump(); after != before {
			t.Errorf("after DEL:\n%s\nbefore ADD:\n%s", after, before)
		}
	})
}

// TestKernelDualStackRepairs breaks what the paths have made of IPv6, one thing at a
// time. Each must show in the plan, and pods must be reached again once it is applied.
func TestKernelDualStackRepairs(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, client := newPod(t, "web"), newPod(t, "client")
		web4, web6 := web.add6()
		_, client6 := client.add6()
		web.listen()
		host, hostMAC, podMAC := vethOf(keyOf(web.container()))
		own := n.eni.Addrs[4].String()
		for _, c := range []struct{ script, plan string }{
			{"ip -6 rule flush; ip -6 rule add pref 32766 lookup main", "add rule6 512 from all lookup 4000\nadd rule6 1568 from " + own + " lookup 4001\nadd rule6 1536 from all fwmark 0x1000000/0x3f000000 lookup 4001\n"},
			{"ip -6 rule add pref 1537 proto 154 fwmark 0x2000000/0x3f000000 lookup 4002", "delete rule6 1537 from all fwmark 0x2000000/0x3f000000 lookup 4002\n"},
			{"ip -6 route del default via fe80::feee:ffff:feff:ffff table 4001; ip -6 route del unreachable default metric 4294967295 table 4001", "add route6 default metric 4294967295 table 4001: unreachable\nadd route6 default table 4001: via fe80::feee:ffff:feff:ffff dev eth1 onlink\n"},
			{"ip -6 route replace default via fe80::1 dev eth1 onlink table 4001 proto 154", "(was via fe80::1 dev eth1 onlink)\n"},
			{"ip -6 route flush table 4000", "add route6 " + web6.String() + " table 4000: dev " + host + "\n"},
			{"ip -6 route add 2402:4e00:0:16::99 dev eth1 table 4000", "delete route6 2402:4e00:0:16::99 table 4000: "},
			{"nft flush chain inet tkenode pods6", "(was rules of chain pods6 are not ours)\n"},
			{"nft flush map inet tkenode pods6", "add nft pod " + web6.String() + ": slot 0\n"},
			{"nft delete table inet tkenode", "dual-stack 1"},
			{"nft add element inet tkenode pods6 { 2402:4e00:0:16::99 : jump slot0 }", "delete nft pod 2402:4e00:0:16::99: slot 0\n"},
			{"nft delete element inet tkenode pods6 { " + web6.String() + " }; nft add element inet tkenode pods6 { " + web6.String() + " : jump slot3 }",
				"set nft pod " + web6.String() + ": slot 0 (was slot 3)\n"},
			{"ip neigh flush dev " + host + " nud permanent", "add neighbour " + web6.String() + " dev " + host + ": " + podMAC + " permanent\n"},
			{"ip neigh replace " + web6.String() + " lladdr 02:00:00:00:00:09 dev " + host + " nud permanent", "(was 02:00:00:00:00:09 permanent)\n"},
			{"ip neigh add 2402:4e00:0:16::99 lladdr 02:00:00:00:00:09 dev " + host + " nud permanent", "delete neighbour 2402:4e00:0:16::99 dev " + host},
			{"ip -6 addr flush dev eth1", "add address fe80::5054:ff:fe00:2 dev eth1\nadd address " + own + " dev eth1\n"},
			{"ip addr add 2402:4e00:0:16::99/128 dev eth1 nodad", "delete address 2402:4e00:0:16::99 dev eth1\n"},
			{"ip addr add fe80::7/64 dev " + host + " nodad", "delete address fe80::7 dev " + host + "\n"},
			{"sysctl -qw net.ipv6.conf.all.forwarding=0", "set sysctl net/ipv6/conf/all/forwarding: 1 (was 0)\n"},
			{"sysctl -qw net.ipv6.conf.eth1.disable_ipv6=1", "set sysctl net/ipv6/conf/eth1/disable_ipv6: 0 (was 1)\n"},
			{"sysctl -qw net.ipv6.conf.eth1.accept_ra=1", "set sysctl net/ipv6/conf/eth1/accept_ra: 0 (was 1)\n"},
			{"sysctl -qw net.ipv6.conf." + host + ".addr_gen_mode=0", "set sysctl net/ipv6/conf/" + host + "/addr_gen_mode: 1 (was 0)\n"},
			{"sysctl -qw net.ipv6.conf." + host + ".disable_ipv6=1", "set sysctl net/ipv6/conf/" + host + "/disable_ipv6: 0 (was 1)\n"},
			{"ip link set eth1 down", "set link eth1: up mac 52:54:00:00:00:02 (was down mac 52:54:00:00:00:02)\n"},
			{"ip link set " + host + " down", "set link " + host + ": up mac " + hostMAC + " mtu 1500 (was down "},
			{"ip link set " + host + " alias ''", "set veth " + host + ": default/web address " + web4.String() + "," + web6.String() + " slot 0"},
			{"ip link del " + host, "add veth " + host},
		} {
			sh(t, c.script)
			if got := n.converge(); !strings.Contains(got, c.plan) {
				t.Errorf("%s: plan:\n%swant in it:\n%s", c.script, got, c.plan)
			}
			n.reached(web6)
			n.reached(web4)
			n.reach(client, web6, client6)
		}
		if text := n.kernelDump(); strings.Contains(text, "tentative") || strings.Contains(text, "dadfailed") {
			t.Errorf("an address is looked for:\n%s", text)
		}
	})
}

// TestKernelDualStackInside breaks the inside of a pod: CHECK says what.
func TestKernelDualStackInside(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.manyAddrs(8)
		n.dual()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		for i, script := range []string{
			"ip -6 addr flush dev eth0 scope global", "ip -6 route del default", "ip neigh del fe80::1 dev eth0",
			"ip -6 route replace default via fe80::2 dev eth0", "ip neigh replace fe80::1 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
		} {
			p := newPod(t, fmt.Sprint("p", i))
			p.add6()
			must(t, p.enter(func() error { sh(t, script); return nil }))
			if _, err := p.plugin("CHECK", map[string]any{"prevResult": map[string]any{}}); err == nil || !strings.Contains(err.Error(), "101") {
				t.Errorf("CHECK after %s: %v", script, err)
			}
			p.del()
		}
	})
}

// TestKernelDualStackSpoof holds that a pod has its own IPv6 address and no other, and
// that it reaches nothing of the node by addresses of the link.
func TestKernelDualStackSpoof(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web := newPod(t, "web")
		_, web6 := web.add6()
		l, err := net.Listen("tcp6", "[::]:9100")
		must(t, err)
		defer l.Close()
		go tellOrigin(l)
		must(t, web.enter(func() error { sh(t, "ip addr add 2402:4e00:0:16::99/128 dev eth0 nodad; sleep 2"); return nil }))
		before := n.vpc.Counters()
		connect := func(from, to string) error {
			return web.enter(func() error {
				d := net.Dialer{Timeout: time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
				c, err := d.DialContext(t.Context(), "tcp6", to)
				if err == nil {
					c.Close()
				}
				return err
			})
		}
		if err := connect("2402:4e00:0:16::99", "["+vpcPeer6.String()+"]:80"); err == nil {
			t.Error("connected with another address")
		}
		host, _, podMAC := vethOf(keyOf(web.container()))
		for _, to := range []string{"[fe80::1%eth0]:9100", "[" + linkLocal(n.eni.MAC.String()).String() + "%eth0]:9100"} {
			if err := connect(linkLocal(podMAC).String()+"%eth0", to); err == nil {
				t.Errorf("the pod has reached the node at %s", to)
			}
		}
		if out, err := exec.Command("ip", "-6", "addr", "show", "dev", host).Output(); err != nil || len(out) != 0 {
			t.Errorf("the host's end has addresses: %s, %v", out, err)
		}
		after := n.vpc.Counters()
		for eni := range after {
			if eni != vpc.Lab && after[eni].Tx.Packets > before[eni].Tx.Packets+1 { // a question for a MAC may be under way
				t.Errorf("%s sent %d packets", eni, after[eni].Tx.Packets-before[eni].Tx.Packets)
			}
		}
		web.listen()
		n.reached(web6)
		n.noWrongFrames()
	})
}

// TestKernelDualStackENILost tears the ENI out under a pod. No packet leaves by the
// primary ENI, though that has a way out for IPv6 as well.
func TestKernelDualStackENILost(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.primary6()
		tap := n.plug(n.eni, "eth1")
		n.record()
		n.converge()
		defer n.serve()()
		web := newPod(t, "web")
		_, web6 := web.add6()
		web.listen()
		n.reached(web6)
		must(t, n.vpc.Detach(n.eni.ENI))
		tap.Close()
		waitGone(t, "eth1")
		primary := n.vpc.Counters()["eni-primary"].Tx
		for _, to := range []netip.Addr{vpcPeer6, outsider6} {
			if err := web.enter(func() error {
				_, err := origin((&net.Dialer{}).DialContext, to)
				return err
			}); err == nil || !strings.Contains(err.Error(), "network is unreachable") {
				t.Errorf("connect to %s without the ENI: %v, want no way", to, err)
			}
		}
		if now := n.vpc.Counters()["eni-primary"].Tx; now != primary {
			t.Errorf("%d packets left by the primary ENI: %+v", now.Packets-primary.Packets, n.vpc.Counters()["eni-primary"])
		}
		n.plug(n.eni, "eth7")
		n.converge()
		n.reached(web6)
		n.noWrongFrames()
	})
}

// TestKernelDualStackExplain holds that both ways of a pod are told, and what is wrong
// with either.
func TestKernelDualStackExplain(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, db := newPod(t, "web"), newPod(t, "db")
		web4, web6 := web.add6()
		_, db6 := db.add6()
		name, hostMAC, podMAC := vethOf(keyOf(web.container()))
		pod := Question{Pod: "default/web"}
		bits := fmt.Sprintf("%#x/%#x", slotMark(0), markMask)
		want := []string{
			"interface | eth0 " + web4.String() + ", " + web6.String() + ", MAC " + podMAC,
			"next hop | via 169.254.1.1 dev eth0", "next hop | via fe80::1 dev eth0, fe80::1 is at " + hostMAC + ", for good\n",
			"nft pods6 | " + web6.String() + " → slot 0, mark " + bits + "\n",
			"to 2001:db8::1, an address outside of the VPC | rule | 1536 from all fwmark " + bits + " lookup 4001\n",
			"to 2001:db8::1, an address outside of the VPC | table 4001 | via fe80::feee:ffff:feff:ffff dev eth1\n",
			"to 2001:db8::1, an address outside of the VPC | SNAT | none, it leaves as " + web6.String() + "\n",
			"back from 2001:db8::1, in by eth1 | rule | 512 from all lookup 4000\n",
			"back from 2001:db8::1, in by eth1 | pod | " + web6.String() + " is at " + podMAC + ", for good\n",
		}
		n.explained(t, pod, want...)
		n.explained(t, Question{IP: web6}, want...)
		n.explained(t, Question{Pod: "default/web", To: db6}, "to "+db6.String()+" | rule | 512 from all lookup 4000\n", "| table 4000 | dev eni")
		for _, c := range []struct{ script, want string }{
			{"ip -6 rule del pref 1536", "!! missing: rule6 1536 from all fwmark " + bits + " lookup 4001 → " + doWait},
			{"ip -6 route del default via fe80::feee:ffff:feff:ffff table 4001", "!! the packet goes nowhere"},
			{"nft flush map inet tkenode pods6", web6.String() + " leads to no slot: the packet is dropped here\n"},
			{"ip neigh del " + web6.String() + " dev " + name, "!! missing: neighbour " + web6.String() + " dev " + name},
			{"ip -6 route del " + web6.String() + " table 4000", "!! missing: route6 " + web6.String() + " table 4000"},
		} {
			sh(t, c.script)
			n.explained(t, pod, c.want, "!! ")
			n.converge()
		}
		n.explained(t, Question{IP: n.eni.Addrs[4]}, "ledger | "+n.eni.ENI+"'s own, in slot 0; pods are never given it\n")
		n.explained(t, Question{IP: n.eni.Addrs[7]}, "ledger | an address of "+n.eni.ENI+" in slot 0, no pod has it\n", "left over | nothing\n")
		n.sealed.Config.Network.IPFamilies = nil
		newPod(t, "four").add()
		if _, err := n.net.Explain(t.Context(), Question{Pod: "default/four", To: db6}); !errors.Is(err, ErrNotHere) {
			t.Errorf("of a pod without IPv6: %v", err)
		}
		n.explained(t, Question{Pod: "default/four"}, "device | eth1")
	})
}
