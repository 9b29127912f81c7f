package vpc

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// leaseTime is long: an address is the ENI's for good, and a lab that is restored from a snapshot wakes up later.
const leaseTime = 30 * 24 * time.Hour

// dhcpServer names itself; ARP tables of CVMs show this address beside the metadata service's, at the fabric's MAC.
var dhcpServer = netip.AddrFrom4([4]byte{169, 254, 0, 4})

// dnsServers are Tencent's in every VPC (https://cloud.tencent.com/document/product/213/2225).
var dnsServers = []netip.Addr{netip.AddrFrom4([4]byte{183, 60, 83, 19}), netip.AddrFrom4([4]byte{183, 60, 82, 98})}

// answerDHCP answers a UDP datagram to port 67 of a primary ENI.
func (n *Network) answerDHCP(p *port, datagram []byte) Reason {
	size := int(binary.BigEndian.Uint16(datagram[4:]))
	if size < 8 || size > len(datagram) {
		return DropMalformed
	}
	request, err := dhcpv4.FromBytes(datagram[8:size])
	if err != nil || request.OpCode != dhcpv4.OpcodeBootRequest || !bytes.Equal(request.ClientHWAddr, p.mac[:]) {
		return DropMalformed
	}
	reply, err := n.dhcpReply(p, request)
	if err != nil {
		return DropMalformed
	}
	if reply != nil {
		p.deliver(etherIPv4, dhcpPacket(reply))
	}
	return delivered
}

// dhcpReply is nil for what needs no answer.
func (n *Network) dhcpReply(p *port, request *dhcpv4.DHCPv4) (*dhcpv4.DHCPv4, error) {
	addr := net.IP(p.assigned()[0].AsSlice())
	kind := dhcpv4.MessageTypeAck
	switch request.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		kind = dhcpv4.MessageTypeOffer
	case dhcpv4.MessageTypeInform:
	case dhcpv4.MessageTypeRequest:
		server := request.ServerIdentifier()
		if server != nil && !server.Equal(dhcpServer.AsSlice()) {
			return nil, nil
		}
		wanted := request.RequestedIPAddress()
		if wanted == nil {
			wanted = request.ClientIPAddr
		}
		if !wanted.Equal(addr) {
			return dhcpv4.NewReplyFromRequest(request, dhcpv4.WithMessageType(dhcpv4.MessageTypeNak),
				dhcpv4.WithOption(dhcpv4.OptServerIdentifier(dhcpServer.AsSlice())), dhcpv4.WithBroadcast(true))
		}
	default:
		return nil, nil
	}
	dns := []net.IP{dnsServers[0].AsSlice(), dnsServers[1].AsSlice()}
	mods := []dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind),
		dhcpv4.WithClientIP(request.ClientIPAddr),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(dhcpServer.AsSlice())),
		dhcpv4.WithNetmask(net.CIDRMask(p.subnet.CIDR.Bits(), 32)),
		dhcpv4.WithOption(dhcpv4.OptRouter(p.subnet.Gateway().AsSlice())),
		dhcpv4.WithOption(dhcpv4.OptDNS(dns...)),
		dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, binary.BigEndian.AppendUint16(nil, MTU)),
	}
	if request.MessageType() != dhcpv4.MessageTypeInform {
		mods = append(mods, dhcpv4.WithYourIP(addr), dhcpv4.WithLeaseTime(uint32(leaseTime/time.Second)))
	}
	if p.Hostname != "" {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptHostName(p.Hostname)))
	}
	if n.config.Domain != "" {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptDomainName(n.config.Domain)))
	}
	return dhcpv4.NewReplyFromRequest(request, mods...)
}

// dhcpPacket wraps a reply in UDP and IPv4, to whom RFC 2131, section 4.1, says.
func dhcpPacket(reply *dhcpv4.DHCPv4) []byte {
	to := limitedBroadcast
	switch {
	case reply.IsBroadcast():
	case !reply.ClientIPAddr.IsUnspecified():
		to, _ = netip.AddrFromSlice(reply.ClientIPAddr.To4())
	case !reply.YourIPAddr.IsUnspecified():
		to, _ = netip.AddrFromSlice(reply.YourIPAddr.To4())
	}
	message := reply.ToBytes()
	b := make([]byte, 28, 28+len(message))
	b[0], b[8], b[9] = 0x45, 64, protocolUDP
	binary.BigEndian.PutUint16(b[2:], uint16(28+len(message)))
	copy(b[12:], dhcpServer.AsSlice())
	copy(b[16:], to.AsSlice())
	binary.BigEndian.PutUint16(b[10:], checksum(b[:20]))
	binary.BigEndian.PutUint16(b[20:], dhcpServerPort)
	binary.BigEndian.PutUint16(b[22:], dhcpServerPort+1)
	binary.BigEndian.PutUint16(b[24:], uint16(8+len(message)))
	return append(b, message...) // a UDP checksum of 0 is none, which IPv4 allows
}
