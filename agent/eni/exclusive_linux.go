package eni

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// eniLink returns the link of an ENI among links, or nil.
func eniLink(links []netlink.Link, mac string) netlink.Link {
	i := slices.IndexFunc(links, func(l netlink.Link) bool {
		a := l.Attrs()
		return l.Type() != "veth" && a.ParentIndex == 0 && macOf(l) == mac
	})
	if i < 0 {
		return nil
	}
	return links[i]
}

// findENI returns the link of an ENI where nl is, or nil.
func findENI(nl *netlink.Handle, mac string) (netlink.Link, error) {
	links, err := dump(nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	return eniLink(links, mac), nil
}

// rename sets a link down, so that its routes and neighbours go, and names it.
func rename(nl *netlink.Handle, l netlink.Link, name string) error {
	if err := nl.LinkSetDown(l); err != nil {
		return fmt.Errorf("set %s down: %w", l.Attrs().Name, err)
	}
	if l.Attrs().Name == name {
		return nil
	}
	if err := nl.LinkSetName(l, name); err != nil {
		return fmt.Errorf("rename %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// put moves the ENI's link into the pod, if it is not there, and names it.
func (o podENI) put(k *kernel) error {
	pod, err := k.enter(o.pod.NetNS)
	if err != nil {
		return err
	}
	pod.link = nil
	l, err := findENI(pod.nl, o.pod.MAC)
	if err != nil {
		return err
	}
	if l == nil {
		if l, err = k.moveIn(pod, o.pod.MAC); err != nil {
			return err
		}
	}
	if l.Attrs().Name != o.pod.IfName {
		if err := rename(pod.nl, l, o.pod.IfName); err != nil {
			return err
		}
	}
	// Settings do not come along with the link.
	err = pod.within(func() error {
		for _, s := range eniSettings(o.pod) {
			if err := s.put(k); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return pod.nl.LinkSetUp(l)
}

// eniSettings are the sysctls of an ENI in a pod. The VPC would drop, and count, what
// IPv6 says in the name of an address it does not know. What comes to a NodePort or
// hostPort comes by the ENI in the node's name, and is answered by the veth.
func eniSettings(p Pod) []sysctl {
	six, loose := "net/ipv6/conf/"+p.IfName, sysctl{"net/ipv4/conf/" + p.IfName + "/rp_filter", "2"}
	if !p.Addr6.IsValid() {
		return []sysctl{{six + "/disable_ipv6", "1"}, loose}
	}
	return []sysctl{{six + "/accept_ra", "0"}, {six + "/addr_gen_mode", addrGenNone}, {six + "/disable_ipv6", "0"}, loose}
}

// moveIn moves the ENI's link from the node into the pod.
func (k *kernel) moveIn(pod *podKernel, mac string) (netlink.Link, error) {
	l, err := findENI(k.nl, mac)
	if err != nil {
		return nil, err
	}
	if l == nil {
		return nil, fmt.Errorf("no link has the MAC %s: %w", mac, unix.ENODEV)
	}
	if err := rename(k.nl, l, parkedName(mac)); err != nil {
		return nil, err
	}
	if err := k.nl.LinkSetNsFd(l, int(pod.ns.Fd())); err != nil {
		return nil, fmt.Errorf("move %s into the pod: %w", parkedName(mac), err)
	}
	if l, err = findENI(pod.nl, mac); err == nil && l == nil {
		err = fmt.Errorf("the link with the MAC %s is not where it was moved to: %w", mac, unix.ENODEV)
	}
	return l, err
}

// takeOut moves the ENI's link from the pod to the node. With the pod's network
// namespace the kernel does it itself.
// Source: default_device_exit_net in the kernel's net/core/dev.c
func (k *kernel) takeOut(p Pod) error {
	ns, err := openNetNS(p.NetNS)
	if err != nil {
		return nil // it is gone, or will be: a DEL needs none
	}
	ns.Close()
	pod, err := k.enter(p.NetNS)
	if err != nil {
		return fmt.Errorf("take %s out of pod %s: %w", p.ENI, p, err)
	}
	pod.link = nil
	l, err := findENI(pod.nl, p.MAC)
	if err != nil || l == nil {
		return err
	}
	if err := rename(pod.nl, l, parkedName(p.MAC)); err != nil {
		return err
	}
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer home.Close()
	if err := pod.nl.LinkSetNsFd(l, int(home.Fd())); err != nil {
		return fmt.Errorf("move %s out of the pod: %w", parkedName(p.MAC), err)
	}
	return nil
}

// within runs f in the pod's network namespace, on a thread that ends with it.
func (p *podKernel) within(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(p.ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// unwireWhole takes the ENI out of the pod, has that recorded, and removes what leads
// packets to and from the pod. Its veth is left to reap.
func (p *Paths) unwireWhole(pod Pod, release func() error) error {
	k, err := p.begin()
	if err != nil {
		return err
	}
	defer p.end(k)
	if err := k.takeOut(pod); err != nil {
		return err
	}
	if err := release(); err != nil { // under the lock: a plan would move it in again
		return err
	}
	return p.unlead(k, pod)
}

// findParked returns how those links of ENIs are that are wanted to be parked.
func (k *kernel) findParked(want []object, links []netlink.Link) ([]object, error) {
	var have []object
	for _, o := range want {
		o, ok := o.(parked)
		if !ok {
			continue
		}
		l := eniLink(links, o.mac)
		if l == nil {
			continue
		}
		addrs, err := dump(func() ([]netlink.Addr, error) { return k.nl.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		o.found = parkedAttr(l.Attrs().Name, l.Attrs().Flags&net.FlagUp == 0, len(addrs))
		have = append(have, o)
	}
	return have, nil
}

func (o parked) put(k *kernel) error {
	l, err := findENI(k.nl, o.mac)
	if err != nil || l == nil {
		return err
	}
	if err := rename(k.nl, l, parkedName(o.mac)); err != nil {
		return err
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return k.nl.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if err := ignore(k.nl.AddrDel(l, &a), unix.EADDRNOTAVAIL); err != nil {
			return fmt.Errorf("delete address %s: %w", a.IPNet, err)
		}
	}
	return nil
}

// settleWhole remembers which ENIs pods can be given whole: those whose link is on
// the node, and those that pods have, for the time after. The caller holds mu.
func (p *Paths) settleWhole(s state, sc scene, converged bool) {
	before := p.wholeSlots()
	ready := maps.Clone(before)
	for _, slot := range s.slots() {
		dev, there := sc.devices[slot.MAC]
		held := slices.ContainsFunc(s.pods(), func(p Pod) bool { return p.Slot == slot.Number })
		switch {
		case !slot.exclusive():
		case !slot.taken() || !there && !held:
			delete(ready, slot.Number)
		case there && converged:
			ready[slot.Number] = dev.mtu
		}
	}
	if !maps.Equal(before, ready) {
		p.whole.Store(&ready)
		p.network.log.Info("ENIs for pods alone ready", "module", p.Name(), "mtu by slot", ready)
		p.network.ledger.poke()
	}
}

// wholeSlots returns the slots whose ENI pods can be given whole, with its MTU.
// Nobody changes what it returns.
func (p *Paths) wholeSlots() map[int]int { return *p.whole.Load() }

func (o wholeRoute) put(k *kernel) error {
	dev := o.pod
	r := netlink.Route{Family: familyOf(o.six), Src: o.from().AsSlice(), Gw: podGateway.AsSlice(), Dst: prefixOf(netip.Addr{}, o.six)}
	if o.dst.IsValid() {
		dev = o.pod.leg()
		r.Dst = &net.IPNet{IP: o.dst.Addr().AsSlice(), Mask: net.CIDRMask(o.dst.Bits(), 32)}
	} else {
		r.Gw, r.Flags = o.gateway().AsSlice(), int(netlink.FLAG_ONLINK)
	}
	pod, l, err := k.podLink(dev)
	if err != nil {
		return err
	}
	r.LinkIndex = l.Attrs().Index
	return pod.nl.RouteReplace(&r)
}

// observeInside returns what is inside of a pod.
func (k *kernel) observeInside(p Pod) ([]object, error) {
	if !p.exclusive() {
		return k.observePod(p)
	}
	pod, err := k.enter(p.NetNS)
	if err != nil {
		return nil, err
	}
	links, err := dump(pod.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links of %s: %w", p, err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var have []object
	if l := eniLink(links, p.MAC); l != nil {
		if have, err = pod.observeENI(p, l); err != nil {
			return nil, err
		}
	}
	// The veth's end, its neighbour and the route to it are as every pod's.
	leg, err := k.observePod(p.leg())
	if err != nil {
		return nil, err
	}
	for _, o := range leg {
		if r, ok := o.(podRoute); !ok || r.dst == podGateway {
			have = append(have, o)
		}
	}
	for _, a := range p.addrs() {
		routes, err := dump(func() ([]netlink.Route, error) { return pod.nl.RouteList(nil, familyOf(a.Is6())) })
		if err != nil {
			return nil, fmt.Errorf("list routes of %s: %w", p, err)
		}
		for _, r := range routes {
			if o := wholeRouteOf(p, r, names, a.Is6()); o.dst != netip.PrefixFrom(podGateway, 32) {
				have = append(have, o)
			}
		}
	}
	guard, err := pod.observeGuard(p)
	return append(have, guard...), err
}

func (k *podKernel) observeENI(p Pod, l netlink.Link) ([]object, error) {
	a := l.Attrs()
	var other []string
	err := k.within(func() error {
		for _, want := range eniSettings(p) {
			text, err := os.ReadFile("/proc/sys/" + want.path)
			if os.IsNotExist(err) {
				continue // this kernel has no IPv6, or the link another name
			}
			if err != nil {
				return err
			}
			if value := strings.TrimSpace(string(text)); value != want.value {
				other = append(other, filepath.Base(want.path)+"="+value)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	have := []object{podENI{pod: p, found: podENIAttr(a.Name, a.Flags&net.FlagUp == 0, other)}}
	addrs, err := dump(func() ([]netlink.Addr, error) { return k.nl.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", p, err)
	}
	for _, a := range addrs {
		addr := addrOf(a.IP)
		if ones, bits := a.Mask.Size(); ones == bits && (p.has(addr) || addr == linkLocal(p.MAC)) {
			have = append(have, podAddress{pod: p, addr: addr})
		}
	}
	return have, nil
}

func wholeRouteOf(p Pod, r netlink.Route, names map[int]string, six bool) wholeRoute {
	o := wholeRoute{pod: p, six: six}
	if r.Dst != nil {
		if bits, _ := r.Dst.Mask.Size(); bits != 0 {
			o.dst = netip.PrefixFrom(addrOf(r.Dst.IP), bits)
		}
	}
	gateway, dev, flags := podGateway, podVeth, 0
	if !o.dst.IsValid() {
		gateway, dev, flags = o.gateway(), p.IfName, int(netlink.FLAG_ONLINK)
	}
	if r.Gw == nil || addrOf(r.Gw) != gateway || names[r.LinkIndex] != dev || r.Src == nil || addrOf(r.Src) != o.from() ||
		r.Type != unix.RTN_UNICAST || r.Flags&flags != flags {
		o.found = strings.TrimSuffix(strings.TrimPrefix(r.String(), "{"), "}")
	}
	return o
}

// exclusiveChain is the chain that the addresses of pods with an ENI of their own
// lead to.
const exclusiveChain = "exclusive"

// addExclusive adds what such pods need of the table. An answer on a connection that
// one has opened by its veth gets the mark that leads back to the veth, whatever
// device it comes in by; the connection itself leaves under the node's address, by
// whatever device. One that came in by the primary ENI, to a hostPort or NodePort,
// goes on to the VPC by it, which takes no other source than the node's there; the pod
// then answers by its veth.
func (o table) addExclusive(pods, outside *nftables.Chain, add func(*nftables.Chain, ...[]expr.Any)) *nftables.Chain {
	exclusive := &nftables.Chain{Name: exclusiveChain, Table: nfTable}
	mark := &expr.Meta{Key: expr.MetaKeyMARK, Register: 1}
	add(exclusive, setMark(exclusiveMark))
	add(exclusive, firstPacket, remember(exclusiveBit))
	add(pods,
		masked(&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, exclusiveBit, expr.CmpOpNeq, 0),
		compare(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, expr.CmpOpEq, []byte{directionReply}),
		setMark(answerMark), []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}})
	add(outside, masked(mark, markMask, expr.CmpOpEq, exclusiveMark), o.asNode())
	add(outside, deviceIs(expr.MetaKeyIIFNAME, o.dev), deviceIs(expr.MetaKeyOIFNAME, o.dev),
		masked(&expr.Ct{Key: expr.CtKeySTATUS, Register: 1}, statusDNAT, expr.CmpOpNeq, 0), o.asNode())
	return exclusive
}

// IP_CT_DIR_REPLY and IPS_DST_NAT.
// Source: include/uapi/linux/netfilter/nf_conntrack_tuple_common.h and
// nf_conntrack_common.h
const (
	directionReply = 1
	statusDNAT     = 1 << 5
)
