// Package vpc is one Tencent Cloud VPC as a user-space layer 3 fabric, without root.
//
// Every network interface of a machine is a port: a unix stream socket that one QEMU connects to, or a tap. The
// fabric forwards by destination address, never by MAC: as in the real VPC there is one next hop, whose MAC answers
// every ARP request and neighbour solicitation, and a packet enters only when its source is assigned to the ENI it comes from. What does not
// fit is dropped and counted by reason, without an ICMP error. A packet keeps its TTL: the fabric is no hop.
//
// Services of the lab (metadata, DNS, NTP, cloud API, API server) live on a TCP/IP stack of the fabric's own, at VPC
// or link-local addresses: Listen, ListenPacket, DialContext and Ping send real packets through the fabric. DHCP for
// primary ENIs, DNS and NTP are part of the network itself.
//
// It is not a switch (no MAC learning, no broadcast domain, no VLANs), not a security group, and not a way out: no
// packet leaves the lab. It carries IPv6 for the subnets that have a range of it, beside IPv4; DHCP and the addresses
// of DNS and NTP are IPv4.
package vpc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// MTU of every interface in the VPC.
const MTU = 1500

// fabricMAC is the next hop of every port. Tencent's begins with fe:ee on every CVM.
var fabricMAC = [6]byte{0xfe, 0xee, 0x0a, 0x00, 0x00, 0x01}

// Config is what a VPC is made with.
type Config struct {
	CIDR    netip.Prefix
	CIDR6   netip.Prefix // none: the VPC has no IPv6
	Subnets []Subnet
	Domain  string                // DHCP's domain name; none if empty
	Hosts   map[string]netip.Addr // what DNS answers, as SetHosts says
	Log     *slog.Logger          // default slog.Default()
}

// Subnet is a part of the VPC. Its first IPv4 address is the gateway; that of IPv6 is Gateway6.
type Subnet struct {
	ID    string
	CIDR  netip.Prefix
	CIDR6 netip.Prefix // a /64; none: the subnet has no IPv6
}

// Gateway of the subnet: its first address, which answers ping.
func (s Subnet) Gateway() netip.Addr { return s.CIDR.Masked().Addr().Next() }

// Port is an ENI as the cloud knows it.
type Port struct {
	ENI      string
	MAC      net.HardwareAddr
	Subnet   string       // ID
	Addrs    []netip.Addr // the primary IPv4 address first; IPv6 ones among the others
	Primary  bool         // DHCP is answered
	Hostname string       // what DHCP calls the machine
}

// Network is a running VPC.
type Network struct {
	config Config
	log    *slog.Logger
	lab    *port // owns the addresses of the lab's own services
	stack  *stack.Stack
	nic    *endpoint // the stack's end of the fabric

	owners atomic.Pointer[map[netip.Addr]*port] // who has an address; replaced, never changed in place
	hosts  atomic.Pointer[map[string]netip.Addr]
	clock  atomic.Pointer[clock]

	mu     sync.Mutex // serialises changes of ports and owners
	ports  map[string]*port
	closed bool

	stop     context.CancelFunc
	services sync.WaitGroup
}

// New starts a VPC with its gateways, DNS and NTP.
func New(config Config) (*Network, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	n := &Network{config: config, log: config.Log, ports: map[string]*port{}}
	if n.log == nil {
		n.log = slog.Default()
	}
	n.owners.Store(&map[netip.Addr]*port{})
	n.clock.Store(&clock{answers: true})
	n.lab = &port{network: n, Port: Port{ENI: Lab}}
	n.lab.addrs.Store(new([]netip.Addr))
	n.SetHosts(config.Hosts)
	ctx, stop := context.WithCancel(context.Background())
	n.stop = stop
	err := n.startStack()
	if err == nil {
		err = errors.Join(n.startDNS(ctx), n.startNTP(ctx))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start VPC %s: %w", config.CIDR, err), n.Close())
	}
	return n, nil
}

