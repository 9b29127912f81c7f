package vpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"math"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/miekg/dns"
)

// TestListenAgain: a connection that nobody ends does not keep a port from the next
// listener.
func TestListenAgain(t *testing.T) {
	n := newNetwork(t)
	at := netip.MustParseAddrPort("10.0.0.10:6443")
	l, err := n.Listen(at)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	client, err := n.DialContext(ctx, probe, "tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if c, err := n.DialContext(ctx, probe, "tcp", at.String()); err == nil {
		c.Close()
		t.Error("nobody listens, and a connection is accepted")
	}
	again, err := n.Listen(at)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Listen(at); err == nil {
		t.Error("two listen at one address")
	}
	again.Close()
}

func TestLabToLab(t *testing.T) {
	n := newNetwork(t)
	l, err := n.Listen(netip.MustParseAddrPort("169.254.0.23:80"))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		io.Copy(c, c)
		c.Close()
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := n.DialContext(ctx, probe, "tcp", "metadata.tencentyun.com:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if from := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr(); from != probe {
		t.Errorf("dialled from %s", from)
	}
	io.WriteString(c, "hello")
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Errorf("echo %q, %v", got, err)
	}
	if _, err := n.Ping(ctx, probe, gateway); err != nil {
		t.Error(err)
	}
	short, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	if _, err := n.Ping(short, probe, otherIP); err == nil {
		t.Error("nobody answers a ping")
	}
	if n.Counters()[Lab].Drops[DropUnknown] != 1 {
		t.Errorf("lab counts %v", n.Counters()[Lab].Drops)
	}
}

// ask sends one DHCP message of the node's and returns the answer, nil if there is none.
func ask(t *testing.T, n *Network, node *port, src, dst netip.Addr, m *dhcpv4.DHCPv4) *dhcpv4.DHCPv4 {
	t.Helper()
	n.receive(node, ethernet(nodeMAC, etherIPv4, datagram(src, dst, 68, 67, string(m.ToBytes()))))
	frames := sent(node)
	if len(frames) == 0 {
		return nil
	}
	h, ok := parseIPv4(frames[0][ethernetHeader:])
	if len(frames) != 1 || !ok || h.src != dhcpServer || !bytes.Equal(frames[0][:6], nodeMAC) {
		t.Fatalf("%d answers, the first % x", len(frames), frames[0])
	}
	reply, err := dhcpv4.FromBytes(h.payload[8:])
	if err != nil {
		t.Fatal(err)
	}
	if reply.IsBroadcast() != (h.dst == limitedBroadcast) || reply.TransactionID != m.TransactionID {
		t.Errorf("reply to %s: %s", h.dst, reply)
	}
	return reply
}

func TestDHCP(t *testing.T) {
	n := newNetwork(t)
	node := addPort(t, n, nodePort())
	zero := netip.IPv4Unspecified()
	discover, err := dhcpv4.NewDiscovery(nodeMAC)
	if err != nil {
		t.Fatal(err)
	}
	offer := ask(t, n, node, zero, limitedBroadcast, discover)
	request, err := dhcpv4.NewRequestFromOffer(offer)
	if err != nil {
		t.Fatal(err)
	}
	ack := ask(t, n, node, zero, limitedBroadcast, request)
	for name, ok := range map[string]bool{
		"offer":    offer.MessageType() == dhcpv4.MessageTypeOffer,
		"ack":      ack.MessageType() == dhcpv4.MessageTypeAck,
		"address":  ack.YourIPAddr.Equal(nodeIP.AsSlice()),
		"mask":     net.IP(ack.SubnetMask()).Equal(net.IPv4(255, 255, 255, 0)),
		"router":   len(ack.Router()) == 1 && ack.Router()[0].Equal(gateway.AsSlice()),
		"DNS":      len(ack.DNS()) == 2 && ack.DNS()[0].String() == "183.60.83.19" && ack.DNS()[1].String() == "183.60.82.98",
		"MTU":      bytes.Equal(ack.Options.Get(dhcpv4.OptionInterfaceMTU), []byte{0x05, 0xdc}),
		"hostname": ack.HostName() == "node-1",
		"domain":   ack.DomainName() == "lab.example",
		"lease":    ack.IPAddressLeaseTime(0) == leaseTime,
	} {
		if !ok {
			t.Errorf("%s is wrong in %s", name, ack.Summary())
		}
	}

	renew, _ := dhcpv4.NewRenewFromAck(ack)
	if r := ask(t, n, node, nodeIP, dhcpServer, renew); r == nil || r.MessageType() != dhcpv4.MessageTypeAck {
		t.Errorf("renewed with %v", r)
	}
	stale, _ := dhcpv4.NewRequestFromOffer(offer, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(otherIP.AsSlice())))
	if r := ask(t, n, node, zero, limitedBroadcast, stale); r == nil || r.MessageType() != dhcpv4.MessageTypeNak {
		t.Errorf("request of an address that is not assigned answered with %v", r)
	}
	inform, _ := dhcpv4.NewInform(nodeMAC, nodeIP.AsSlice())
	if r := ask(t, n, node, nodeIP, limitedBroadcast, inform); r == nil || !r.YourIPAddr.IsUnspecified() || r.IPAddressLeaseTime(0) != 0 {
		t.Errorf("inform answered with %v", r)
	}
	elsewhere, _ := dhcpv4.NewRequestFromOffer(offer, dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 0, 0, 9))))
	if r := ask(t, n, node, zero, limitedBroadcast, elsewhere); r != nil {
		t.Errorf("request to another server answered with %s", r.Summary())
	}
	release, _ := dhcpv4.NewReleaseFromACK(ack)
	if r := ask(t, n, node, nodeIP, dhcpServer, release); r != nil {
		t.Errorf("release answered with %s", r.Summary())
	}
	wantDrops(t, n, "eni-node", nil)
	forged, _ := dhcpv4.NewDiscovery(podMAC)
	if r := ask(t, n, node, zero, limitedBroadcast, forged); r != nil {
		t.Errorf("discover of another MAC answered with %s", r.Summary())
	}
	wantDrops(t, n, "eni-node", map[Reason]uint64{DropMalformed: 1})
}

