package vpc

import (
	"encoding/binary"
	"net/netip"
)

const (
	ipv6Header     = 40
	protocolICMPv6 = 58

	routerSolicitation     = 133
	routerAdvertisement    = 134
	neighbourSolicitation  = 135
	neighbourAdvertisement = 136

	optionSourceMAC = 1
	optionTargetMAC = 2
	optionMTU       = 5
)

// Gateway6 is the IPv6 next hop of every port, and answers ping from addresses of the VPC. Tencent has every CVM use
// it, whatever its subnet: `ip -6 route add default dev eth0 via fe80::feee:ffff:feff:ffff`, says the guide "Linux
// 云服务器配置 IPv6" below https://cloud.tencent.com/document/product/1142. It is fe:ee:ff:ff:ff:ff with ff:fe in its
// middle.
var Gateway6 = netip.MustParseAddr("fe80::feee:ffff:feff:ffff")

// allNodes is who hears an advertisement that a machine without an address asked for.
var allNodes = netip.MustParseAddr("ff02::1")

func (n *Network) routeIPv6(p *port, b []byte) Reason {
	if !p.subnet.CIDR6.IsValid() {
		return DropIPv6
	}
	h, ok := parseIPv6(b)
	if !ok {
		return DropMalformed
	}
	owners := *n.owners.Load()
	own := owners[h.src] == p
	switch local := h.src.IsUnspecified() || h.src == p.linkLocal6(); {
	case !own && !local:
		return DropSource
	case h.discovery:
		return n.answerDiscovery(p, h)
	case h.dst.IsMulticast():
		return DropMulticast
	case local:
		return DropSource
	}
	switch q := owners[h.dst]; q {
	case nil:
		return DropUnknown
	case n.lab:
		n.inject(h.bytes)
	default:
		q.deliver(etherIPv6, h.bytes)
	}
	return delivered
}

// packet6 is what the fabric wants to know of an IPv6 packet.
type packet6 struct {
	src, dst  netip.Addr
	bytes     []byte // without the padding of a short frame
	payload   []byte // what follows the fixed header
	discovery bool   // a question or an announcement that does not leave the link
}

func parseIPv6(b []byte) (h packet6, ok bool) {
	if len(b) < ipv6Header || b[0]>>4 != 6 {
		return h, false
	}
	total := ipv6Header + int(binary.BigEndian.Uint16(b[4:]))
	if total > len(b) {
		return h, false
	}
	h = packet6{
		src:     netip.AddrFrom16([16]byte(b[8:24])),
		dst:     netip.AddrFrom16([16]byte(b[24:40])),
		bytes:   b[:total],
		payload: b[ipv6Header:total],
	}
	if b[6] == protocolICMPv6 && len(h.payload) > 0 {
		switch h.payload[0] {
		case routerSolicitation, neighbourSolicitation, neighbourAdvertisement:
			h.discovery = true
		}
	}
	return h, true
}

// linkLocal6 is the address that a machine gives itself: the one made of the MAC (RFC 4291, appendix A), which is
// what the kernel and systemd-networkd do unless told otherwise.
func (p *port) linkLocal6() netip.Addr {
	m := p.mac
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// answerDiscovery says, as answerARP does, that every address on the link but the asker's own is at the fabric, which
// is also the router. The source was checked. A question without one looks for a duplicate of an address, and there
// is none: the cloud gives every address once.
func (n *Network) answerDiscovery(p *port, h packet6) Reason {
	kind, size := h.payload[0], 24
	if kind == routerSolicitation {
		size = 8
	}
	m := h.payload
	if h.bytes[7] != 255 || len(m) < size || len(m)%8 != 0 || m[1] != 0 || checksumICMPv6(h.src, h.dst, m) != 0 {
		return DropMalformed
	}
	for o := m[size:]; len(o) > 0; o = o[int(o[1])*8:] {
		switch {
		case o[1] == 0 || int(o[1])*8 > len(o):
			return DropMalformed
		case (o[0] == optionSourceMAC || o[0] == optionTargetMAC) && [6]byte(o[2:8]) != p.mac:
			return DropMAC
		}
	}
	if kind == routerSolicitation {
		to := h.src
		if to.IsUnspecified() {
			to = allNodes
		}
		p.deliver(etherIPv6, discoveryPacket(Gateway6, to, advertiseRouter()))
		return delivered
	}
	target := netip.AddrFrom16([16]byte(m[8:24]))
	onLink := target == Gateway6 || p.subnet.CIDR6.Contains(target)
	if kind == neighbourSolicitation && !h.src.IsUnspecified() && onLink && (*n.owners.Load())[target] != p {
		p.deliver(etherIPv6, discoveryPacket(target, h.src, advertiseNeighbour(target)))
	}
	return delivered // the rest is announcements, and questions that nobody on the link answers
}

// advertiseRouter tells of a router and of no prefix: addresses are the cloud's to give.
func advertiseRouter() []byte {
	const hopLimit, lifetime = 64, 1800 // as long as AdvDefaultLifetime of RFC 4861, section 6.2.1
	m := make([]byte, 16, 32)
	m[0], m[4] = routerAdvertisement, hopLimit
	binary.BigEndian.PutUint16(m[6:], lifetime)
	m = append(append(m, optionSourceMAC, 1), fabricMAC[:]...)
	return binary.BigEndian.AppendUint32(append(m, optionMTU, 1, 0, 0), MTU)
}

func advertiseNeighbour(target netip.Addr) []byte {
	const router, solicited, override = 0x80, 0x40, 0x20
	m := make([]byte, 8, 32)
	m[0], m[4] = neighbourAdvertisement, solicited|override
	if target == Gateway6 {
		m[4] |= router
	}
	m = append(append(m, target.AsSlice()...), optionTargetMAC, 1)
	return append(m, fabricMAC[:]...)
}

// discoveryPacket wraps a message, whose checksum is 0 yet, in IPv6.
func discoveryPacket(src, dst netip.Addr, message []byte) []byte {
	binary.BigEndian.PutUint16(message[2:], checksumICMPv6(src, dst, message))
	b := make([]byte, 8, ipv6Header+len(message))
	b[0], b[6], b[7] = 0x60, protocolICMPv6, 255
	binary.BigEndian.PutUint16(b[4:], uint16(len(message)))
	b = append(append(b, src.AsSlice()...), dst.AsSlice()...)
	return append(b, message...)
}

// checksumICMPv6 covers the pseudo-header of RFC 8200, section 8.1, and a message of even size.
func checksumICMPv6(src, dst netip.Addr, message []byte) uint16 {
	b := append(src.AsSlice(), dst.AsSlice()...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(message)))
	return checksum(append(append(b, 0, 0, 0, protocolICMPv6), message...))
}