func (c *Config) validate() error {
	if !c.CIDR.IsValid() || !c.CIDR.Addr().Is4() {
		return fmt.Errorf("VPC CIDR %s: want an IPv4 prefix", c.CIDR)
	}
	if c.CIDR6.IsValid() && (c.CIDR6.Addr().Is4() || c.CIDR6.Addr().Is4In6() || c.CIDR6.Bits() > 64) {
		return fmt.Errorf("VPC CIDR %s: want an IPv6 prefix of at most 64 bits", c.CIDR6)
	}
	for i, s := range c.Subnets {
		if s.ID == "" || !s.CIDR.IsValid() || !c.CIDR.Contains(s.CIDR.Addr()) || s.CIDR.Bits() < c.CIDR.Bits() || s.CIDR.Bits() > 29 {
			return fmt.Errorf("subnet %q %s: want an ID and a prefix of at most 29 bits inside %s", s.ID, s.CIDR, c.CIDR)
		}
		if s.CIDR6.IsValid() && (!c.CIDR6.Contains(s.CIDR6.Addr()) || s.CIDR6.Bits() != 64) {
			return fmt.Errorf("subnet %s %s: want an IPv6 prefix of 64 bits inside %s", s.ID, s.CIDR6, c.CIDR6)
		}
		for _, t := range c.Subnets[:i] {
			if s.ID == t.ID || s.CIDR.Overlaps(t.CIDR) {
				return fmt.Errorf("subnet %s %s: overlaps %s %s", s.ID, s.CIDR, t.ID, t.CIDR)
			}
			if s.CIDR6.Overlaps(t.CIDR6) {
				return fmt.Errorf("subnet %s %s: overlaps %s %s", s.ID, s.CIDR6, t.ID, t.CIDR6)
			}
		}
	}
	return nil
}

// Close detaches every port and ends every listener and connection of the lab.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	ports := slices.Collect(maps.Values(n.ports))
	clear(n.ports)
	n.owners.Store(&map[netip.Addr]*port{})
	n.mu.Unlock()

	var errs []error
	for _, p := range ports {
		errs = append(errs, p.shutdown())
	}
	n.stop()
	n.services.Wait()
	n.stack.Destroy()
	return errors.Join(errs...)
}

// Attach makes a port that one QEMU at a time reaches by connecting to the unix socket (-netdev stream,server=off).
// The newest connection wins, so that a machine that was killed and started again gets its network back.
func (n *Network) Attach(p Port, socket string) error {
	q, err := n.newPort(p)
	if err != nil {
		return fmt.Errorf("attach %s: %w", p.ENI, err)
	}
	l, err := listenUnix(socket)
	if err != nil {
		return fmt.Errorf("attach %s: %w", p.ENI, err)
	}
	if err := n.add(q, &streamServer{listener: l}); err != nil {
		return fmt.Errorf("attach %s: %w", p.ENI, errors.Join(err, l.Close()))
	}
	return nil
}

// AttachTap makes a port of a tap (IFF_TAP|IFF_NO_PI, see NewTap) and takes the file over.
func (n *Network) AttachTap(p Port, tap *os.File) error {
	q, err := n.newPort(p)
	if err == nil {
		err = n.add(q, &tapLink{file: tap})
	}
	if err != nil {
		return fmt.Errorf("attach %s to tap: %w", p.ENI, errors.Join(err, tap.Close()))
	}
	return nil
}

// Detach pulls the ENI out: its addresses are free when it returns.
func (n *Network) Detach(eni string) error {
	n.mu.Lock()
	p, ok := n.ports[eni]
	if ok {
		delete(n.ports, eni)
		n.setOwner(p, nil)
	}
	n.mu.Unlock()
	if !ok {
		return fmt.Errorf("detach %s: not attached", eni)
	}
	return p.shutdown()
}

// SetAddrs replaces the addresses assigned to the ENI, the primary one first, with effect on the next packet.
func (n *Network) SetAddrs(eni string, addrs []netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.ports[eni]
	if !ok {
		return fmt.Errorf("assign addresses to %s: not attached", eni)
	}
	if err := n.checkAddrs(p, addrs); err != nil {
		return fmt.Errorf("assign addresses to %s: %w", eni, err)
	}
	n.setOwner(p, addrs)
	return nil
}

