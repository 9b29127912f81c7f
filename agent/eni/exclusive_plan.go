package eni

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// What a pod that has an ENI whole needs in the kernel, beside its veth.

// linkLocalRange has the cloud's own services, metadata first. They know the
// instance by its primary address, and network.metadataAccess says on the node who
// may ask for metadata: no pod gets there by an ENI of its own.
var linkLocalRange = netip.MustParsePrefix("169.254.0.0/16")

// servicesOf returns what pods with an ENI of their own reach through the node.
func servicesOf(s node.Sealed) []netip.Prefix {
	all := []netip.Prefix{linkLocalRange}
	add := func(p netip.Prefix) {
		if !p.IsValid() || !p.Addr().Is4() {
			return
		}
		for _, have := range all {
			if have.Bits() <= p.Bits() && have.Contains(p.Addr()) {
				return
			}
		}
		all = append(all, p)
	}
	add(s.Config.Cluster.ServiceCIDR)
	for _, a := range append(s.Config.Cluster.DNS, s.Facts.PrivateIP) {
		if a.IsValid() {
			add(netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return all
}

// exclusive reports whether there is an ENI that pods get whole, or a pod with one.
func (s state) exclusive() bool {
	for _, slot := range s.Slots {
		if slot.exclusive() && slot.taken() {
			return true
		}
	}
	for _, p := range s.Pods {
		if p.exclusive() {
			return true
		}
	}
	return false
}

// exclusiveRules lead what the node itself sends to such pods, and answers to what
// they have asked by their veth, to their veths. What other pods send them leaves for
// the VPC, whose security groups it has to pass.
func exclusiveRules() []object {
	return []object{
		rule{priority: exclusivePriority, iif: "lo", table: exclusiveTable},
		rule{priority: exclusivePriority, mark: answerMark, table: exclusiveTable},
	}
}

// parkedObjects is what the link of an ENI needs that pods get whole while it is on
// the node and no pod has it.
func (sc scene) parkedObjects(s state, slot Slot) []object {
	if _, ok := sc.devices[slot.MAC]; !ok {
		return nil
	}
	for key, p := range s.Pods {
		if p.Slot == slot.Number && p.NetNS != "" && (sc.wired[key] || sc.alive[key]) {
			return nil
		}
	}
	return []object{parked{mac: slot.MAC}}
}

// wholeObjects is what the pod needs in its network namespace.
func (pol policy) wholeObjects(p Pod, mac, hostMAC string) []object {
	leg := p.leg()
	out := []object{podENI{pod: p}, podAddress{pod: p, addr: p.Addr}}
	if p.Addr6.IsValid() {
		out = append(out,
			podAddress{pod: p, addr: linkLocal(p.MAC)},
			podAddress{pod: p, addr: p.Addr6},
			wholeRoute{pod: p, six: true})
	}
	out = append(out,
		podLink{pod: leg, mac: mac},
		podRoute{pod: leg, dst: podGateway},
		podNeighbour{pod: leg, mac: hostMAC},
		wholeRoute{pod: p})
	for _, to := range pol.services {
		out = append(out, wholeRoute{pod: p, dst: to})
	}
	return append(out, podGuard{pod: p})
}

// leg is the pod as its veth has it. One whose eth0 is an ENI has no IPv6 there:
// Services, the node and the cloud's own services are reached by IPv4.
func (p Pod) leg() Pod {
	if p.exclusive() {
		p.Addr6 = netip.Addr{}
	}
	p.IfName = p.peer()
	return p
}

// parkedName is the name of an ENI's link while it is on the node and no pod has it,
// and on its way: in a pod it has the name of the pod's interface, which the node's
// primary ENI may have, too. It begins as networkd is told to leave alone.
func parkedName(mac string) string { return "eth" + strings.ReplaceAll(mac, ":", "") }

// parked is the link of an ENI that no pod has: down, with nothing of its last pod.
type parked struct{ mac, found string }

func (o parked) key() string { return "parked ENI " + o.mac }
func (o parked) attr() string {
	if o.found != "" {
		return o.found
	}
	return parkedAttr(parkedName(o.mac), true, 0)
}

func parkedAttr(name string, down bool, addrs int) string {
	s := name + " up"
	if down {
		s = name + " down"
	}
	return fmt.Sprintf("%s with %d addresses", s, addrs)
}

// podENI is an ENI's link as a pod's interface.
type podENI struct {
	pod   Pod
	found string
}

func (o podENI) key() string { return fmt.Sprintf("pod %s ENI %s", o.pod, o.pod.MAC) }
func (o podENI) attr() string {
	if o.found != "" {
		return o.found
	}
	return podENIAttr(o.pod.IfName, false, nil)
}

func podENIAttr(name string, down bool, other []string) string {
	s := name + " up"
	if down {
		s = name + " down"
	}
	if len(other) > 0 {
		s += " with " + strings.Join(other, " ")
	}
	return s
}

// wholeRoute is a route of a pod that has an ENI: the default one through the ENI's
// gateway, or one through the node.
type wholeRoute struct {
	pod   Pod
	six   bool
	dst   netip.Prefix // invalid: default; always so of IPv6
	found string
}

// gateway is the next hop of the default route, and from is its packets' source.
func (o wholeRoute) gateway() netip.Addr {
	if o.six {
		return eniGateway6
	}
	return o.pod.Gateway
}

func (o wholeRoute) from() netip.Addr {
	if o.six {
		return o.pod.Addr6
	}
	return o.pod.Addr
}

func (o wholeRoute) key() string {
	if o.dst.IsValid() {
		return fmt.Sprintf("pod %s route %s", o.pod, o.dst)
	}
	return fmt.Sprintf("pod %s route%s default", o.pod, family(o.six))
}

func (o wholeRoute) attr() string {
	switch {
	case o.found != "":
		return o.found
	case o.dst.IsValid():
		return fmt.Sprintf("via %s dev %s src %s", podGateway, podVeth, o.pod.Addr)
	}
	return fmt.Sprintf("via %s dev %s onlink src %s", o.gateway(), o.pod.IfName, o.from())
}

// podGuard keeps packets to link-local addresses from leaving by the ENI: a process
// may bind its socket to a device, and the kernel then asks no route.
// Source: SO_BINDTODEVICE in socket(7); ip_route_output_key_hash_rcu in the kernel's
// net/ipv4/route.c
type podGuard struct {
	pod   Pod
	found string
}

func (o podGuard) key() string { return fmt.Sprintf("pod %s nft table inet %s", o.pod, nftTable) }
func (o podGuard) attr() string {
	if o.found != "" {
		return o.found
	}
	return fmt.Sprintf("nothing to %s by %s", linkLocalRange, o.pod.IfName)
}
