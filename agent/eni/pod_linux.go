package eni

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// openNetNS opens a network namespace other than our own.
func openNetNS(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	var fs unix.Statfs_t
	var its, ours unix.Stat_t
	err = errors.Join(unix.Fstatfs(int(f.Fd()), &fs), unix.Fstat(int(f.Fd()), &its), unix.Stat("/proc/thread-self/ns/net", &ours))
	switch {
	case err != nil:
	case fs.Type != unix.NSFS_MAGIC:
		err = fmt.Errorf("%s is not a network namespace", path)
	case its.Ino == ours.Ino:
		err = fmt.Errorf("%s is the node's own network namespace", path)
	default:
		return f, nil
	}
	return nil, errors.Join(err, f.Close())
}

// enter returns a handle in the pod's network namespace.
func (k *kernel) enter(path string) (*podKernel, error) {
	if k.pod != nil && k.pod.path == path {
		return k.pod, nil
	}
	if err := k.leave(); err != nil {
		return nil, err
	}
	ns, err := openNetNS(path)
	if err != nil {
		return nil, err
	}
	nl, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err == nil {
		err = nl.SetSocketTimeout(netlinkTimeout)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open netlink in %s: %w", path, err), ns.Close())
	}
	k.pod = &podKernel{path: path, ns: ns, nl: nl}
	return k.pod, nil
}

// leave forgets the pod's network namespace, so that it can end.
func (k *kernel) leave() error {
	k.made = nil
	if k.pod == nil {
		return nil
	}
	k.pod.nl.Close()
	err := k.pod.ns.Close()
	k.pod = nil
	return err
}

// findVeths returns our veths and their links. One that belongs to no pod of the
// ledger is for the plan to remove.
func findVeths(links []netlink.Link) []object {
	var have []object
	for _, l := range links {
		if ours(l) {
			have = append(have, veth{name: l.Attrs().Name, alias: l.Attrs().Alias})
		}
	}
	return have
}

func (o veth) put(k *kernel) error {
	name, hostMAC, podMAC := vethOf(o.pod.Attachment)
	pod, err := k.enter(o.pod.NetNS)
	if err != nil {
		return err
	}
	host, _ := net.ParseMAC(hostMAC)
	peer, _ := net.ParseMAC(podMAC)
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.MTU = name, host, o.pod.MTU
	attrs.NumTxQueues, attrs.NumRxQueues = 1, 1
	// Each end is created where it stays, and with the one queue that is used: moving
	// a link waits for every CPU, and so does taking away the queues that a veth
	// otherwise begins with, one for each of them.
	// Source: veth_init_queues in the kernel's drivers/net/veth.c
	v := &netlink.Veth{
		LinkAttrs: attrs, PeerName: o.pod.peer(), PeerHardwareAddr: peer,
		PeerNamespace: netlink.NsFd(pod.ns.Fd()), PeerMTU: uint32(o.pod.MTU),
	}
	pod.link = nil
	addErr := k.nl.LinkAdd(v)
	if addErr == nil {
		if err := k.nl.LinkSetAlias(v, alias(o.pod)); err != nil { // it asks for the index
			return err
		}
		k.made = v
		return nil
	}
	if !errors.Is(addErr, unix.EEXIST) {
		return addErr
	}
	l, err := k.nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s exists in %s: %w", o.pod.peer(), o.pod.NetNS, errors.Join(addErr, err))
	}
	if !ours(l) {
		return addErr
	}
	return k.nl.LinkSetAlias(l, alias(o.pod))
}

// deleteVeth removes a veth of ours by name.
func (k *kernel) deleteVeth(name string) error {
	l, err := k.nl.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil // it went with the pod's network namespace
	}
	if err != nil || !ours(l) {
		return err
	}
	if err := ignore(k.nl.LinkDel(l), unix.ENODEV); err != nil {
		return fmt.Errorf("delete veth %s: %w", name, err)
	}
	return nil
}

// drop removes a veth that was found, unless it has become a pod's since.
func (o veth) drop(k *kernel) error {
	l, err := k.nl.LinkByName(o.name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return err
	}
	if l.Attrs().Alias != o.alias || !ours(l) {
		return nil
	}
	return ignore(k.nl.LinkDel(l), unix.ENODEV)
}

