package eni

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kernel is this network namespace, and the one of the pod that was last asked
// for. It is for one user at a time.
type kernel struct {
	nl  *netlink.Handle
	nft *nft
	pod *podKernel
	// made is the host's end of the pod's veth as it was made, until leave: nobody has
	// to ask for it once more.
	made netlink.Link
}

// podKernel is the network namespace of a pod.
type podKernel struct {
	path string
	ns   *os.File
	nl   *netlink.Handle
	link netlink.Link // the pod's end, once it was asked for
}

// netlinkTimeout bounds one answer of the kernel.
const netlinkTimeout = 10 * time.Second

func openKernel() (*kernel, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if err := nl.SetSocketTimeout(netlinkTimeout); err != nil {
		nl.Close()
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	f, err := openNFT()
	if err != nil {
		nl.Close()
		return nil, err
	}
	return &kernel{nl: nl, nft: f}, nil
}

func (k *kernel) close() error {
	k.nl.Close()
	return errors.Join(k.nft.close(), k.leave())
}

// dump repeats a dump that the kernel says was interrupted by a change.
func dump[T any](f func() (T, error)) (T, error) {
	for range 4 {
		v, err := f()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return f()
}

func (k *kernel) links() ([]netlink.Link, error) {
	all, err := dump(k.nl.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	return all, nil
}

// link returns a link by its name.
func (k *kernel) link(name string) (netlink.Link, error) {
	if k.made != nil && k.made.Attrs().Name == name {
		return k.made, nil
	}
	return k.nl.LinkByName(name)
}

// ours reports whether a link is the host's end of one of our veths.
func ours(l netlink.Link) bool {
	a := l.Attrs()
	return l.Type() == "veth" && strings.HasPrefix(a.Name, hostPrefix) &&
		(strings.HasPrefix(a.Alias, aliasPrefix) || spells(a.Name, a.HardwareAddr.String()))
}

// macOf returns the MAC that a link was made with, by which the cloud knows an ENI:
// somebody may have given it another one since.
func macOf(l netlink.Link) string {
	a := l.Attrs()
	if len(a.PermHWAddr) == 6 {
		return a.PermHWAddr.String()
	}
	return a.HardwareAddr.String()
}

// survey finds what desired has to know.
func survey(s state, links []netlink.Link) scene {
	sc := scene{devices: map[string]device{}, alive: map[cni.Attachment]bool{}, wired: map[cni.Attachment]bool{}}
	names := map[string]bool{}
	for _, l := range links {
		a := l.Attrs()
		switch {
		case ours(l):
			names[a.Name] = true
		case l.Type() != "veth" && a.ParentIndex == 0 && len(a.HardwareAddr) == 6:
			sc.devices[macOf(l)] = device{a.Name, a.Index, a.MTU}
		}
	}
	for key, p := range s.Pods {
		name, _, _ := vethOf(key)
		if sc.wired[key] = names[name]; sc.wired[key] {
			continue
		}
		if ns, err := openNetNS(p.NetNS); err == nil {
			ns.Close()
			sc.alive[key] = true
		}
	}
	return sc
}

// observe returns everything of ours that is in the kernel, of IPv6 if six, and the
// state of whatever else is in want.
func (k *kernel) observe(want []object, links []netlink.Link, six bool) ([]object, error) {
	var have []object
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	for _, find := range []func() ([]object, error){
		func() ([]object, error) { return findSettings(want, links) },
		func() ([]object, error) { return k.findAddresses(want, links, names, six) },
		func() ([]object, error) { return k.findRules(six) },
		func() ([]object, error) { return k.nft.find(want, six) },
		func() ([]object, error) { return k.findRoutes(names, six) },
		func() ([]object, error) { return k.findNeighbours(links, six) },
		func() ([]object, error) { return findVeths(links), nil },
		func() ([]object, error) { return k.findParked(want, links) },
	} {
		found, err := find()
		if err != nil {
			return nil, err
		}
		have = append(have, found...)
	}
	return have, nil
}

// findSettings returns the state of the sysctls, links and files in want.
func findSettings(want []object, links []netlink.Link) ([]object, error) {
	var have []object
	for _, o := range want {
		switch o := o.(type) {
		case sysctl:
			value, err := os.ReadFile("/proc/sys/" + o.path)
			switch {
			case os.IsNotExist(err):
				if strings.HasPrefix(o.path, "net/ipv6/") && withoutIPv6() {
					have = append(have, o)
				}
			case err != nil:
				return nil, fmt.Errorf("read sysctl: %w", err)
			default:
				have = append(have, sysctl{o.path, strings.TrimSpace(string(value))})
			}
		case forwarding6:
			value, err := os.ReadFile(forwarding6Path)
			if os.IsNotExist(err) {
				return nil, node.Terminal("IPv6Disabled", "take ipv6.disable=1 from the kernel's command line, or leave IPv6 out of network.ipFamilies",
					errors.New("the kernel has no IPv6"))
			}
			if err != nil {
				return nil, fmt.Errorf("read sysctl: %w", err)
			}
			o.value = strings.TrimSpace(string(value))
			have = append(have, o)
		case link:
			for _, l := range links {
				if a := l.Attrs(); a.Name == o.dev {
					found := link{dev: a.Name, down: a.Flags&net.FlagUp == 0}
					if o.mac != "" {
						found.mac = a.HardwareAddr.String()
					}
					if o.mtu != 0 {
						found.mtu = a.MTU
					}
					have = append(have, found)
				}
			}
		case file:
			found, err := findFile(o.path)
			if err != nil {
				return nil, err
			}
			have = append(have, found...)
		}
	}
	return have, nil
}

// withoutIPv6 reports whether the kernel was started or built without it.
func withoutIPv6() bool {
	_, err := os.Stat("/proc/sys/net/ipv6/conf")
	return os.IsNotExist(err)
}

func (k *kernel) findRules(six bool) ([]object, error) {
	var have []object
	for _, family := range families(six) {
		all, err := dump(func() ([]netlink.Rule, error) { return k.nl.RuleList(family) })
		if err != nil {
			return nil, fmt.Errorf("list rules: %w", err)
		}
		for _, r := range all {
			if r.Protocol != protocol {
				continue
			}
			r.Family = family
			have = append(have, ruleOf(r))
		}
	}
	return have, nil
}

func ruleOf(r netlink.Rule) foundRule {
	o := rule{priority: r.Priority, six: r.Family == netlink.FAMILY_V6, from: hostOf(r.Src), to: hostOf(r.Dst), iif: r.IifName, mark: r.Mark, table: r.Table, foreign: otherSelectors(r)}
	return foundRule{o, r}
}

// hostOf returns the address of a /32 or /128, and nothing of other prefixes.
func hostOf(n *net.IPNet) netip.Addr {
	if n == nil {
		return netip.Addr{}
	}
	if ones, bits := n.Mask.Size(); ones != bits {
		return netip.Addr{}
	}
	return addrOf(n.IP)
}

// otherSelectors returns the text of what our rules do not select by.
func otherSelectors(r netlink.Rule) string {
	s := ""
	if r.Invert {
		s += " not"
	}
	if r.Src != nil && !hostOf(r.Src).IsValid() {
		s += " from " + r.Src.String()
	}
	if r.Dst != nil && !hostOf(r.Dst).IsValid() {
		s += " to " + r.Dst.String()
	}
	if r.OifName != "" {
		s += " oif " + r.OifName
	}
	// What is left must be as in a new rule, but for what is in the key.
	rest, plain := r, *netlink.NewRule()
	for _, p := range []*netlink.Rule{&rest, &plain} {
		p.Family, p.Priority, p.Table, p.Protocol, p.Type, p.Src, p.Mark, p.Mask = 0, 0, 0, 0, 0, nil, 0, nil
		p.Invert, p.Dst, p.IifName, p.OifName = false, nil, "", ""
	}
	if !reflect.DeepEqual(rest, plain) || r.Mark != 0 && (r.Mask == nil || *r.Mask != markMask) {
		s += " and more"
	}
	return s
}

// foundRule is a rule as the kernel has it.
type foundRule struct {
	rule
	raw netlink.Rule
}

func (o foundRule) drop(k *kernel) error { return ignore(k.nl.RuleDel(&o.raw), unix.ENOENT) }

func (o rule) netlink() *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = familyOf(o.six), o.priority, o.table, protocol
	if o.from.IsValid() {
		r.Src = ipNet(o.from)
	}
	if o.to.IsValid() {
		r.Dst = ipNet(o.to)
	}
	r.IifName = o.iif
	if o.mark != 0 {
		mask := uint32(markMask)
		r.Mark, r.Mask = o.mark, &mask
	}
	return r
}

func (o rule) put(k *kernel) error { return ignore(k.nl.RuleAdd(o.netlink()), unix.EEXIST) }

// drop removes the rule of a pod, on the way of a DEL.
func (o rule) drop(k *kernel) error { return ignore(k.nl.RuleDel(o.netlink()), unix.ENOENT) }

func (k *kernel) findRoutes(names map[int]string, six bool) ([]object, error) {
	var have []object
	for _, family := range families(six) {
		all, err := dump(func() ([]netlink.Route, error) {
			return k.nl.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range all {
			if r.Protocol == protocol || r.Table >= podTable && r.Table <= exclusiveTable {
				have = append(have, routeOf(r, names))
			}
		}
	}
	return have, nil
}

// foundRoute is a route as the kernel has it.
type foundRoute struct {
	route
	raw netlink.Route
}

func (o foundRoute) drop(k *kernel) error { return ignore(k.nl.RouteDel(&o.raw), unix.ESRCH) }

func routeOf(r netlink.Route, names map[int]string) foundRoute {
	o := route{table: r.Table, six: r.Family == netlink.FAMILY_V6, metric: uint32(r.Priority), dev: names[r.LinkIndex], unreachable: r.Type == unix.RTN_UNREACHABLE}
	if o.six && o.metric == defaultMetric6 {
		o.metric = 0
	}
	var bits, size int
	if r.Dst != nil {
		if bits, size = r.Dst.Mask.Size(); bits != 0 {
			o.dst = addrOf(r.Dst.IP)
		}
	}
	if r.Gw != nil {
		o.gateway = addrOf(r.Gw)
	}
	canonical := r.Protocol == protocol && r.Src == nil && len(r.MultiPath) == 0 && (bits == 0 || bits == size) &&
		(o.unreachable || r.Type == unix.RTN_UNICAST) && (r.Gw == nil || r.Flags&int(netlink.FLAG_ONLINK) != 0)
	if !canonical {
		o.foreign = strings.TrimSuffix(strings.TrimPrefix(r.String(), "{"), "}")
	}
	return foundRoute{o, r}
}

// defaultMetric6 is the metric that the kernel gives an IPv6 route without one.
// Source: IP6_RT_PRIO_USER in the kernel's include/uapi/linux/ipv6_route.h
const defaultMetric6 = 1024

func (o route) put(k *kernel) error {
	r := netlink.Route{Family: familyOf(o.six), Table: o.table, Protocol: protocol, Priority: int(o.metric), Dst: prefixOf(o.dst, o.six)}
	if o.unreachable {
		r.Type = unix.RTN_UNREACHABLE
		return k.nl.RouteReplace(&r)
	}
	l, err := k.link(o.dev)
	if err != nil {
		return err
	}
	r.LinkIndex, r.Scope = l.Attrs().Index, netlink.SCOPE_LINK
	if o.gateway.IsValid() {
		r.Scope = netlink.SCOPE_UNIVERSE
		r.Gw, r.Flags = o.gateway.AsSlice(), int(netlink.FLAG_ONLINK)
	}
	return k.nl.RouteReplace(&r)
}

// drop removes the route by its destination, on the way of a DEL.
func (o route) drop(k *kernel) error {
	r := netlink.Route{Family: familyOf(o.six), Table: o.table, Protocol: protocol, Priority: int(o.metric), Dst: prefixOf(o.dst, o.six), Scope: netlink.SCOPE_NOWHERE}
	return ignore(k.nl.RouteDel(&r), unix.ESRCH)
}

func (o sysctl) put(*kernel) error {
	err := os.WriteFile("/proc/sys/"+o.path, []byte(o.value), 0)
	if os.IsNotExist(err) {
		return nil // its device has gone, or this kernel has no IPv6
	}
	return err
}

func (o link) put(k *kernel) error {
	l, err := k.link(o.dev)
	if err != nil {
		return err
	}
	return putLink(k.nl, l, o.mac, o.mtu)
}

func putLink(nl *netlink.Handle, l netlink.Link, mac string, mtu int) error {
	if mac != "" && l.Attrs().HardwareAddr.String() != mac {
		hw, err := net.ParseMAC(mac)
		if err != nil {
			return err
		}
		if err := nl.LinkSetHardwareAddr(l, hw); err != nil {
			return fmt.Errorf("set MAC: %w", err)
		}
	}
	if mtu != 0 && l.Attrs().MTU != mtu {
		if err := nl.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("set MTU: %w", err)
		}
	}
	if l.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	return nl.LinkSetUp(l)
}

func (o address) put(k *kernel) error {
	l, err := k.link(o.dev)
	if err != nil {
		return err
	}
	scope := netlink.SCOPE_LINK
	if o.host {
		scope = netlink.SCOPE_HOST
	}
	return ignore(k.nl.AddrAdd(l, addrNow(o.addr, scope)), unix.EEXIST)
}

// ipNet returns the address as a /32 or /128.
func ipNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// prefixOf returns the destination of a route, the default route's for no address.
func prefixOf(a netip.Addr, six bool) *net.IPNet {
	switch {
	case a.IsValid():
		return ipNet(a)
	case six:
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// gone reports whether a step failed for lack of something that was there when it
// was planned: a link, one that is up, our nftables table, a pod's network namespace.
func gone(err error) bool {
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENETDOWN) || errors.Is(err, unix.ENOENT) ||
		errors.As(err, new(netlink.LinkNotFoundError))
}

// ignore turns the one error that means "already so" into success.
func ignore(err error, already unix.Errno) error {
	if errors.Is(err, already) {
		return nil
	}
	return err
}
