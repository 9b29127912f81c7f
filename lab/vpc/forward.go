package vpc

import (
	"encoding/binary"
	"net/netip"
)

const (
	etherIPv4 = 0x0800
	etherARP  = 0x0806
	etherIPv6 = 0x86dd

	protocolUDP    = 17
	dhcpServerPort = 67
)

// linkLocal is where the cloud's own services live. CVMs may have a route to it on the link: the fabric answers ARP
// for it as for the subnet (`arp -a` of a CVM shows 169.254.0.23 and 169.254.0.4 at the gateway's fe:ee MAC).
var linkLocal = netip.MustParsePrefix("169.254.0.0/16")

var limitedBroadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// receive takes one frame from a machine: forwards it, answers it, or drops and counts it. The frame is the caller's
// again when it returns. Between two ports nothing is allocated.
func (n *Network) receive(p *port, frame []byte) {
	if c := p.capture.Load(); c != nil {
		c.record(frame, nil)
	}
	if why := n.route(p, frame); why != delivered {
		p.drop(why, frame)
		return
	}
	p.counts.tx.add(len(frame))
}

func (n *Network) route(p *port, frame []byte) Reason {
	switch {
	case p.down.Load():
		return DropLinkDown
	case len(frame) < ethernetHeader || len(frame) > maxFrame:
		return DropMalformed
	case [6]byte(frame[6:12]) != p.mac:
		return DropMAC
	}
	payload := frame[ethernetHeader:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case etherIPv4:
		return n.routeIPv4(p, payload)
	case etherARP:
		return n.answerARP(p, payload)
	case etherIPv6:
		return n.routeIPv6(p, payload)
	}
	return DropProtocol
}

func (n *Network) routeIPv4(p *port, b []byte) Reason {
	h, ok := parseIPv4(b)
	if !ok {
		return DropMalformed
	}
	owners := *n.owners.Load()
	own := owners[h.src] == p
	if h.dhcp && p.Primary && (own || h.src.IsUnspecified()) {
		return n.answerDHCP(p, h.payload)
	}
	if !own {
		return DropSource
	}
	switch q := owners[h.dst]; q {
	case nil:
		return DropUnknown
	case n.lab:
		n.inject(h.bytes)
	default:
		q.deliver(etherIPv4, h.bytes)
	}
	return delivered
}

// packet is what the fabric wants to know of an IPv4 packet.
type packet struct {
	src, dst netip.Addr
	bytes    []byte // without the padding of a short frame
	payload  []byte // what follows the header
	dhcp     bool   // a datagram to a DHCP server
}

func parseIPv4(b []byte) (h packet, ok bool) {
	if len(b) < 20 || b[0]>>4 != 4 {
		return h, false
	}
	head, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
	if head < 20 || total < head || total > len(b) || checksum(b[:head]) != 0 {
		return h, false
	}
	h = packet{
		src:     netip.AddrFrom4([4]byte(b[12:16])),
		dst:     netip.AddrFrom4([4]byte(b[16:20])),
		bytes:   b[:total],
		payload: b[head:total],
	}
	fragment := binary.BigEndian.Uint16(b[6:])&0x3fff != 0
	h.dhcp = b[9] == protocolUDP && !fragment && len(h.payload) >= 8 &&
		binary.BigEndian.Uint16(h.payload[2:]) == dhcpServerPort && (h.dst == limitedBroadcast || h.dst == dhcpServer)
	return h, true
}

// checksum is the Internet checksum of RFC 1071; 0 over a header that carries its own.
func checksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// answerARP says that every address on the link, but the asker's own, is at the fabric. The sender is checked as a
// packet's source is: a host that asks in the name of another ENI's address gets no answer. (Linux does that on an
// interface without an address of its own, unless arp_announce says otherwise.)
func (n *Network) answerARP(p *port, b []byte) Reason {
	const request, reply = 1, 2
	if len(b) < 28 || binary.BigEndian.Uint64(b)>>16 != 0x0001_0800_0604 {
		return DropMalformed
	}
	operation := binary.BigEndian.Uint16(b[6:])
	sender, target := netip.AddrFrom4([4]byte(b[14:18])), netip.AddrFrom4([4]byte(b[24:28]))
	owners := *n.owners.Load()
	switch {
	case operation != request && operation != reply:
		return DropMalformed
	case [6]byte(b[8:14]) != p.mac:
		return DropMAC
	case !sender.IsUnspecified() && owners[sender] != p:
		return DropARPSender
	case operation == reply, owners[target] == p, !p.subnet.CIDR.Contains(target) && !linkLocal.Contains(target):
		return delivered // an announcement, or a question that nobody on the link answers
	}
	var answer [28]byte
	copy(answer[:], b[:6])
	binary.BigEndian.PutUint16(answer[6:], reply)
	copy(answer[8:], fabricMAC[:])
	copy(answer[14:], b[24:28])
	copy(answer[18:], p.mac[:])
	copy(answer[24:], b[14:18])
	p.deliver(etherARP, answer[:])
	return delivered
}
