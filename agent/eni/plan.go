package eni

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
)

// What is ours in the kernel. The numbers are free of those that iproute2,
// systemd, kube-proxy (marks 0x4000 and 0x8000), Cilium (tables 2004 and 2005,
// marks below 0x10000) and TKE's own agent (table 4000 + device index, on nodes
// of its own) use.
const (
	protocol = 154 // of our routes and rules

	podTable  = 4000
	slotTable = 4001 // + slot

	podPriority     = 512  // as TKE
	slotPriority    = 1536 // + slot; as TKE
	primaryPriority = 1568 // + slot
	outsidePriority = 1535 // before a pod's own, in TKE's layout

	mainTable  = 254
	localTable = 255 // of the kernel: the node's own addresses

	// maxSlots bounds the slots: no instance type has more secondary ENIs.
	maxSlots  = 16
	markShift = 24
	markMask  = 0x3f << markShift
	// primaryMark is the mark of packets of pods that leave by the primary ENI,
	// and a bit of the mark of their connections.
	primaryMark = 0x20 << markShift

	lastMetric = 1<<32 - 1

	nftTable = "tkenode"
)

// podGateway is every pod's next hop. It exists nowhere: a permanent neighbour
// entry leads to the host's end of the pod's veth.
var podGateway = netip.AddrFrom4([4]byte{169, 254, 1, 1})

// podGateway6 is the same for IPv6. A gateway that is valid on the link only needs no
// route of its own.
var podGateway6 = netip.MustParseAddr("fe80::1")

// gatewayOf returns a pod's next hop.
func gatewayOf(six bool) netip.Addr {
	if six {
		return podGateway6
	}
	return podGateway
}

// eniGateway6 is the next hop of every ENI: the VPC's, in every subnet.
// Source: https://cloud.tencent.com/document/product/1142/47666
var eniGateway6 = netip.MustParseAddr("fe80::feee:ffff:feff:ffff")

// linkLocal returns the address that is valid on the link only and that the VPC
// knows an ENI by: the kernel asks for the gateway's MAC from it, whoever sends the
// packet.
// Source: RFC 4291, appendix A; ndisc_solicit in the kernel's net/ipv6/ndisc.c
func linkLocal(mac string) netip.Addr {
	hw, err := net.ParseMAC(mac)
	if err != nil || len(hw) != 6 {
		return netip.Addr{}
	}
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: hw[0] ^ 2, 9: hw[1], 10: hw[2], 11: 0xff, 12: 0xfe, 13: hw[3], 14: hw[4], 15: hw[5]})
}

// slotMark is the mark of packets that leave through the slot; 0 is no slot's.
func slotMark(slot int) uint32 { return uint32(slot+1) << markShift }

// object is one thing in the kernel, as it is wanted or as it was found. Its text
// is key and attributes; two objects with one key are one thing in two states.
type object interface {
	key() string
	attr() string
	// put makes it so, whether it is missing or different.
	put(*kernel) error
}

// removable is an object that is ours alone, and so is removed when not wanted.
type removable interface {
	object
	drop(*kernel) error
}

func text(o object) string {
	if o.attr() == "" {
		return o.key()
	}
	return o.key() + ": " + o.attr()
}

// step is one change: to put an object, or to drop it.
type step struct {
	text   string
	object object
	drop   bool
}

// diff lists what turns have into want: first what is missing or different, in
// the order of want, then what is not wanted, in the order of have.
func diff(want, have []object) []step {
	found := make(map[string]object, len(have))
	for _, o := range have {
		found[o.key()] = o
	}
	wanted := make(map[string]bool, len(want))
	var steps []step
	for _, o := range want {
		wanted[o.key()] = true
		switch old, ok := found[o.key()]; {
		case !ok:
			steps = append(steps, step{text: "add " + text(o), object: o})
		case old.attr() != o.attr():
			steps = append(steps, step{text: fmt.Sprintf("set %s (was %s)", text(o), old.attr()), object: o})
		}
	}
	for _, o := range have {
		if _, ours := o.(removable); ours && !wanted[o.key()] {
			steps = append(steps, step{text: "delete " + text(o), object: o, drop: true})
		}
	}
	return steps
}

