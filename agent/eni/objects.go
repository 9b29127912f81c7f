package eni

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// The kinds of objects and their text. What put and drop do is in kernel_linux.go
// and nft_linux.go.

// sysctl is a file below /proc/sys.
type sysctl struct{ path, value string }

func (o sysctl) key() string  { return "sysctl " + o.path }
func (o sysctl) attr() string { return o.value }

// forwarding6 lets the node forward IPv6. The kernel then takes no router
// advertisements by which the primary ENI may have its own route, unless told to.
type forwarding6 struct {
	dev   string // of the primary ENI; empty: it is not there
	value string // as found
}

func (o forwarding6) key() string  { return "sysctl net/ipv6/conf/all/forwarding" }
func (o forwarding6) attr() string { return cmp.Or(o.value, "1") }

// link is a link that is up, with a MAC and an MTU if we choose them.
type link struct {
	dev, mac string
	mtu      int
	down     bool // as found
}

func (o link) key() string  { return "link " + o.dev }
func (o link) attr() string { return linkAttr(o.down, o.mac, o.mtu) }

func linkAttr(down bool, mac string, mtu int) string {
	s := "up"
	if down {
		s = "down"
	}
	if mac != "" {
		s += " mac " + mac
	}
	if mtu != 0 {
		s += fmt.Sprintf(" mtu %d", mtu)
	}
	return s
}

// address is an address of an ENI's own on its link: the primary one and, for IPv6,
// one that is valid on the link only. One of the host's scope is never a source.
type address struct {
	dev  string
	addr netip.Addr
	host bool
}

func (o address) key() string  { return fmt.Sprintf("address %s dev %s", o.addr, o.dev) }
func (o address) attr() string { return "" }

// route is one of our routes on the host.
type route struct {
	table       int
	six         bool
	dst         netip.Addr // invalid: default
	metric      uint32
	gateway     netip.Addr // invalid: on the link
	dev         string
	unreachable bool
	foreign     string // as found in one of our tables: what it is, or whose
}

func (o route) key() string {
	s := "route" + family(o.six) + " default"
	if o.dst.IsValid() {
		s = "route" + family(o.six) + " " + o.dst.String()
	}
	if o.metric != 0 {
		s += fmt.Sprintf(" metric %d", o.metric)
	}
	return s + " table " + tableName(o.table)
}

func (o route) attr() string {
	switch {
	case o.foreign != "":
		return o.foreign
	case o.unreachable:
		return "unreachable"
	case o.gateway.IsValid():
		return fmt.Sprintf("via %s dev %s onlink", o.gateway, o.dev)
	}
	return "dev " + o.dev
}

// family tells the kinds of objects of IPv6 from those of IPv4 in their text.
func family(six bool) string {
	if six {
		return "6"
	}
	return ""
}

// rule is one of our routing rules. A rule cannot be changed, so all of it is key.
type rule struct {
	priority int
	six      bool
	from, to netip.Addr // invalid: all
	iif      string     // empty: any
	mark     uint32     // 0: any; under markMask
	table    int
	foreign  string // as found: what ours do not have
}

func (o rule) key() string {
	from := "all"
	if o.from.IsValid() {
		from = o.from.String()
	}
	s := fmt.Sprintf("rule%s %d from %s", family(o.six), o.priority, from)
	if o.to.IsValid() {
		s += " to " + o.to.String()
	}
	if o.iif != "" {
		s += " iif " + o.iif
	}
	if o.mark != 0 {
		s += fmt.Sprintf(" fwmark %#x/%#x", o.mark, markMask)
	}
	return s + " lookup " + tableName(o.table) + o.foreign
}

// tableName names a routing table as iproute2 does.
func tableName(number int) string {
	switch number {
	case mainTable:
		return "main"
	case localTable:
		return "local"
	}
	return strconv.Itoa(number)
}

func (o rule) attr() string { return "" }

// table is our nftables table with all in it but the pods.
type table struct {
	dev       string         // of the primary ENI; empty: it is not there
	primary   netip.Addr     // of the primary ENI
	inside    []netip.Prefix // destinations that see a pod's own address
	dual      bool           // pods have IPv6 addresses, too
	exclusive bool           // pods may have ENIs whole
	found     string         // when it is not as it was wanted
}

func (o table) key() string { return "nft table inet " + nftTable }
func (o table) attr() string {
	if o.found != "" {
		return o.found
	}
	return fmt.Sprintf("%s, inside %v", o.layout(), o.inside)
}

