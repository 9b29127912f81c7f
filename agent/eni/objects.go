package eni

import (
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
		s += fmt.Sprintf(" mac %s mtu %d", mac, mtu)
	}
	return s
}

// address is the primary address of an ENI on its link.
type address struct {
	dev  string
	addr netip.Addr
}

func (o address) key() string  { return fmt.Sprintf("address %s dev %s", o.addr, o.dev) }
func (o address) attr() string { return "" }

// route is one of our routes on the host.
type route struct {
	table       int
	dst         netip.Addr // invalid: default
	metric      uint32
	gateway     netip.Addr // invalid: on the link
	dev         string
	unreachable bool
	foreign     string // as found in one of our tables: what it is, or whose
}

func (o route) key() string {
	s := "route default"
	if o.dst.IsValid() {
		s = "route " + o.dst.String()
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

// rule is one of our routing rules. A rule cannot be changed, so all of it is key.
type rule struct {
	priority int
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
	s := fmt.Sprintf("rule %d from %s", o.priority, from)
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
	s := fmt.Sprintf("layout 3, %d slots, outside by %q as %s", maxSlots, o.dev, o.primary)
	if o.exclusive {
		s += ", exclusive"
	}
	return s
}

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

// podAddress is the pod's address.
type podAddress struct{ pod Pod }

func (o podAddress) key() string {
	return fmt.Sprintf("pod %s address %s/32 dev %s", o.pod, o.pod.Addr, o.pod.IfName)
}
func (o podAddress) attr() string { return "" }

// podRoute is the route to podGateway, or the default route through it.
type podRoute struct {
	pod   Pod
	dst   netip.Addr // invalid: default
	found string
}

func (o podRoute) key() string {
	if o.dst.IsValid() {
		return fmt.Sprintf("pod %s route %s", o.pod, o.dst)
	}
	return fmt.Sprintf("pod %s route default", o.pod)
}

func (o podRoute) attr() string {
	switch {
	case o.found != "":
		return o.found
	case o.dst.IsValid():
		return "dev " + o.pod.IfName
	}
	return fmt.Sprintf("via %s dev %s", podGateway, o.pod.IfName)
}

// podNeighbour leads from podGateway to the host's end.
type podNeighbour struct {
	pod   Pod
	mac   string
	found string
}

func (o podNeighbour) key() string { return fmt.Sprintf("pod %s neighbour %s", o.pod, podGateway) }
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
