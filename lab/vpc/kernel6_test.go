//go:build kernel

package vpc

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// node6 is a namespace with the node's primary ENI and both of its addresses.
func node6(t *testing.T, n *Network) *namespace {
	t.Helper()
	ns := newNamespace(t)
	ns.plug(n, "eth0", nodePort6())
	ns.ip("link set lo up")
	ns.ip("addr add 10.0.0.5/24 dev eth0")
	ns.ip("addr add 2001:db8:0:1::5/128 dev eth0")
	return ns
}

// ping6 is an echo from the kernel of the namespace, by eth0 where the address is of the link.
func (ns *namespace) ping6(from, to netip.Addr, timeout time.Duration) (err error) {
	ns.do(func() {
		var conn net.PacketConn
		if conn, err = net.ListenPacket("ip6:ipv6-icmp", from.String()); err != nil {
			return
		}
		defer conn.Close()
		addr := &net.IPAddr{IP: to.AsSlice()}
		if to.IsLinkLocalUnicast() {
			addr.Zone = "eth0"
		}
		conn.SetDeadline(time.Now().Add(timeout))
		if _, err = conn.WriteTo([]byte{128, 0, 0, 0, 0x12, 0x34, 0, 1}, addr); err != nil {
			return
		}
		answer := make([]byte, 1500)
		for {
			size, sender, fail := conn.ReadFrom(answer)
			if fail != nil {
				err = fail
				return
			}
			if size >= 6 && answer[0] == 129 && answer[4] == 0x12 && sender.String() == addr.String() {
				return
			}
		}
	})
	return err
}

// until waits for what the kernel does by itself.
func (ns *namespace) until(args string, ok func(out string) bool) {
	ns.t.Helper()
	for end := time.Now().Add(patient); ; time.Sleep(10 * time.Millisecond) {
		out := ns.ip(args)
		if ok(out) {
			return
		}
		if time.Now().After(end) {
			ns.t.Fatalf("ip %s, after %s:\n%s", args, patient, out)
		}
	}
}

// TestKernelIPv6: the kernel finds no duplicate of its addresses, finds the router, and speaks to the lab.
func TestKernelIPv6(t *testing.T) {
	n := newNetwork6(t)
	ns := node6(t, n)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ns.until("-6 addr show dev eth0", func(out string) bool {
		return strings.Count(out, "inet6") == 2 && !strings.Contains(out, "tentative") && !strings.Contains(out, "dadfailed")
	})
	ns.until("-6 route show default", func(out string) bool {
		return strings.Contains(out, "default via "+Gateway6.String()+" dev eth0 proto ra")
	})
	if _, err := n.Ping(ctx, probe6, nodeIP6); err != nil {
		t.Error("ping the node:", err)
	}
	for _, to := range []netip.Addr{probe6, Gateway6} {
		if err := ns.ping6(nodeIP6, to, patient); err != nil {
			t.Errorf("ping %s: %v", to, err)
		}
	}
	if neigh := ns.ip("-6 neigh show " + Gateway6.String()); !strings.Contains(neigh, net.HardwareAddr(fabricMAC[:]).String()) || !strings.Contains(neigh, "router") {
		t.Errorf("gateway's neighbour entry %q", neigh)
	}
	service, err := n.Listen(netip.AddrPortFrom(probe6, 80))
	if err != nil {
		t.Fatal(err)
	}
	go pour(service)
	conn, err := ns.dial(netip.Addr{}, netip.AddrPortFrom(probe6, 80).String(), patient)
	if err != nil {
		t.Fatal("dial a service:", err)
	}
	exchange(t, conn, "machine to lab")
	var listener net.Listener
	ns.do(func() { listener, err = net.Listen("tcp", "[2001:db8:0:1::5]:10250") })
	if err != nil {
		t.Fatal(err)
	}
	go pour(listener)
	defer listener.Close()
	if conn, err = n.DialContext(ctx, probe6, "tcp", "[2001:db8:0:1::5]:10250"); err != nil {
		t.Fatal(err)
	}
	exchange(t, conn, "lab to machine")

	if err := ns.ping6(nodeLocal6.WithZone("eth0"), Gateway6, brief); err == nil || n.Counters()["eni-node"].Drops[DropSource] == 0 {
		t.Errorf("ping from the address of the link: %v, %v", err, n.Counters()["eni-node"])
	}
	drops := n.Counters()["eni-node"].Drops
	delete(drops, DropSource)
	delete(drops, DropMulticast) // the kernel joins groups
	delete(drops, DropUnknown)   // those of IPv4, too
	delete(drops, DropQueueFull) // and is slower than the lab for a moment
	if len(drops) > 0 {
		t.Errorf("dropped: %v", drops)
	}
}

