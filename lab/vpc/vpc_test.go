package vpc

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var (
	nodeMAC = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 1}
	podMAC  = net.HardwareAddr{0x52, 0x54, 0, 0, 0, 2}
	gateway = netip.MustParseAddr("10.0.0.1")
	nodeIP  = netip.MustParseAddr("10.0.0.5")
	podENI  = netip.MustParseAddr("10.0.16.9")
	podIP   = netip.MustParseAddr("10.0.16.10")
	otherIP = netip.MustParseAddr("10.0.16.11")
	probe   = netip.MustParseAddr("10.0.0.20")
)

func testConfig() Config {
	return Config{
		CIDR: netip.MustParsePrefix("10.0.0.0/16"),
		Subnets: []Subnet{
			{ID: "subnet-node0001", CIDR: netip.MustParsePrefix("10.0.0.0/24")},
			{ID: "subnet-pods0001", CIDR: netip.MustParsePrefix("10.0.16.0/20")},
		},
		Domain: "lab.example",
		Hosts: map[string]netip.Addr{
			"metadata.tencentyun.com":         netip.MustParseAddr("169.254.0.23"),
			"*.internal.tencentcloudapi.com.": netip.MustParseAddr("169.254.0.95"),
		},
		Log: slog.New(slog.DiscardHandler),
	}
}

func newNetwork(t testing.TB) *Network {
	n, err := New(testConfig())
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

// quiet is a link without a machine: a test plays the machine by calling receive and reading the port's queue.
type quiet struct{ closed chan struct{} }

func (q quiet) serve(*port)  { <-q.closed }
func (q quiet) Close() error { close(q.closed); return nil }

func addPort(t testing.TB, n *Network, p Port) *port {
	q, err := n.newPort(p)
	if err == nil {
		err = n.add(q, quiet{make(chan struct{})})
	}
	if err != nil {
		t.Fatal(err)
	}
	q.connected.Store(true)
	return q
}

func nodePort() Port {
	return Port{ENI: "eni-node", MAC: nodeMAC, Subnet: "subnet-node0001", Addrs: []netip.Addr{nodeIP}, Primary: true, Hostname: "node-1"}
}

func podPort() Port {
	return Port{ENI: "eni-pods", MAC: podMAC, Subnet: "subnet-pods0001", Addrs: []netip.Addr{podENI, podIP}}
}

// sent is the frames queued for the port's machine.
func sent(p *port) (frames [][]byte) {
	for b := p.out.take(nil); len(b) > 0; {
		size := binary.BigEndian.Uint32(b)
		frames = append(frames, b[4:4+size])
		b = b[4+size:]
	}
	return frames
}

func ethernet(src net.HardwareAddr, etherType uint16, payload []byte) []byte {
	b := append(append([]byte{}, fabricMAC[:]...), src...)
	return append(binary.BigEndian.AppendUint16(b, etherType), payload...)
}

// datagram is an IPv4 packet with a UDP header.
func datagram(src, dst netip.Addr, from, to uint16, payload string) []byte {
	b := make([]byte, 28, 28+len(payload))
	b[0], b[8], b[9] = 0x45, 64, protocolUDP
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(payload)))
	copy(b[12:], src.AsSlice())
	copy(b[16:], dst.AsSlice())
	binary.BigEndian.PutUint16(b[10:], checksum(b[:20]))
	binary.BigEndian.PutUint16(b[20:], from)
	binary.BigEndian.PutUint16(b[22:], to)
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(payload)))
	return append(b, payload...)
}

func arp(operation uint16, mac net.HardwareAddr, sender, target netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, 0, byte(operation)}
	b = append(append(b, mac...), sender.AsSlice()...)
	return append(append(b, 0, 0, 0, 0, 0, 0), target.AsSlice()...)
}

func wantDrops(t *testing.T, n *Network, eni string, want map[Reason]uint64) {
	t.Helper()
	got := n.Counters()[eni].Drops
	for r := range reasons {
		if got[r] != want[r] {
			t.Errorf("%s: %d dropped for %q, want %d", eni, got[r], reasonText[r], want[r])
		}
	}
}

