package vpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const nicID tcpip.NICID = 1

// Listen accepts TCP connections at an address of the lab's own. Any address that no ENI has will do: one in the VPC,
// a link-local one, or one outside that stands for the rest of the world.
func (n *Network) Listen(addr netip.AddrPort) (net.Listener, error) {
	if err := n.claim(addr.Addr()); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	var events waiter.Queue
	ep, err := n.stack.NewEndpoint(tcp.ProtocolNumber, protocol(addr.Addr()), &events)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %s", addr, err)
	}
	// Connections of machines that are no more keep the port of a listener before.
	ep.SocketOptions().SetReuseAddress(true)
	err = ep.Bind(fullAddress(addr))
	if err == nil {
		err = ep.Listen(backlog)
	}
	if err != nil {
		ep.Close()
		return nil, fmt.Errorf("listen on %s: %s", addr, err)
	}
	return &listener{gonet.NewTCPListener(n.stack, &events, ep)}, nil
}

// backlog is Linux's default (net.core.somaxconn).
const backlog = 4096

// ListenPacket receives UDP datagrams at an address of the lab's own.
func (n *Network) ListenPacket(addr netip.AddrPort) (net.PacketConn, error) {
	if err := n.claim(addr.Addr()); err != nil {
		return nil, fmt.Errorf("listen on udp %s: %w", addr, err)
	}
	local := fullAddress(addr)
	c, err := gonet.DialUDP(n.stack, &local, nil, protocol(addr.Addr()))
	if err != nil {
		return nil, fmt.Errorf("listen on udp %s: %w", addr, err)
	}
	return c, nil
}

// DialContext connects from an address of the lab's own to addr ("host:port", the host an address or a name that the
// VPC's DNS knows) over network "tcp" or "udp".
func (n *Network) DialContext(ctx context.Context, from netip.Addr, network, addr string) (net.Conn, error) {
	conn, err := n.dial(ctx, from, network, addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s %s from %s: %w", network, addr, from, err)
	}
	return conn, nil
}

func (n *Network) dial(ctx context.Context, from netip.Addr, network, addr string) (net.Conn, error) {
	to, err := n.resolve(addr)
	if err != nil {
		return nil, err
	}
	if err := n.claim(from); err != nil {
		return nil, err
	}
	if from.Is4() != to.Addr().Is4() {
		return nil, fmt.Errorf("%s is of another address family", to.Addr())
	}
	local, remote := fullAddress(netip.AddrPortFrom(from, 0)), fullAddress(to)
	switch network {
	case "tcp", "tcp4", "tcp6":
		return gonet.DialTCPWithBind(ctx, n.stack, local, remote, protocol(from))
	case "udp", "udp4", "udp6":
		return gonet.DialUDP(n.stack, &local, &remote, protocol(from))
	}
	return nil, net.UnknownNetworkError(network)
}

func (n *Network) resolve(addr string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if a, ok := n.lookup(host); ok {
		host = a.String()
	}
	return netip.ParseAddrPort(net.JoinHostPort(host, port))
}

// Ping sends one ICMP echo from an address of the lab's own and waits for its answer, 5 s if ctx has no deadline.
func (n *Network) Ping(ctx context.Context, from, to netip.Addr) (time.Duration, error) {
	rtt, err := n.ping(ctx, from, to)
	if err != nil {
		return 0, fmt.Errorf("ping %s from %s: %w", to, from, err)
	}
	return rtt, nil
}

func (n *Network) ping(ctx context.Context, from, to netip.Addr) (time.Duration, error) {
	if err := n.claim(from); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	transport, echo := icmp.ProtocolNumber4, make([]byte, header.ICMPv4MinimumSize+56)
	header.ICMPv4(echo).SetType(header.ICMPv4Echo)
	if from.Is6() { // whose echo is as long, and differs in its type
		transport = icmp.ProtocolNumber6
		header.ICMPv6(echo).SetType(header.ICMPv6EchoRequest)
	}
	var wq waiter.Queue
	ep, fail := n.stack.NewEndpoint(transport, protocol(from), &wq)
	if fail != nil {
		return 0, errors.New(fail.String())
	}
	conn := gonet.NewUDPConn(&wq, ep) // it serves any datagram endpoint
	defer conn.Close()
	if fail := ep.Bind(fullAddress(netip.AddrPortFrom(from, 0))); fail != nil {
		return 0, errors.New(fail.String())
	}
	if fail := ep.Connect(fullAddress(netip.AddrPortFrom(to, 0))); fail != nil {
		return 0, errors.New(fail.String())
	}
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()

	start := time.Now()
	_, err := conn.Write(echo) // the stack fills in the identifier, and so finds our answer
	if err == nil {
		_, err = conn.Read(echo)
	}
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	return time.Since(start), err
}