// device is a link that may be an ENI: any but our own veths.
type device struct {
	name  string
	index int
	mtu   int
}

// policy is what the NodeConfig and the instance's facts say about the packets of
// pods.
type policy struct {
	primaryMAC string
	primary    netip.Addr     // of the primary ENI, under which pods are seen outside of the VPC
	inside     []netip.Prefix // destinations that see a pod's own address
	metadata   []string       // pods that may ask the metadata service, as patterns
	compat     bool           // rules for each pod, as TKE's
	dual       bool           // new pods get an IPv6 address, too
	exclusive  bool           // pods may have ENIs whole
	services   []netip.Prefix // that such pods reach through the node
}

func policyOf(s node.Sealed) policy {
	n := s.Config.Network
	inside := n.NonMasqueradeCIDRs
	if len(inside) == 0 { // sealed by a version that did not know of it
		inside = node.PrivateNetworks
	}
	return policy{
		primaryMAC: s.Facts.MAC, primary: s.Facts.PrivateIP, inside: inside,
		metadata: n.MetadataAccess, compat: n.Layout == node.LayoutTKECompat, dual: n.DualStack(),
		exclusive: n.ExclusiveENIs > 0, services: servicesOf(s),
	}
}

// permits reports whether the pod may ask the metadata service.
func (pol policy) permits(p Pod) bool {
	return slices.ContainsFunc(pol.metadata, func(pattern string) bool {
		ok, err := path.Match(pattern, p.String())
		return ok && err == nil
	})
}

// sees reports whether a destination sees a pod's own address.
func (pol policy) sees(to netip.Addr) bool {
	return slices.ContainsFunc(pol.inside, func(p netip.Prefix) bool { return p.Contains(to) })
}

// scene is what has to be known of the kernel to say what is wanted in it.
type scene struct {
	policy
	devices map[string]device       // by MAC
	alive   map[cni.Attachment]bool // pods whose network namespace is there
	wired   map[cni.Attachment]bool // pods whose veth is there
	files   []file                  // to be written once the network is configured
	six     map[int]bool            // slots whose ENI has an IPv6 address of its own
}

// desired is all that is wanted in the kernel, but for the inside of pods that
// are wired: those are looked at by CHECK.
func desired(s state, sc scene) []object {
	want := []object{sysctl{"net/ipv4/ip_forward", "1"}}
	primary, ok := sc.devices[sc.primaryMAC]
	if ok {
		want = append(want, looseReversePath(primary.name), forwarding(primary.name))
	}
	dual := s.dual()
	if dual {
		want = append(want, forwarding6{dev: primary.name})
	}
	sc.exclusive = sc.exclusive || s.exclusive()
	want = append(want, table{dev: primary.name, primary: sc.primary, inside: sc.inside, dual: dual, exclusive: sc.exclusive})
	if sc.exclusive {
		want = append(want, exclusiveRules()...)
	}
	want = append(want, sc.nodeRule(false))
	if dual {
		want = append(want, sc.nodeRule(true))
	}
	configured := false
	missing := false
	for _, slot := range s.slots() {
		if !slot.taken() {
			continue
		}
		dev, ok := sc.devices[slot.MAC]
		if slot.exclusive() {
			want = append(want, sc.parkedObjects(s, slot)...)
			continue
		}
		want = append(want, sc.slotObjects(slot, dev)...)
		if dual && !slot.Primary6.IsValid() { // a pod may have an address all the same
			want = append(want, sc.slotRules(slot, true)...)
		}
		configured = configured || ok
		missing = missing || !ok
	}
	for _, p := range s.pods() {
		switch {
		case sc.wired[p.Attachment]:
			name, _, _ := vethOf(p.Attachment)
			want = append(append(want, sc.hostObjects(p)...), forwarding(name))
			if _, out := sc.devices[p.MAC]; out && p.exclusive() && p.NetNS != "" {
				want = append(want, sc.insideObjects(p)...)
			}
		case sc.alive[p.Attachment]:
			want = append(want, sc.podObjects(p)...)
		}
	}
	if configured && !missing {
		for _, f := range sc.files {
			want = append(want, f)
		}
	}
	return want
}

