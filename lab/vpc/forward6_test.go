package vpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

var (
	nodeIP6    = netip.MustParseAddr("2001:db8:0:1::5")
	podIP6     = netip.MustParseAddr("2001:db8:0:10::a")
	otherIP6   = netip.MustParseAddr("2001:db8:0:10::b")
	probe6     = netip.MustParseAddr("2001:db8:0:ff::20")
	nodeLocal6 = netip.MustParseAddr("fe80::5054:ff:fe00:1")
	podLocal6  = netip.MustParseAddr("fe80::5054:ff:fe00:2")
	allRouters = netip.MustParseAddr("ff02::2")
)

func testConfig6() Config {
	config := testConfig()
	config.CIDR6 = netip.MustParsePrefix("2001:db8::/56")
	config.Subnets[0].CIDR6 = netip.MustParsePrefix("2001:db8:0:1::/64")
	config.Subnets[1].CIDR6 = netip.MustParsePrefix("2001:db8:0:10::/64")
	return config
}

func newNetwork6(t testing.TB) *Network {
	n, err := New(testConfig6())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func nodePort6() Port {
	p := nodePort()
	p.Addrs = append(p.Addrs, nodeIP6)
	return p
}

func podPort6() Port {
	p := podPort()
	p.Addrs = append(p.Addrs, podIP6)
	return p
}

// datagram6 is an IPv6 packet with a UDP header and no checksum, which the fabric does not look at.
func datagram6(src, dst netip.Addr, payload string) []byte {
	b := make([]byte, 8, 48+len(payload))
	b[0], b[6], b[7] = 0x60, protocolUDP, 64
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	b = append(b, 0, 1, 0, 2)
	b = binary.BigEndian.AppendUint16(b, uint16(8+len(payload)))
	return append(append(b, 0, 0), payload...)
}

// discovery is a message of a machine. Of a solicitation of a router the target is not there.
func discovery(kind byte, src, dst, target netip.Addr, mac net.HardwareAddr) []byte {
	m := append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
	if mac != nil {
		option := byte(optionSourceMAC)
		if kind == neighbourAdvertisement {
			option = optionTargetMAC
		}
		m = append(append(m, option, 1), mac...)
	}
	return discoveryPacket(src, dst, m)
}

func solicitedNode(a netip.Addr) netip.Addr {
	b := netip.MustParseAddr("ff02::1:ff00:0").As16()
	from := a.As16()
	copy(b[13:], from[13:])
	return netip.AddrFrom16(b)
}

func TestReceive6(t *testing.T) {
	zero, mapped := netip.IPv6Unspecified(), netip.MustParseAddr("::ffff:10.0.16.10")
	short := datagram6(podIP6, nodeIP6, "hello")
	badVersion := bytes.Clone(short)
	badVersion[0] = 0x45
	ask := discovery(neighbourSolicitation, podLocal6, Gateway6, Gateway6, podMAC)
	badSum, badHops, badOption := bytes.Clone(ask), bytes.Clone(ask), bytes.Clone(ask)
	badSum[42]++
	badHops[7] = 64
	badOption[ipv6Header+25] = 0
	binary.BigEndian.PutUint16(badOption[42:], 0)
	binary.BigEndian.PutUint16(badOption[42:], checksumICMPv6(podLocal6, Gateway6, badOption[40:]))
	tests := []struct {
		name   string
		packet []byte
		drop   Reason // by the sender's port; delivered if none
		got    int    // frames that reach the node
	}{
		{"to another ENI", short, delivered, 1},
		{"padded", append(bytes.Clone(short), make([]byte, 20)...), delivered, 1},
		{"to the lab", datagram6(podIP6, Gateway6, ""), delivered, 0},
		{"another ENI's address", datagram6(nodeIP6, nodeIP6, ""), DropSource, 0},
		{"nobody's address", datagram6(otherIP6, nodeIP6, ""), DropSource, 0},
		{"the gateway's address", datagram6(Gateway6, nodeIP6, ""), DropSource, 0},
		{"an IPv4 address of its own", datagram6(mapped, nodeIP6, ""), DropSource, 0},
		{"nobody's address to many", datagram6(otherIP6, allNodes, ""), DropSource, 0},
		{"its link-local address to another ENI", datagram6(podLocal6, nodeIP6, ""), DropSource, 0},
		{"its link-local address to the gateway", datagram6(podLocal6, Gateway6, ""), DropSource, 0},
		{"no address to another ENI", datagram6(zero, nodeIP6, ""), DropSource, 0},
		{"another's link-local address", discovery(neighbourSolicitation, nodeLocal6, solicitedNode(otherIP6), otherIP6, podMAC), DropSource, 0},
		{"a solicitation in another's name", discovery(neighbourSolicitation, nodeIP6, solicitedNode(Gateway6), Gateway6, podMAC), DropSource, 0},
		{"to another's link-local address", datagram6(podIP6, nodeLocal6, ""), DropUnknown, 0},
		{"to nobody", datagram6(podIP6, otherIP6, ""), DropUnknown, 0},
		{"to the Internet", datagram6(podIP6, netip.MustParseAddr("2606:4700::1111"), ""), DropUnknown, 0},
		{"multicast", datagram6(podIP6, allNodes, ""), DropMulticast, 0},
		{"multicast from the link-local address", datagram6(podLocal6, netip.MustParseAddr("ff02::1:2"), ""), DropMulticast, 0},
		{"multicast without an address", datagram6(zero, netip.MustParseAddr("ff02::16"), ""), DropMulticast, 0},
		{"a router's advertisement", discoveryPacket(podLocal6, allNodes, advertiseRouter()), DropMulticast, 0},
		{"no payload", nil, DropMalformed, 0},
		{"cut", short[:len(short)-1], DropMalformed, 0},
		{"wrong version", badVersion, DropMalformed, 0},
		{"as large as the MTU", datagram6(podIP6, nodeIP6, strings.Repeat("x", MTU-48)), delivered, 1},
		{"larger than the MTU", datagram6(podIP6, nodeIP6, strings.Repeat("x", MTU-47)), DropMalformed, 0},
		{"solicitation with a wrong checksum", badSum, DropMalformed, 0},
		{"solicitation from another link", badHops, DropMalformed, 0},
		{"solicitation with an option of no size", badOption, DropMalformed, 0},
		{"solicitation with another's MAC inside", discovery(neighbourSolicitation, podIP6, Gateway6, Gateway6, nodeMAC), DropMAC, 0},
		{"announcement with another's MAC inside", discovery(neighbourAdvertisement, podIP6, allNodes, podIP6, nodeMAC), DropMAC, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			n := newNetwork6(t)
			node, pods := addPort(t, n, nodePort6()), addPort(t, n, podPort6())
			n.receive(pods, ethernet(podMAC, etherIPv6, test.packet))
			want := map[Reason]uint64{test.drop: 1}
			delete(want, delivered)
			wantDrops(t, n, "eni-pods", want)
			if taken := n.Counters()["eni-pods"].Tx.Packets == 1; taken != (test.drop == delivered) {
				t.Errorf("sender counts %+v", n.Counters()["eni-pods"])
			}
			frames := sent(node)
			if len(frames) != test.got {
				t.Fatalf("%d frames reach the node, want %d", len(frames), test.got)
			}
			for _, f := range frames {
				size := ipv6Header + int(binary.BigEndian.Uint16(test.packet[4:]))
				if want := append(append(append(bytes.Clone(nodeMAC), fabricMAC[:]...), 0x86, 0xdd), test.packet[:size]...); !bytes.Equal(f, want) {
					t.Errorf("frame\n%swant\n%s", hex.Dump(f), hex.Dump(want))
				}
			}
		})
	}
}