// listener says net.ErrClosed, which servers know, where gonet has an error of its own.
type listener struct{ *gonet.TCPListener }

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.TCPListener.Accept()
	if err != nil {
		return nil, &net.OpError{Op: "accept", Net: "tcp", Err: net.ErrClosed}
	}
	return c, nil
}

func (l *listener) Close() error {
	l.Shutdown() // wakes Accept
	return l.TCPListener.Close()
}

func fullAddress(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nicID, Addr: tcpip.AddrFromSlice(a.Addr().AsSlice()), Port: a.Port()}
}

// protocol is the network protocol of an address.
func protocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

func (n *Network) startStack() error {
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		HandleLocal:        true, // from one lab address to another
	})
	// Without RACK: a full queue drops many segments in a row, and its recovery may then go
	// on for half a minute with one segment in every timeout.
	sack, moderate, recovery := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true), tcpip.TCPRecovery(0)
	for _, option := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &recovery} {
		if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return errors.New(err.String())
		}
	}
	n.nic = &endpoint{network: n}
	if err := n.stack.CreateNIC(nicID, n.nic); err != nil {
		return errors.New(err.String())
	}
	n.stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: nicID}, {Destination: header.IPv6EmptySubnet, NIC: nicID}})
	for _, s := range n.config.Subnets {
		if err := n.claim(s.Gateway()); err != nil {
			return err
		}
	}
	if n.config.CIDR6.IsValid() {
		return n.claim(Gateway6)
	}
	return nil
}

// claim makes an address the lab's own, for as long as the network lives.
func (n *Network) claim(a netip.Addr) error {
	if !a.IsValid() || a.Is4In6() || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() || a == limitedBroadcast {
		return fmt.Errorf("address %s: want a unicast address", a)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return net.ErrClosed
	}
	switch owner := (*n.owners.Load())[a]; owner {
	case n.lab:
		return nil
	case nil:
	default:
		return fmt.Errorf("address %s: %s has it", a, owner.ENI)
	}
	err := n.stack.AddProtocolAddress(nicID, tcpip.ProtocolAddress{
		Protocol:          protocol(a),
		AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix(),
	}, stack.AddressProperties{})
	if err != nil {
		return fmt.Errorf("address %s: %s", a, err)
	}
	n.setOwner(n.lab, append(n.lab.assigned(), a))
	return nil
}

// endpoint is the fabric as the stack sees it: an interface that takes IP packets without a link header.
type endpoint struct {
	network    *Network
	dispatcher stack.NetworkDispatcher // set once, before anything is attached
}

// inject hands a packet to the stack, which copies it.
func (n *Network) inject(packet []byte) {
	n.lab.counts.rx.add(ethernetHeader + len(packet))
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	defer pkt.DecRef()
	if packet[0]>>4 == 6 {
		n.nic.dispatcher.DeliverNetworkPacket(ipv6.ProtocolNumber, pkt)
		return
	}
	n.nic.dispatcher.DeliverNetworkPacket(ipv4.ProtocolNumber, pkt)
}

func (e *endpoint) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	n := e.network
	owners := *n.owners.Load()
	for _, pkt := range pkts.AsSlice() {
		view := pkt.ToView()
		packet := view.AsSlice()
		var q *port
		etherType := uint16(etherIPv4)
		if packet[0]>>4 == 6 {
			q, etherType = owners[netip.AddrFrom16([16]byte(packet[24:40]))], etherIPv6
		} else {
			q = owners[netip.AddrFrom4([4]byte(packet[16:20]))]
		}
		if q == nil || q == n.lab {
			n.lab.drop(DropUnknown, nil)
		} else {
			n.lab.counts.tx.add(ethernetHeader + len(packet))
			q.deliver(etherType, packet)
		}
		view.Release()
	}
	return pkts.Len(), nil
}

func (e *endpoint) Attach(d stack.NetworkDispatcher)             { e.dispatcher = d }
func (e *endpoint) IsAttached() bool                             { return e.dispatcher != nil }
func (e *endpoint) MTU() uint32                                  { return MTU }
func (e *endpoint) SetMTU(uint32)                                {}
func (e *endpoint) MaxHeaderLength() uint16                      { return 0 }
func (e *endpoint) LinkAddress() tcpip.LinkAddress               { return tcpip.LinkAddress(fabricMAC[:]) }
func (e *endpoint) SetLinkAddress(tcpip.LinkAddress)             {}
func (e *endpoint) Capabilities() stack.LinkEndpointCapabilities { return 0 }
func (e *endpoint) Wait()                                        {}
func (e *endpoint) ARPHardwareType() header.ARPHardwareType      { return header.ARPHardwareNone }
func (e *endpoint) AddHeader(*stack.PacketBuffer)                {}
func (e *endpoint) ParseHeader(*stack.PacketBuffer) bool         { return true }
func (e *endpoint) Close()                                       {}
func (e *endpoint) SetOnCloseAction(func())                      {}