func TestReceive(t *testing.T) {
	zero, all := netip.IPv4Unspecified(), limitedBroadcast
	short := datagram(podIP, nodeIP, 1, 2, "hello")
	badSum := bytes.Clone(short)
	badSum[10]++
	badVersion := bytes.Clone(short)
	badVersion[0] = 0x65
	shortARP := arp(1, podMAC, podENI, netip.MustParseAddr("10.0.16.1"))[:27]
	tests := []struct {
		name  string
		frame []byte
		drop  Reason // by the sender's port; delivered if none
		got   int    // frames that reach the node
	}{
		{"to another ENI", ethernet(podMAC, etherIPv4, short), delivered, 1},
		{"padded", ethernet(podMAC, etherIPv4, append(bytes.Clone(short), make([]byte, 20)...)), delivered, 1},
		{"primary address as source", ethernet(podMAC, etherIPv4, datagram(podENI, nodeIP, 1, 2, "")), delivered, 1},
		{"to the lab", ethernet(podMAC, etherIPv4, datagram(podIP, gateway, 1, 2, "")), delivered, 0},
		{"another ENI's MAC", ethernet(nodeMAC, etherIPv4, short), DropMAC, 0},
		{"another ENI's address", ethernet(podMAC, etherIPv4, datagram(nodeIP, nodeIP, 1, 2, "")), DropSource, 0},
		{"nobody's address", ethernet(podMAC, etherIPv4, datagram(otherIP, nodeIP, 1, 2, "")), DropSource, 0},
		{"the gateway's address", ethernet(podMAC, etherIPv4, datagram(gateway, nodeIP, 1, 2, "")), DropSource, 0},
		{"DHCP on a secondary ENI", ethernet(podMAC, etherIPv4, datagram(zero, all, 68, 67, "")), DropSource, 0},
		{"to nobody", ethernet(podMAC, etherIPv4, datagram(podIP, otherIP, 1, 2, "")), DropUnknown, 0},
		{"to the Internet", ethernet(podMAC, etherIPv4, datagram(podIP, netip.MustParseAddr("8.8.8.8"), 1, 2, "")), DropUnknown, 0},
		{"broadcast", ethernet(podMAC, etherIPv4, datagram(podIP, all, 1, 2, "")), DropUnknown, 0},
		{"multicast", ethernet(podMAC, etherIPv4, datagram(podIP, netip.MustParseAddr("224.0.0.22"), 1, 2, "")), DropUnknown, 0},
		{"empty", nil, DropMalformed, 0},
		{"no payload", ethernet(podMAC, etherIPv4, nil), DropMalformed, 0},
		{"cut", ethernet(podMAC, etherIPv4, short[:len(short)-1]), DropMalformed, 0},
		{"wrong checksum", ethernet(podMAC, etherIPv4, badSum), DropMalformed, 0},
		{"wrong version", ethernet(podMAC, etherIPv4, badVersion), DropMalformed, 0},
		{"larger than the MTU", ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, strings.Repeat("x", MTU-27))), DropMalformed, 0},
		{"as large as the MTU", ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, strings.Repeat("x", MTU-28))), delivered, 1},
		{"IPv6", ethernet(podMAC, etherIPv6, make([]byte, 40)), DropIPv6, 0},
		{"VLAN", ethernet(podMAC, 0x8100, make([]byte, 40)), DropProtocol, 0},
		{"cut ARP", ethernet(podMAC, etherARP, shortARP), DropMalformed, 0},
		{"ARP in another's name", ethernet(podMAC, etherARP, arp(1, podMAC, nodeIP, gateway)), DropARPSender, 0},
		{"ARP with another's MAC inside", ethernet(podMAC, etherARP, arp(1, nodeMAC, podENI, gateway)), DropMAC, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			n := newNetwork(t)
			node, pods := addPort(t, n, nodePort()), addPort(t, n, podPort())
			n.receive(pods, test.frame)
			want := map[Reason]uint64{test.drop: 1}
			delete(want, delivered)
			wantDrops(t, n, "eni-pods", want)
			c := n.Counters()["eni-pods"].Tx
			if taken := test.drop == delivered; taken != (c == Traffic{Packets: 1, Bytes: uint64(len(test.frame))}) {
				t.Errorf("sender counts %+v", c)
			}
			frames := sent(node)
			if len(frames) != test.got {
				t.Fatalf("%d frames reach the node, want %d", len(frames), test.got)
			}
			for _, f := range frames {
				if !bytes.Equal(f[:6], nodeMAC) || !bytes.Equal(f[6:12], fabricMAC[:]) {
					t.Errorf("frame to %x from %x, want to the node from the fabric", f[:6], f[6:12])
				}
				sent := test.frame[ethernetHeader:]
				if total := int(binary.BigEndian.Uint16(sent[2:])); !bytes.Equal(f[ethernetHeader:], sent[:total]) {
					t.Errorf("packet changed on its way:\n%s", hex.Dump(f))
				}
			}
		})
	}
}