func TestNeighbourDiscovery(t *testing.T) {
	n := newNetwork6(t)
	pods := addPort(t, n, podPort6())
	zero := netip.IPv6Unspecified()
	tests := []struct {
		name          string
		kind          byte
		from, to, who netip.Addr
		answered      bool
	}{
		{"gateway", neighbourSolicitation, podLocal6, solicitedNode(Gateway6), Gateway6, true},
		{"gateway, known before", neighbourSolicitation, podIP6, Gateway6, Gateway6, true},
		{"neighbour that exists or not", neighbourSolicitation, podIP6, solicitedNode(otherIP6), otherIP6, true},
		{"own address", neighbourSolicitation, podLocal6, solicitedNode(podIP6), podIP6, false},
		{"own address, of which there is no duplicate", neighbourSolicitation, zero, solicitedNode(podIP6), podIP6, false},
		{"an address that is not assigned, of which there is none either", neighbourSolicitation, zero, solicitedNode(otherIP6), otherIP6, false},
		{"link-local address, of which there is none either", neighbourSolicitation, zero, solicitedNode(podLocal6), podLocal6, false},
		{"another subnet", neighbourSolicitation, podIP6, solicitedNode(nodeIP6), nodeIP6, false},
		{"another's link-local address", neighbourSolicitation, podLocal6, solicitedNode(nodeLocal6), nodeLocal6, false},
		{"announcement", neighbourAdvertisement, podIP6, allNodes, podIP6, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			mac := podMAC
			if test.from == zero {
				mac = nil
			}
			n.receive(pods, ethernet(podMAC, etherIPv6, discovery(test.kind, test.from, test.to, test.who, mac)))
			frames := sent(pods)
			if test.answered != (len(frames) == 1) {
				t.Fatalf("%d answers", len(frames))
			}
			if !test.answered {
				return
			}
			h, ok := parseIPv6(frames[0][ethernetHeader:])
			if !ok || h.src != test.who || h.dst != test.from || h.bytes[7] != 255 || checksumICMPv6(h.src, h.dst, h.payload) != 0 {
				t.Fatalf("answer:\n%s", hex.Dump(frames[0]))
			}
			flags := byte(0x60) // solicited, overrides
			if test.who == Gateway6 {
				flags = 0xe0 // and a router
			}
			want := append([]byte{neighbourAdvertisement, 0, h.payload[2], h.payload[3], flags, 0, 0, 0}, test.who.AsSlice()...)
			if want = append(append(want, optionTargetMAC, 1), fabricMAC[:]...); !bytes.Equal(h.payload, want) {
				t.Errorf("answer\n%swant\n%s", hex.Dump(h.payload), hex.Dump(want))
			}
		})
	}
	wantDrops(t, n, "eni-pods", nil)
}