func (o podLink) put(k *kernel) error {
	pod, l, err := k.podLink(o.pod)
	if err != nil {
		return err
	}
	return putLink(pod.nl, l, o.mac, o.pod.MTU)
}

func (o podAddress) put(k *kernel) error {
	pod, l, err := k.podLink(o.pod)
	if err != nil {
		return err
	}
	return ignore(pod.nl.AddrAdd(l, addrNow(o.addr, netlink.SCOPE_UNIVERSE)), unix.EEXIST)
}

// podLink returns the pod's end, as it was when it was first asked for.
func (k *kernel) podLink(p Pod) (*podKernel, netlink.Link, error) {
	pod, err := k.enter(p.NetNS)
	if err != nil {
		return nil, nil, err
	}
	if pod.link == nil || pod.link.Attrs().Name != p.IfName {
		pod.link, err = pod.nl.LinkByName(p.IfName)
	}
	return pod, pod.link, err
}

func (o podRoute) put(k *kernel) error {
	pod, l, err := k.podLink(o.pod)
	if err != nil {
		return err
	}
	r := netlink.Route{Family: familyOf(o.six), LinkIndex: l.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: prefixOf(o.dst, o.six)}
	if !o.dst.IsValid() {
		r.Scope, r.Gw = netlink.SCOPE_UNIVERSE, gatewayOf(o.six).AsSlice()
	}
	return pod.nl.RouteReplace(&r)
}

func (o podNeighbour) put(k *kernel) error {
	pod, l, err := k.podLink(o.pod)
	if err != nil {
		return err
	}
	return putNeighbour(pod.nl, l, gatewayOf(o.six), o.mac)
}

// observePod returns what is inside of a pod.
func (k *kernel) observePod(p Pod) ([]object, error) {
	pod, l, err := k.podLink(p)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	a := l.Attrs()
	have := []object{podLink{pod: p, mac: a.HardwareAddr.String(), mtu: a.MTU, down: a.Flags&net.FlagUp == 0}}
	for _, addr := range p.addrs() {
		found, err := pod.observe(p, l, addr)
		if err != nil {
			return nil, err
		}
		have = append(have, found...)
	}
	return have, nil
}

// observe returns what is inside of a pod of the family of one of its addresses.
func (pod *podKernel) observe(p Pod, l netlink.Link, addr netip.Addr) (have []object, err error) {
	index, six := l.Attrs().Index, addr.Is6()
	addrs, err := dump(func() ([]netlink.Addr, error) { return pod.nl.AddrList(l, familyOf(six)) })
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", p, err)
	}
	for _, a := range addrs {
		if ones, bits := a.Mask.Size(); ones == bits && addrOf(a.IP) == addr {
			have = append(have, podAddress{pod: p, addr: addr})
		}
	}
	routes, err := dump(func() ([]netlink.Route, error) { return pod.nl.RouteList(nil, familyOf(six)) })
	if err != nil {
		return nil, fmt.Errorf("list routes of %s: %w", p, err)
	}
	for _, r := range routes {
		have = append(have, podRouteOf(p, r, index, six))
	}
	neighbours, err := dump(func() ([]netlink.Neigh, error) { return pod.nl.NeighList(index, familyOf(six)) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours of %s: %w", p, err)
	}
	for _, n := range neighbours {
		if addrOf(n.IP) != gatewayOf(six) {
			continue
		}
		found := n.HardwareAddr.String() + " permanent"
		if n.State&netlink.NUD_PERMANENT == 0 {
			found = n.HardwareAddr.String() + " not permanent"
		}
		have = append(have, podNeighbour{pod: p, six: six, found: found})
	}
	return have, nil
}

func podRouteOf(p Pod, r netlink.Route, index int, six bool) podRoute {
	o := podRoute{pod: p, six: six}
	if r.Dst != nil {
		if bits, _ := r.Dst.Mask.Size(); bits != 0 {
			o.dst = addrOf(r.Dst.IP)
		}
	}
	gateway := r.Gw != nil && addrOf(r.Gw) == gatewayOf(six)
	if r.LinkIndex != index || r.Type != unix.RTN_UNICAST || gateway == o.dst.IsValid() {
		o.found = strings.TrimSuffix(strings.TrimPrefix(r.String(), "{"), "}")
	}
	return o
}
