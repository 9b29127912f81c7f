package eni

import (
	"crypto/sha1"
	"encoding/hex"
	"fmt"
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
}

func policyOf(s node.Sealed) policy {
	n := s.Config.Network
	inside := n.NonMasqueradeCIDRs
	if len(inside) == 0 { // sealed by a version that did not know of it
		inside = node.PrivateNetworks
	}
	return policy{
		primaryMAC: s.Facts.MAC, primary: s.Facts.PrivateIP, inside: inside,
		metadata: n.MetadataAccess, compat: n.Layout == node.LayoutTKECompat,
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
}

// desired is all that is wanted in the kernel, but for the inside of pods that
// are wired: those are looked at by CHECK.
func desired(s state, sc scene) []object {
	want := []object{sysctl{"net/ipv4/ip_forward", "1"}}
	primary, ok := sc.devices[sc.primaryMAC]
	if ok {
		want = append(want, looseReversePath(primary.name), forwarding(primary.name))
	}
	want = append(want, table{dev: primary.name, primary: sc.primary, inside: sc.inside})
	if sc.compat {
		want = append(want, rule{priority: outsidePriority, mark: primaryMark, table: mainTable})
	} else {
		want = append(want, rule{priority: podPriority, table: podTable})
	}
	configured := false
	missing := false
	for _, slot := range s.slots() {
		if !slot.taken() {
			continue
		}
		dev, ok := sc.devices[slot.MAC]
		want = append(want, sc.slotObjects(slot, dev)...)
		configured = configured || ok
		missing = missing || !ok
	}
	for _, p := range s.pods() {
		switch {
		case sc.wired[p.Attachment]:
			name, _, _ := vethOf(p.Attachment)
			want = append(append(want, sc.hostObjects(p)...), forwarding(name))
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
	out := []object{
		route{table: tbl, metric: lastMetric, unreachable: true},
		rule{priority: primaryPriority + slot.Number, from: slot.Primary, table: tbl},
	}
	if !pol.compat {
		out = append(out, rule{priority: slotPriority + slot.Number, mark: slotMark(slot.Number), table: tbl})
	}
	if dev.name == "" {
		return out
	}
	return append(out,
		looseReversePath(dev.name),
		forwarding(dev.name),
		// The VPC would drop, and count, the neighbour discovery of an address it does not know.
		sysctl{"net/ipv6/conf/" + dev.name + "/disable_ipv6", "1"},
		link{dev: dev.name},
		// Without an address of its own the ENI would ask for its gateway's MAC in
		// the name of the primary ENI's address, which the VPC drops.
		address{dev: dev.name, addr: slot.Primary},
		route{table: tbl, gateway: slot.Gateway(), dev: dev.name},
	)
}

// hostObjects is what a pod needs on the host.
func (pol policy) hostObjects(p Pod) []object {
	name, mac, _ := vethOf(p.Attachment)
	out := []object{
		veth{pod: p},
		// Pods would reach what listens on the node's link-local addresses.
		sysctl{"net/ipv6/conf/" + name + "/disable_ipv6", "1"},
		link{dev: name, mac: mac, mtu: p.MTU},
	}
	if pol.compat {
		out = append(out,
			route{table: mainTable, dst: p.Addr, dev: name},
			rule{priority: podPriority, to: p.Addr, table: mainTable},
			rule{priority: slotPriority, from: p.Addr, table: slotTable + p.Slot})
	} else {
		out = append(out, route{table: podTable, dst: p.Addr, dev: name})
	}
	out = append(out, element{addr: p.Addr, slot: p.Slot})
	if pol.permits(p) {
		out = append(out, permit{addr: p.Addr})
	}
	return out
}

// insideObjects is what a pod needs in its network namespace.
func insideObjects(p Pod) []object {
	_, hostMAC, mac := vethOf(p.Attachment)
	return []object{
		podLink{pod: p, mac: mac},
		podAddress{pod: p},
		podRoute{pod: p, dst: podGateway},
		podNeighbour{pod: p, mac: hostMAC},
		podRoute{pod: p},
	}
}

// podObjects is all that a pod needs. Its routes on the host come last: nothing
// reaches a pod that is not ready for it.
func (pol policy) podObjects(p Pod) []object {
	const links = 3
	host := pol.hostObjects(p)
	return append(append(host[:links:links], insideObjects(p)...), host[links:]...)
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
	s := fmt.Sprintf(aliasPrefix+"%s %d %s %s %s", p.Addr, p.Slot, p.ContainerID, p.IfName, p)
	return s[:min(len(s), 255)]
}