func TestRouterSolicitation(t *testing.T) {
	n := newNetwork6(t)
	pods := addPort(t, n, podPort6())
	for from, to := range map[netip.Addr]netip.Addr{podLocal6: podLocal6, podIP6: podIP6, netip.IPv6Unspecified(): allNodes} {
		n.receive(pods, ethernet(podMAC, etherIPv6, discoveryPacket(from, allRouters, []byte{routerSolicitation, 0, 0, 0, 0, 0, 0, 0})))
		frames := sent(pods)
		if len(frames) != 1 {
			t.Fatalf("from %s: %d answers", from, len(frames))
		}
		h, ok := parseIPv6(frames[0][ethernetHeader:])
		if !ok || h.src != Gateway6 || h.dst != to || h.bytes[7] != 255 || checksumICMPv6(h.src, h.dst, h.payload) != 0 {
			t.Fatalf("from %s, answer:\n%s", from, hex.Dump(frames[0]))
		}
		want := []byte{routerAdvertisement, 0, h.payload[2], h.payload[3], 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}
		want = append(append(want, optionSourceMAC, 1), fabricMAC[:]...)
		if want = append(want, optionMTU, 1, 0, 0, 0, 0, 5, 0xdc); !bytes.Equal(h.payload, want) {
			t.Errorf("answer\n%swant\n%s", hex.Dump(h.payload), hex.Dump(want))
		}
	}
	wantDrops(t, n, "eni-pods", nil)
}

func TestSetAddrs6(t *testing.T) {
	n := newNetwork6(t)
	node, pods := addPort(t, n, nodePort6()), addPort(t, n, podPort())
	try := func() (outwards, inwards bool) {
		n.receive(pods, ethernet(podMAC, etherIPv6, datagram6(podIP6, nodeIP6, "")))
		n.receive(node, ethernet(nodeMAC, etherIPv6, datagram6(nodeIP6, podIP6, "")))
		return len(sent(node)) == 1, len(sent(pods)) == 1
	}
	if o, i := try(); o || i {
		t.Error("an address passes before it is assigned")
	}
	if err := n.SetAddrs("eni-pods", []netip.Addr{podENI, podIP6, podIP}); err != nil {
		t.Fatal(err)
	}
	if o, i := try(); !o || !i {
		t.Errorf("an assigned address: sends %v, receives %v", o, i)
	}
	for _, bad := range [][]netip.Addr{
		{podIP6},
		{podIP6, podENI},
		{podENI, podIP6, podIP6},
		{podENI, nodeIP6},
		{podENI, podLocal6},
		{podENI, netip.MustParseAddr("2001:db8:0:10::")},
		{podENI, netip.MustParseAddr("2001:db8:0:11::1")},
		{podENI, netip.MustParseAddr("::ffff:10.0.16.11")},
		{podENI, podIP6.WithZone("eth0")},
	} {
		if err := n.SetAddrs("eni-pods", bad); err == nil {
			t.Errorf("SetAddrs(%v) succeeds", bad)
		}
	}
	if err := n.SetAddrs("eni-pods", []netip.Addr{podENI}); err != nil {
		t.Fatal(err)
	}
	if o, i := try(); o || i {
		t.Error("an address passes after it was unassigned")
	}
}