// layout names the chains and rules of the table. Every rule carries it, so that
// rules that another version made, or for another device, are replaced.
func (o table) layout() string {
	s := fmt.Sprintf("layout 4, %d slots, outside by %q as %s", maxSlots, o.dev, o.primary)
	if o.dual {
		s += ", dual-stack 1"
	}
	if o.exclusive {
		s += ", exclusive"
	}
	return s
}

// neighbour leads from a pod's IPv6 address to the pod's end of its veth. The host's
// end has no address of its own that it could ask from.
type neighbour struct {
	dev  string
	addr netip.Addr
	mac  string
}

func (o neighbour) key() string  { return fmt.Sprintf("neighbour %s dev %s", o.addr, o.dev) }
func (o neighbour) attr() string { return o.mac + " permanent" }

// element is a pod's address in the map from addresses to slots.
type element struct {
	addr netip.Addr
	slot int
}

func (o element) key() string { return fmt.Sprintf("nft pod %s", o.addr) }
func (o element) attr() string {
	switch {
	case o.slot < 0:
		return "no slot"
	case o.slot >= exclusiveSlot:
		return exclusiveChain
	}
	return fmt.Sprintf("slot %d", o.slot)
}

// permit lets a pod's address ask the metadata service.
type permit struct{ addr netip.Addr }

func (o permit) key() string  { return fmt.Sprintf("nft metadata %s", o.addr) }
func (o permit) attr() string { return "" }

// veth is a pod's veth, seen from the host.
type veth struct {
	pod   Pod
	name  string // as found, when it is no pod's of the ledger
	alias string
}

func (o veth) key() string {
	if o.name != "" {
		return "veth " + o.name
	}
	name, _, _ := vethOf(o.pod.Attachment)
	return "veth " + name
}

func (o veth) attr() string {
	s := o.alias
	if o.name == "" {
		s = alias(o.pod)
	}
	f := strings.Fields(strings.TrimPrefix(s, aliasPrefix))
	if len(f) != 5 {
		return "no pod"
	}
	return fmt.Sprintf("%s address %s slot %s container %.12s %s", f[4], f[0], f[1], f[2], f[3])
}

// podLink is the pod's end of its veth.
type podLink struct {
	pod  Pod
	mac  string
	mtu  int // as found
	down bool
}

func (o podLink) key() string { return fmt.Sprintf("pod %s link %s", o.pod, o.pod.IfName) }
func (o podLink) attr() string {
	mtu := o.mtu
	if mtu == 0 {
		mtu = o.pod.MTU
	}
	return linkAttr(o.down, o.mac, mtu)
}

// podAddress is one of the pod's addresses.
type podAddress struct {
	pod  Pod
	addr netip.Addr
}

func (o podAddress) key() string {
	return fmt.Sprintf("pod %s address %s/%d dev %s", o.pod, o.addr, o.addr.BitLen(), o.pod.IfName)
}
func (o podAddress) attr() string { return "" }

// podRoute is the route to podGateway, or the default route through it.
type podRoute struct {
	pod   Pod
	six   bool
	dst   netip.Addr // invalid: default
	found string
}

func (o podRoute) key() string {
	if o.dst.IsValid() {
		return fmt.Sprintf("pod %s route%s %s", o.pod, family(o.six), o.dst)
	}
	return fmt.Sprintf("pod %s route%s default", o.pod, family(o.six))
}

func (o podRoute) attr() string {
	switch {
	case o.found != "":
		return o.found
	case o.dst.IsValid():
		return "dev " + o.pod.IfName
	}
	return fmt.Sprintf("via %s dev %s", gatewayOf(o.six), o.pod.IfName)
}

// podNeighbour leads from a pod's gateway to the host's end.
type podNeighbour struct {
	pod   Pod
	six   bool
	mac   string
	found string
}

func (o podNeighbour) key() string {
	return fmt.Sprintf("pod %s neighbour %s", o.pod, gatewayOf(o.six))
}
func (o podNeighbour) attr() string {
	if o.found != "" {
		return o.found
	}
	return o.mac + " permanent"
}

// file is a file that tells others that the network is configured.
type file struct{ path, data string }

func (o file) key() string { return "file " + o.path }
func (o file) attr() string {
	sum := sha256.Sum256([]byte(o.data))
	return "sha256 " + hex.EncodeToString(sum[:6])
}

func (o file) put(*kernel) error { return writeFile(o.path, []byte(o.data), 0o644) }

// findFile returns the file as it is.
func findFile(path string) ([]object, error) {
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return []object{file{path, string(data)}}, nil
}