func TestDNS(t *testing.T) {
	n := newNetwork(t)
	tests := []struct {
		name   string
		kind   uint16
		rcode  int
		answer string
	}{
		{"metadata.tencentyun.com.", dns.TypeA, dns.RcodeSuccess, "169.254.0.23"},
		{"Metadata.TencentYun.com.", dns.TypeA, dns.RcodeSuccess, "169.254.0.23"},
		{"metadata.tencentyun.com.", dns.TypeAAAA, dns.RcodeSuccess, ""},
		{"vpc.internal.tencentcloudapi.com.", dns.TypeA, dns.RcodeSuccess, "169.254.0.95"},
		{"a.b.internal.tencentcloudapi.com.", dns.TypeA, dns.RcodeSuccess, "169.254.0.95"},
		{"internal.tencentcloudapi.com.", dns.TypeA, dns.RcodeNameError, ""},
		{"time5.tencentyun.com.", dns.TypeA, dns.RcodeSuccess, "169.254.0.79"},
		{"example.com.", dns.TypeA, dns.RcodeNameError, ""},
		{".", dns.TypeNS, dns.RcodeNameError, ""},
	}
	for _, network := range []string{"udp", "tcp"} {
		for _, server := range dnsServers {
			conn, err := n.DialContext(t.Context(), probe, network, netip.AddrPortFrom(server, 53).String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			for _, test := range tests {
				reply, _, err := new(dns.Client).ExchangeWithConn(new(dns.Msg).SetQuestion(test.name, test.kind), &dns.Conn{Conn: conn})
				if err != nil {
					t.Fatal(err)
				}
				answer := ""
				if len(reply.Answer) == 1 {
					answer = reply.Answer[0].(*dns.A).A.String()
				}
				if reply.Rcode != test.rcode || answer != test.answer {
					t.Errorf("%s %s over %s: %s %q", test.name, dns.TypeToString[test.kind], network, dns.RcodeToString[reply.Rcode], answer)
				}
			}
		}
	}
	n.SetHosts(map[string]netip.Addr{"example.com": probe})
	if a, ok := n.lookup("example.com."); !ok || a != probe {
		t.Errorf("example.com is %v", a)
	}
	if a, ok := n.lookup("metadata.tencentyun.com"); ok {
		t.Errorf("a removed name is %s", a)
	}
}

func TestNTP(t *testing.T) {
	n := newNetwork(t)
	conn, err := n.DialContext(t.Context(), probe, "udp", NTPServer.String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	exchange := func() (offset time.Duration, err error) {
		request := [48]byte{0: 4<<3 | 3, 40: 1, 47: 9}
		if _, err := conn.Write(request[:]); err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(2 * time.Second))
		var reply [48]byte
		if _, err := io.ReadFull(conn, reply[:]); err != nil {
			return 0, err
		}
		if reply[0] != 4<<3|4 || reply[1] == 0 || reply[1] > 15 || !bytes.Equal(reply[24:32], request[40:]) {
			t.Errorf("reply % x", reply)
		}
		seconds := float64(binary.BigEndian.Uint64(reply[40:])) / (1 << 32)
		now := float64(ntpTime(time.Now())) / (1 << 32)
		return time.Duration((seconds - now) * 1e9), nil
	}
	for _, want := range []time.Duration{0, 2 * time.Hour, -2 * time.Hour} {
		n.SetClock(want, true)
		if got, err := exchange(); err != nil || math.Abs(float64(got-want)) > 1e9 {
			t.Errorf("clock is %s off, want %s: %v", got, want, err)
		}
	}
	n.SetClock(0, false)
	if _, err := exchange(); err == nil {
		t.Error("a silent clock answers")
	}
}

// Close ends what waits: accepted connections, listeners, dialers.
func TestClose(t *testing.T) {
	n, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	addPort(t, n, nodePort())
	l, err := n.Listen(netip.MustParseAddrPort("10.0.0.10:6443"))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan string, 3)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
			return
		}
		go func() {
			c.Read(make([]byte, 1))
			ended <- "connection"
		}()
		l.Accept()
		ended <- "listener"
	}()
	if _, err := n.DialContext(t.Context(), probe, "tcp", "10.0.0.10:6443"); err != nil {
		t.Fatal(err)
	}
	go func() {
		n.DialContext(t.Context(), probe, "tcp", "10.0.0.5:22") // nobody answers
		ended <- "dialer"
	}()
	for n.Counters()["eni-node"].Rx.Packets == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	if err := n.Close(); err != nil {
		t.Error("closed twice:", err)
	}
	for range cap(ended) {
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Fatal("something still waits")
		}
	}
	if _, err := n.Listen(netip.MustParseAddrPort("10.0.0.10:6443")); err == nil {
		t.Error("listens on a closed network")
	}
	if err := n.AttachTap(nodePort(), nil); err == nil {
		t.Error("attaches to a closed network")
	}
}