// nodeRule leads to all pods or, in TKE's layout, packets of pods to the primary ENI.
func (pol policy) nodeRule(six bool) rule {
	if pol.compat {
		return rule{priority: outsidePriority, six: six, mark: primaryMark, table: mainTable}
	}
	return rule{priority: podPriority, six: six, table: podTable}
}

// looseReversePath lets a device take packets whose answer would leave by another
// one. The kernel uses the larger of this value and "all", so 2 wins whatever
// "all" is.
// Source: https://docs.kernel.org/networking/ip-sysctl.html (rp_filter)
func looseReversePath(dev string) object {
	return sysctl{"net/ipv4/conf/" + dev + "/rp_filter", "2"}
}

// forwarding lets the node take packets from a device to another one. A new device
// has it of ip_forward, and can lose it alone.
func forwarding(dev string) object {
	return sysctl{"net/ipv4/conf/" + dev + "/forwarding", "1"}
}

// slotObjects is what the ENI of a slot needs; dev is zero while its link is not
// there. Then, as ever, packets of its pods go nowhere instead of out of the
// primary ENI.
func (pol policy) slotObjects(slot Slot, dev device) []object {
	tbl := slotTable + slot.Number
	six := slot.Primary6.IsValid()
	out := pol.slotRules(slot, false)
	if six {
		out = append(out, pol.slotRules(slot, true)...)
	}
	if dev.name == "" {
		return out
	}
	out = append(out, looseReversePath(dev.name), forwarding(dev.name))
	if six {
		// The VPC's word is the cloud API's: routers say nothing, and neither does the
		// kernel about addresses of its own making.
		out = append(out,
			sysctl{"net/ipv6/conf/" + dev.name + "/accept_ra", "0"},
			sysctl{"net/ipv6/conf/" + dev.name + "/addr_gen_mode", addrGenNone},
			sysctl{"net/ipv6/conf/" + dev.name + "/disable_ipv6", "0"})
	} else {
		// The VPC would drop, and count, the neighbour discovery of an address it does not know.
		out = append(out, sysctl{"net/ipv6/conf/" + dev.name + "/disable_ipv6", "1"})
	}
	out = append(out,
		link{dev: dev.name, mac: slot.MAC},
		// Without an address of its own the ENI would ask for its gateway's MAC in
		// the name of the primary ENI's address, which the VPC drops.
		address{dev: dev.name, addr: slot.Primary},
		route{table: tbl, gateway: slot.Gateway(), dev: dev.name})
	if six {
		out = append(out,
			address{dev: dev.name, addr: linkLocal(slot.MAC)},
			address{dev: dev.name, addr: slot.Primary6},
			route{table: tbl, six: true, gateway: eniGateway6, dev: dev.name})
	}
	return out
}

// addrGenNone has the kernel make no addresses of its own.
// Source: enum in6_addr_gen_mode in the kernel's include/uapi/linux/if_link.h
const addrGenNone = "1"

// slotRules lead packets of the slot's pods, and of the ENI's own address, to the
// slot's table, from which they leave by nothing but the ENI.
func (pol policy) slotRules(slot Slot, six bool) []object {
	tbl, own := slotTable+slot.Number, slot.Primary
	if six {
		own = slot.Primary6
	}
	out := []object{route{table: tbl, six: six, metric: lastMetric, unreachable: true}}
	if own.IsValid() {
		out = append(out, rule{priority: primaryPriority + slot.Number, six: six, from: own, table: tbl})
	}
	if !pol.compat {
		out = append(out, rule{priority: slotPriority + slot.Number, six: six, mark: slotMark(slot.Number), table: tbl})
	}
	return out
}