// SetLink makes a port drop everything, in both directions, or lets it pass again.
func (n *Network) SetLink(eni string, up bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.ports[eni]
	if !ok {
		return fmt.Errorf("set link of %s: not attached", eni)
	}
	p.down.Store(!up)
	return nil
}

// Connected says whether a machine is on the other end of the ENI's port.
func (n *Network) Connected(eni string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.ports[eni]
	return ok && p.connected.Load()
}

// newPort checks what does not depend on the other ports.
func (n *Network) newPort(p Port) (*port, error) {
	if p.ENI == "" || p.ENI == Lab {
		return nil, fmt.Errorf("%q is no ENI id", p.ENI)
	}
	if len(p.MAC) != 6 || p.MAC[0]&1 != 0 || [6]byte(p.MAC) == fabricMAC || [6]byte(p.MAC) == [6]byte{} {
		return nil, fmt.Errorf("MAC %s: want a unicast address of 6 bytes", p.MAC)
	}
	i := slices.IndexFunc(n.config.Subnets, func(s Subnet) bool { return s.ID == p.Subnet })
	if i < 0 {
		return nil, fmt.Errorf("subnet %q: not in the VPC", p.Subnet)
	}
	q := &port{network: n, Port: p, mac: [6]byte(p.MAC), subnet: n.config.Subnets[i], gone: make(chan struct{})}
	q.out.init(queueBytes)
	return q, nil
}

// add makes the port known, gives it its addresses and starts its link.
func (n *Network) add(p *port, l link) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return net.ErrClosed
	}
	if _, ok := n.ports[p.ENI]; ok {
		return errors.New("already attached")
	}
	for _, q := range n.ports {
		if q.mac == p.mac {
			return fmt.Errorf("MAC %s: %s has it", p.MAC, q.ENI)
		}
	}
	if err := n.checkAddrs(p, p.Addrs); err != nil {
		return err
	}
	n.ports[p.ENI] = p
	n.setOwner(p, p.Addrs)
	p.link = l
	p.done.Go(func() { l.serve(p) })
	return nil
}

func (n *Network) checkAddrs(p *port, addrs []netip.Addr) error {
	if len(addrs) == 0 {
		return errors.New("no primary address")
	}
	if !addrs[0].Is4() {
		return fmt.Errorf("address %s: the primary one is IPv4", addrs[0])
	}
	owners := *n.owners.Load()
	for i, a := range addrs {
		switch owner := owners[a]; {
		case a.Is6() && p.subnet.CIDR6.IsValid() && !p.subnet.CIDR6.Contains(a):
			return fmt.Errorf("address %s: not in subnet %s %s", a, p.subnet.ID, p.subnet.CIDR6)
		case a.Is6() && a == p.subnet.CIDR6.Masked().Addr():
			return fmt.Errorf("address %s: reserved in subnet %s", a, p.subnet.CIDR6)
		case !p.subnet.CIDR6.Contains(a) && !p.subnet.CIDR.Contains(a):
			return fmt.Errorf("address %s: not in subnet %s %s", a, p.subnet.ID, p.subnet.CIDR)
		case a.Is4() && (a == p.subnet.CIDR.Masked().Addr() || a == broadcast(p.subnet.CIDR)):
			return fmt.Errorf("address %s: reserved in subnet %s", a, p.subnet.CIDR)
		case owner != nil && owner != p:
			return fmt.Errorf("address %s: %s has it", a, owner.ENI)
		case slices.Contains(addrs[:i], a):
			return fmt.Errorf("address %s: twice", a)
		}
	}
	return nil
}

// setOwner makes addrs, and no others, the port's; none takes the port out of the network. The caller holds mu.
func (n *Network) setOwner(p *port, addrs []netip.Addr) {
	owners := maps.Clone(*n.owners.Load())
	maps.DeleteFunc(owners, func(_ netip.Addr, q *port) bool { return q == p })
	for _, a := range addrs {
		owners[a] = p
	}
	n.owners.Store(&owners)
	if len(addrs) > 0 { // a port that goes keeps its last ones: its machine may be asking DHCP right now
		addrs = slices.Clone(addrs)
		p.addrs.Store(&addrs)
	}
}

func broadcast(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(a)
}