func TestARP(t *testing.T) {
	n := newNetwork(t)
	pods := addPort(t, n, podPort())
	zero := netip.IPv4Unspecified()
	tests := []struct {
		name           string
		operation      uint16
		sender, target string
		answered       bool
	}{
		{"gateway", 1, "10.0.16.9", "10.0.16.1", true},
		{"neighbour that exists or not", 1, "10.0.16.10", "10.0.31.7", true},
		{"link-local service", 1, "10.0.16.9", "169.254.0.23", true},
		{"own address", 1, "10.0.16.9", "10.0.16.10", false},
		{"announcement", 1, "10.0.16.9", "10.0.16.9", false},
		{"probe of an own address", 1, zero.String(), "10.0.16.10", false},
		{"probe of an address that is not assigned", 1, zero.String(), "10.0.16.11", true},
		{"another subnet", 1, "10.0.16.9", "10.0.0.1", false},
		{"reply", 2, "10.0.16.9", "10.0.16.1", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			sender, target := netip.MustParseAddr(test.sender), netip.MustParseAddr(test.target)
			n.receive(pods, ethernet(podMAC, etherARP, arp(test.operation, podMAC, sender, target)))
			frames := sent(pods)
			if test.answered != (len(frames) == 1) {
				t.Fatalf("%d answers", len(frames))
			}
			if !test.answered {
				return
			}
			want := arp(2, fabricMAC[:], target, sender)
			copy(want[18:], podMAC)
			if f := frames[0]; !bytes.Equal(f, append(append(append(bytes.Clone(podMAC), fabricMAC[:]...), 8, 6), want...)) {
				t.Errorf("answer:\n%s", hex.Dump(f))
			}
		})
	}
	wantDrops(t, n, "eni-pods", nil)
}

func TestSetAddrs(t *testing.T) {
	n := newNetwork(t)
	node, pods := addPort(t, n, nodePort()), addPort(t, n, podPort())
	out := ethernet(podMAC, etherIPv4, datagram(otherIP, nodeIP, 1, 2, ""))
	in := ethernet(nodeMAC, etherIPv4, datagram(nodeIP, otherIP, 1, 2, ""))
	try := func() (outwards, inwards bool) {
		n.receive(pods, out)
		n.receive(node, in)
		return len(sent(node)) == 1, len(sent(pods)) == 1
	}
	if o, i := try(); o || i {
		t.Error("an address passes before it is assigned")
	}
	if err := n.SetAddrs("eni-pods", []netip.Addr{podENI, otherIP}); err != nil {
		t.Fatal(err)
	}
	if o, i := try(); !o || !i {
		t.Errorf("an assigned address: sends %v, receives %v", o, i)
	}
	n.receive(pods, ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, "")))
	if len(sent(node)) != 0 {
		t.Error("an address passes after it was unassigned")
	}
	if err := n.SetAddrs("eni-pods", []netip.Addr{podENI}); err != nil {
		t.Fatal(err)
	}
	if o, i := try(); o || i {
		t.Error("an address passes after it was unassigned")
	}
	for _, bad := range [][]netip.Addr{
		nil,
		{podENI, podENI},
		{nodeIP},
		{podENI, netip.MustParseAddr("10.0.16.0")},
		{podENI, netip.MustParseAddr("10.0.31.255")},
		{podENI, netip.MustParseAddr("10.0.16.1")},
		{podENI, netip.MustParseAddr("fd00::1")},
	} {
		if err := n.SetAddrs("eni-pods", bad); err == nil {
			t.Errorf("SetAddrs(%v) succeeds", bad)
		}
	}
	if err := n.SetAddrs("eni-none", []netip.Addr{podENI}); err == nil {
		t.Error("SetAddrs of an unknown ENI succeeds")
	}
}

