package eni

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ofIPv6 reports whether something that was found is ours, and of IPv6.
func ofIPv6(o object) bool {
	switch o := o.(type) {
	case element:
		return o.addr.Is6()
	case foundRoute:
		return o.six
	case foundRule:
		return o.six
	case foundAddress, foundNeighbour:
		return true
	}
	return false
}

// families are those that are looked at: a node whose pods have IPv4 only pays for no
// more.
func families(six bool) []int {
	if six {
		return []int{netlink.FAMILY_V4, netlink.FAMILY_V6}
	}
	return []int{netlink.FAMILY_V4}
}

func familyOf(six bool) int {
	if six {
		return netlink.FAMILY_V6
	}
	return netlink.FAMILY_V4
}

// findAddresses returns the addresses that may be an ENI's own and, of IPv6, those
// on our own links that cannot be left there: one that was an ENI's own before would
// keep a pod from it, and by others pods would reach the node.
func (k *kernel) findAddresses(want []object, links []netlink.Link, names map[int]string, six bool) ([]object, error) {
	all, err := dump(func() ([]netlink.Addr, error) { return k.nl.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	var have []object
	for _, a := range all {
		if ones, _ := a.Mask.Size(); ones == 32 {
			have = append(have, address{dev: names[a.LinkIndex], addr: addrOf(a.IP)})
		}
	}
	if !six {
		return have, nil
	}
	own := map[string]bool{}
	for _, o := range want {
		if o, ok := o.(address); ok {
			own[o.dev] = true
		}
	}
	for _, l := range links {
		if ours(l) {
			own[l.Attrs().Name] = true
		}
	}
	if all, err = dump(func() ([]netlink.Addr, error) { return k.nl.AddrList(nil, netlink.FAMILY_V6) }); err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, a := range all {
		ones, _ := a.Mask.Size()
		if dev, addr := names[a.LinkIndex], addrOf(a.IP); own[dev] && (ones == 128 || addr.IsLinkLocalUnicast()) {
			have = append(have, foundAddress{address{dev: dev, addr: addr}, a})
		}
	}
	return have, nil
}

// foundAddress is an IPv6 address on a link of ours.
type foundAddress struct {
	address
	raw netlink.Addr
}

func (o foundAddress) drop(k *kernel) error {
	l, err := k.nl.LinkByName(o.dev)
	if err != nil {
		return err
	}
	return ignore(k.nl.AddrDel(l, &netlink.Addr{IPNet: o.raw.IPNet}), unix.EADDRNOTAVAIL)
}

const forwarding6Path = "/proc/sys/net/ipv6/conf/all/forwarding"

// put leaves the primary ENI what it had. Where the kernel takes routes from its
// routers, it goes on doing so; else it would forget even those that it has.
// Source: https://docs.kernel.org/networking/ip-sysctl.html (accept_ra)
func (o forwarding6) put(*kernel) error {
	if o.dev != "" {
		accepts := sysctl{"net/ipv6/conf/" + o.dev + "/accept_ra", "2"}
		value, err := os.ReadFile("/proc/sys/" + accepts.path)
		if err == nil && strings.TrimSpace(string(value)) == "1" {
			err = accepts.put(nil)
		}
		if err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return os.WriteFile(forwarding6Path, []byte(o.attr()), 0)
}

// addrNow is an address that is used at once: the VPC has no other owner of one of
// IPv6 that would have to be looked for.
func addrNow(a netip.Addr, scope netlink.Scope) *netlink.Addr {
	if a.Is6() {
		return &netlink.Addr{IPNet: ipNet(a), Flags: unix.IFA_F_NODAD}
	}
	return &netlink.Addr{IPNet: ipNet(a), Scope: int(scope)}
}

// findNeighbours returns the entries of IPv6 for good on the host's ends.
func (k *kernel) findNeighbours(links []netlink.Link, six bool) ([]object, error) {
	if !six {
		return nil, nil
	}
	names := map[int]string{}
	for _, l := range links {
		if ours(l) {
			names[l.Attrs().Index] = l.Attrs().Name
		}
	}
	all, err := dump(func() ([]netlink.Neigh, error) { return k.nl.NeighList(0, netlink.FAMILY_V6) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	var have []object
	for _, n := range all {
		if dev := names[n.LinkIndex]; dev != "" && n.State&netlink.NUD_PERMANENT != 0 {
			have = append(have, foundNeighbour{neighbour{dev: dev, addr: addrOf(n.IP), mac: n.HardwareAddr.String()}, n})
		}
	}
	return have, nil
}

// foundNeighbour is an entry as the kernel has it.
type foundNeighbour struct {
	neighbour
	raw netlink.Neigh
}

func (o foundNeighbour) drop(k *kernel) error { return ignore(k.nl.NeighDel(&o.raw), unix.ENOENT) }

func (o neighbour) put(k *kernel) error {
	l, err := k.link(o.dev)
	if err != nil {
		return err
	}
	return putNeighbour(k.nl, l, o.addr, o.mac)
}

func putNeighbour(nl *netlink.Handle, l netlink.Link, addr netip.Addr, mac string) error {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	return nl.NeighSet(&netlink.Neigh{
		LinkIndex: l.Attrs().Index, Family: familyOf(addr.Is6()), State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: hw,
	})
}