func TestConfig6(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"IPv4 as the VPC's":     func(c *Config) { c.CIDR6 = c.CIDR },
		"a VPC too small":       func(c *Config) { c.CIDR6 = netip.MustParsePrefix("2001:db8::/65") },
		"a subnet without":      func(c *Config) { c.CIDR6 = netip.Prefix{} },
		"a subnet elsewhere":    func(c *Config) { c.Subnets[0].CIDR6 = netip.MustParsePrefix("2001:db8:1::/64") },
		"a subnet of 80 bits":   func(c *Config) { c.Subnets[0].CIDR6 = netip.MustParsePrefix("2001:db8:0:1::/80") },
		"subnets that overlap":  func(c *Config) { c.Subnets[0].CIDR6 = c.Subnets[1].CIDR6 },
		"IPv4 as the subnet's":  func(c *Config) { c.Subnets[0].CIDR6 = c.Subnets[0].CIDR },
		"IPv6 as the subnet's4": func(c *Config) { c.Subnets[0].CIDR = c.Subnets[0].CIDR6 },
	} {
		config := testConfig6()
		change(&config)
		if n, err := New(config); err == nil {
			n.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestLab6: the lab's own end of the network has IPv6, too.
func TestLab6(t *testing.T) {
	n := newNetwork6(t)
	addPort(t, n, nodePort6())
	at := netip.MustParseAddrPort("[2001:db8:0:ff::80]:80")
	l, err := n.Listen(at)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		if c, err := l.Accept(); err == nil {
			io.Copy(c, c)
			c.Close()
		}
	}()
	n.SetHosts(map[string]netip.Addr{"six.example": at.Addr()})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := n.DialContext(ctx, probe6, "tcp", "six.example:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "hello")
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Errorf("echo %q, %v", got, err)
	}
	packets, err := n.ListenPacket(at)
	if err != nil {
		t.Fatal(err)
	}
	defer packets.Close()
	u, err := n.DialContext(ctx, probe6, "udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	io.WriteString(u, "datagram")
	b := make([]byte, 16)
	if size, from, err := packets.ReadFrom(b); err != nil || string(b[:size]) != "datagram" || from.(*net.UDPAddr).AddrPort().Addr() != probe6 {
		t.Errorf("%q from %v, %v", b[:size], from, err)
	}
	if _, err := n.Ping(ctx, probe6, Gateway6); err != nil {
		t.Error(err)
	}
	if _, err := n.DialContext(ctx, probe, "tcp", at.String()); err == nil {
		t.Error("dialled from IPv4 to IPv6")
	}
	if _, err := n.Ping(ctx, probe, Gateway6); err == nil {
		t.Error("pinged from IPv4 to IPv6")
	}
	for _, bad := range []string{"ff02::1", "::", "::ffff:10.0.0.10", "fe80::1%eth0", nodeIP6.String()} {
		if _, err := n.Listen(netip.AddrPortFrom(netip.MustParseAddr(bad), 80)); err == nil {
			t.Errorf("listens on %s", bad)
		}
	}

	client := dns.Client{Net: "udp"}
	resolver, err := n.DialContext(ctx, probe, "udp", dnsServers[0].String()+":53")
	if err != nil {
		t.Fatal(err)
	}
	defer resolver.Close()
	for kind, want := range map[uint16]int{dns.TypeAAAA: 1, dns.TypeA: 0} {
		reply, _, err := client.ExchangeWithConn(new(dns.Msg).SetQuestion("six.example.", kind), &dns.Conn{Conn: resolver})
		if err != nil || reply.Rcode != dns.RcodeSuccess || len(reply.Answer) != want {
			t.Errorf("DNS answers %v, %v", reply, err)
		}
	}
}

// FuzzReceive6 is FuzzReceive where there is IPv6.
func FuzzReceive6(f *testing.F) {
	for _, seed := range [][]byte{
		nil,
		datagram6(podIP6, nodeIP6, "hello"),
		datagram6(podIP6, Gateway6, "hello"),
		datagram6(podLocal6, allNodes, "hello"),
		discovery(neighbourSolicitation, podLocal6, solicitedNode(Gateway6), Gateway6, podMAC),
		discovery(neighbourAdvertisement, podIP6, allNodes, podIP6, podMAC),
		discoveryPacket(podLocal6, allRouters, []byte{routerSolicitation, 0, 0, 0, 0, 0, 0, 0}),
		discoveryPacket(podIP6, Gateway6, []byte{128, 0, 0, 0, 0, 1, 0, 1}),
	} {
		f.Add(seed)
	}
	n := newNetwork6(f)
	node, pods := addPort(f, n, nodePort6()), addPort(f, n, podPort6())
	f.Fuzz(func(t *testing.T, packet []byte) {
		before := accounted(n.Counters()[pods.ENI])
		n.receive(pods, ethernet(podMAC, etherIPv6, packet))
		if after := accounted(n.Counters()[pods.ENI]); after != before+1 {
			t.Errorf("%d frames accounted for, want 1", after-before)
		}
		for _, got := range sent(node) {
			if h, ok := parseIPv6(got[ethernetHeader:]); !ok || h.src != podIP6 || h.dst != nodeIP6 {
				t.Errorf("%s got through to %s", h.src, h.dst)
			}
		}
		sent(pods)
	})
}