func TestKernelWrongSource6(t *testing.T) {
	n := newNetwork6(t)
	ns := node6(t, n)
	other := netip.MustParseAddr("2001:db8:0:1::99")
	ns.ip("addr add 2001:db8:0:1::99/128 dev eth0 nodad")
	ns.ip("-6 route add default via " + Gateway6.String() + " dev eth0 onlink")
	accept(t, func() (net.Listener, error) { return n.Listen(netip.AddrPortFrom(probe6, 6443)) })
	dial := func(timeout time.Duration) error {
		conn, err := ns.dial(other, netip.AddrPortFrom(probe6, 6443).String(), timeout)
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := dial(brief); err == nil || n.Counters()["eni-node"].Drops[DropSource] == 0 {
		t.Errorf("from an address that is not assigned: %v, %v", err, n.Counters()["eni-node"])
	}
	if err := n.SetAddrs("eni-node", []netip.Addr{nodeIP, nodeIP6, other}); err != nil {
		t.Fatal(err)
	}
	if err := dial(patient); err != nil {
		t.Errorf("from an assigned address: %v, %v", err, n.Counters()["eni-node"])
	}
}

// A pod with an IPv6 address behind a secondary ENI, which has none of its own but that of the link.
func TestKernelSecondaryENI6(t *testing.T) {
	n := newNetwork6(t)
	host, pod := newNamespace(t), newNamespace(t)
	host.plug(n, "eth0", nodePort6())
	host.plug(n, "eth1", podPort6())
	host.ip(fmt.Sprintf("link add veth0 type veth peer name eth0 netns %d", pod.thread))
	host.do(func() {
		if err := writeSysctl("net/ipv6/conf/all/forwarding", "1"); err != nil {
			t.Error(err)
		}
	})
	host.ip("link set veth0 address 02:00:00:00:00:01 up")
	host.ip("-6 addr add fe80::1/64 dev veth0 nodad")
	host.ip("-6 route add 2001:db8:0:10::a dev veth0")
	host.ip("-6 route add default via " + Gateway6.String() + " dev eth0")
	host.ip("-6 rule add from 2001:db8:0:10::a priority 1536 lookup 4000")
	pod.ip("link set eth0 up")
	pod.ip("-6 addr add 2001:db8:0:10::a/128 dev eth0 nodad")
	pod.ip("-6 route add default via fe80::1 dev eth0")
	accept(t, func() (l net.Listener, err error) {
		pod.do(func() { l, err = net.Listen("tcp", "[2001:db8:0:10::a]:80") })
		return l, err
	})
	dial := func(timeout time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), timeout)
		defer cancel()
		conn, err := n.DialContext(ctx, probe6, "tcp", "[2001:db8:0:10::a]:80")
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := dial(patient); err == nil || n.Counters()["eni-node"].Drops[DropSource] == 0 {
		t.Errorf("the pod answers through the primary ENI: %v, %v", err, n.Counters())
	}
	host.ip("-6 route add default via " + Gateway6.String() + " dev eth1 onlink table 4000")
	if err := dial(patient); err != nil {
		t.Errorf("through the pod's own ENI: %v, %v", err, n.Counters())
	}
	if err := pod.ping6(podIP6, probe6, patient); err != nil {
		t.Error("ping from the pod:", err)
	}
}
