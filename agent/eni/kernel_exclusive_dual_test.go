//go:build kernel

package eni

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/lab/vpc"
)

var wholeAddr6 = netip.MustParseAddr("2402:4e00:0:16::20")

// attachWhole6 is attachWhole of an ENI that has an IPv6 address, too.
func (n *testNode) attachWhole6(name string) {
	both := []netip.Addr{wholeAddr, wholeAddr6}
	n.plug(vpc.Port{ENI: "eni-whole001", MAC: mac(wholeMAC), Subnet: "subnet-pods0001", Addrs: both}, name)
	must(n.t, n.net.ledger.record(record{Slot: &Slot{
		Number: exclusiveSlot, ENI: "eni-whole001", MAC: wholeMAC, Subnet: podSubnet, Primary: wholeAddr,
		Addrs: both[:1], Addrs6: both[1:], Groups: []string{"sg-web00001"},
	}}))
}

// TestKernelExclusiveDualStack: what a pod with an ENI of its own sends by IPv6 leaves
// by the ENI, under its own address, and nothing of it is left.
func TestKernelExclusiveDualStack(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.dual()
		n.permitWhole()
		n.attach("eth1")
		n.attachWhole6("eth2")
		defer n.serve()()
		n.converge()
		before := n.kernelDump()
		db, web := newPod(t, "db"), newPod(t, "web")
		result, err := db.plugin("ADD", asks(networkExclusive, "sg-web00001"))
		must(t, err)
		ips := result["ips"].([]any)
		if len(ips) != 2 || ips[1].(map[string]any)["address"] != wholeAddr6.String()+"/128" || ips[1].(map[string]any)["gateway"] != eniGateway6.String() {
			t.Fatalf("result %v", result)
		}
		web4, web6 := web.add6()
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan after ADD:\n%s", p)
		}
		for _, p := range []*pod{db, web} {
			p.listen()
		}
		for _, a := range []netip.Addr{vpcPeer, vpcPeer6} {
			n.listen(a)
		}
		whole := func() {
			t.Helper()
			for to, as := range map[netip.Addr]netip.Addr{vpcPeer: wholeAddr, vpcPeer6: wholeAddr6, web4: wholeAddr, web6: wholeAddr6} {
				n.reach(db, to, as)
			}
			n.reach(web, wholeAddr6, web6)
			n.reached(wholeAddr6)
			n.reached(wholeAddr)
			n.probe(wholeAddr)
			n.noWrongFrames()
		}
		whole()
		check := func() error {
			_, err := db.plugin("CHECK", map[string]any{"prevResult": map[string]any{"ips": ips}})
			return err
		}
		if err := check(); err != nil {
			t.Error(err)
		}
		x, err := n.net.Explain(t.Context(), Question{Pod: "default/db", To: vpcPeer6})
		if text := told(x); err != nil || !strings.Contains(text, "via fe80::feee:ffff:feff:ffff dev eth0") || !strings.Contains(text, "none, it leaves as "+wholeAddr6.String()) {
			t.Errorf("%v\n%s", err, text)
		}
		for _, c := range []string{
			"ip -6 route del default", "ip -6 addr flush dev eth0", "ip link set eth0 down",
			"sysctl -qw net.ipv6.conf.eth0.disable_ipv6=1", "ip -6 addr del " + linkLocal(wholeMAC).String() + "/128 dev eth0",
		} {
			must(t, db.enter(func() error { return exec.Command("sh", "-c", c).Run() }))
			if err := check(); err == nil || !strings.Contains(err.Error(), "not as it was made") {
				t.Errorf("CHECK after %s: %v", c, err)
			}
			_, err := db.plugin("ADD", asks(networkExclusive, "sg-web00001")) // repeated
			must(t, err)
			if err := check(); err != nil {
				t.Errorf("after %s and ADD: %v", c, err)
			}
			whole()
		}
		for range 2 {
			db.del()
			web.del()
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