// hostObjects is what a pod needs on the host.
func (pol policy) hostObjects(p Pod) []object {
	name, mac, podMAC := vethOf(p.Attachment)
	leg := p.leg()
	out := []object{veth{pod: p}}
	// Pods would reach what listens on the node's link-local addresses.
	if leg.Addr6.IsValid() {
		out = append(out,
			sysctl{"net/ipv6/conf/" + name + "/addr_gen_mode", addrGenNone},
			sysctl{"net/ipv6/conf/" + name + "/disable_ipv6", "0"})
	} else {
		out = append(out, sysctl{"net/ipv6/conf/" + name + "/disable_ipv6", "1"})
	}
	out = append(out, link{dev: name, mac: mac, mtu: p.MTU})
	if p.exclusive() {
		// On a device without an address rp_filter takes nothing whose answer would
		// leave by another one, also where it is loose, and the node's own rule that leads
		// to the pod is not for answers.
		// Source: __fib_validate_source in the kernel's net/ipv4/fib_frontend.c
		out = append(out, address{dev: name, addr: podGateway, host: true})
	}
	if leg.Addr6.IsValid() {
		out = append(out, neighbour{dev: name, addr: p.Addr6, mac: podMAC})
	}
	for _, a := range leg.addrs() {
		switch {
		case p.exclusive():
			out = append(out, route{table: exclusiveTable, dst: a, dev: name})
		case pol.compat:
			out = append(out,
				route{table: mainTable, six: a.Is6(), dst: a, dev: name},
				rule{priority: podPriority, six: a.Is6(), to: a, table: mainTable},
				rule{priority: slotPriority, six: a.Is6(), from: a, table: slotTable + p.Slot})
		default:
			out = append(out, route{table: podTable, six: a.Is6(), dst: a, dev: name})
		}
		out = append(out, element{addr: a, slot: p.Slot})
	}
	if pol.permits(p) {
		out = append(out, permit{addr: p.Addr})
	}
	return out
}

// insideObjects is what a pod needs in its network namespace.
func (pol policy) insideObjects(p Pod) []object {
	_, hostMAC, mac := vethOf(p.Attachment)
	if p.exclusive() {
		return pol.wholeObjects(p, mac, hostMAC)
	}
	out := []object{
		podLink{pod: p, mac: mac},
		podAddress{pod: p, addr: p.Addr},
		podRoute{pod: p, dst: podGateway},
		podNeighbour{pod: p, mac: hostMAC},
		podRoute{pod: p},
	}
	if p.Addr6.IsValid() {
		out = append(out,
			podAddress{pod: p, addr: p.Addr6},
			podNeighbour{pod: p, six: true, mac: hostMAC},
			podRoute{pod: p, six: true})
	}
	return out
}

// podObjects is all that a pod needs. Its routes on the host come last: nothing
// reaches a pod that is not ready for it.
func (pol policy) podObjects(p Pod) []object {
	host := pol.hostObjects(p)
	links := 1 + slices.IndexFunc(host, func(o object) bool {
		_, ok := o.(link)
		return ok
	})
	return append(append(host[:links:links], pol.insideObjects(p)...), host[links:]...)
}

// vethOf returns the name and the MAC of the host's end of a pod's veth, and the
// MAC of the pod's end. They follow from the container alone, so that udev has
// nothing to choose, a repeated ADD finds its own link, and a link can be proved
// to be ours: its name spells its MAC.
func vethOf(key cni.Attachment) (name, hostMAC, podMAC string) {
	sum := sha1.Sum([]byte(key.ContainerID + "/" + key.IfName))
	digits := hex.EncodeToString(sum[:])
	tail := fmt.Sprintf("%02x:%02x:%02x:%02x:%02x", sum[0], sum[1], sum[2], sum[3], sum[4])
	return hostPrefix + digits[:11], "0a:" + tail, "0e:" + tail
}

const hostPrefix = node.PodLinkPrefix

// spells reports whether a link's name and MAC prove it to be a host's end.
func spells(name, mac string) bool {
	digits, ok := strings.CutPrefix(name, hostPrefix)
	rest, local := strings.CutPrefix(mac, "0a:")
	return ok && local && len(digits) == 11 && strings.ReplaceAll(rest, ":", "") == digits[:10]
}

// aliasPrefix begins the alias of the host's ends.
const aliasPrefix = "tkenode "

// alias is what stands at a pod's link in the kernel: enough to know the pod if
// the ledger is lost. The kernel takes 255 bytes, so a long name is cut.
func alias(p Pod) string {
	s := fmt.Sprintf(aliasPrefix+"%s %d %s %s %s", p.texts(), p.Slot, p.ContainerID, p.IfName, p)
	return s[:min(len(s), 255)]
}