func TestLinkAndQueue(t *testing.T) {
	n := newNetwork(t)
	node, pods := addPort(t, n, nodePort()), addPort(t, n, podPort())
	frame := ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, strings.Repeat("x", 1400)))
	n.SetLink("eni-node", false)
	n.receive(pods, frame)
	n.receive(node, ethernet(nodeMAC, etherIPv4, datagram(nodeIP, podIP, 1, 2, "")))
	wantDrops(t, n, "eni-node", map[Reason]uint64{DropLinkDown: 2})
	n.SetLink("eni-node", true)
	fits := queueBytes / (4 + len(frame))
	for range fits + 3 {
		n.receive(pods, frame)
	}
	wantDrops(t, n, "eni-node", map[Reason]uint64{DropLinkDown: 2, DropQueueFull: 3})
	if got := len(sent(node)); got != fits {
		t.Errorf("%d frames wait, want %d", got, fits)
	}
	node.connected.Store(false)
	n.receive(pods, frame)
	wantDrops(t, n, "eni-node", map[Reason]uint64{DropLinkDown: 3, DropQueueFull: 3})
}

func TestAttachRefuses(t *testing.T) {
	n := newNetwork(t)
	addPort(t, n, nodePort())
	if _, err := n.Listen(netip.AddrPortFrom(probe, 80)); err != nil {
		t.Fatal(err)
	}
	other := func(change func(*Port)) Port { p := podPort(); change(&p); return p }
	tests := []struct {
		name string
		port Port
		want string
	}{
		{"no id", other(func(p *Port) { p.ENI = "" }), "no ENI id"},
		{"the lab's name", other(func(p *Port) { p.ENI = Lab }), "no ENI id"},
		{"id twice", other(func(p *Port) { p.ENI = "eni-node" }), "already attached"},
		{"MAC twice", other(func(p *Port) { p.MAC = nodeMAC }), "eni-node has it"},
		{"no MAC", other(func(p *Port) { p.MAC = nil }), "want a unicast address"},
		{"multicast MAC", other(func(p *Port) { p.MAC = net.HardwareAddr{1, 0, 0, 0, 0, 1} }), "want a unicast address"},
		{"the fabric's MAC", other(func(p *Port) { p.MAC = fabricMAC[:] }), "want a unicast address"},
		{"unknown subnet", other(func(p *Port) { p.Subnet = "subnet-x" }), "not in the VPC"},
		{"no address", other(func(p *Port) { p.Addrs = nil }), "no primary address"},
		{"address of the lab", other(func(p *Port) { p.Subnet, p.Addrs = "subnet-node0001", []netip.Addr{probe} }), "lab has it"},
		{"address of another ENI", other(func(p *Port) { p.Subnet, p.Addrs = "subnet-node0001", []netip.Addr{nodeIP} }), "eni-node has it"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			socket := filepath.Join(shortDir(t), "s")
			if err := n.Attach(test.port, socket); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want one with %q", err, test.want)
			}
			if _, err := net.Dial("unix", socket); err == nil {
				t.Error("the socket is still there")
			}
		})
	}
	if _, err := n.Listen(netip.AddrPortFrom(nodeIP, 80)); err == nil || !strings.Contains(err.Error(), "eni-node has it") {
		t.Errorf("listen on an ENI's address: %v", err)
	}
}

// shortDir is a directory for sockets, whose paths have room for some 100 bytes:
// $TMPDIR may be longer than that by itself.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tkenode")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
