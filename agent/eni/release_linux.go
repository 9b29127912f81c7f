package eni

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routed reports whether the kernel leads packets for an address to a pod, in any
// layout, so that an address that the ledger takes for free is not given back under
// one.
func routed(addr netip.Addr) (bool, error) {
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(familyOf(addr.Is6()), &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Dst: ipNet(addr)}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	})
	if err != nil {
		return false, fmt.Errorf("list routes to %s: %w", addr, err)
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Protocol == protocol || r.Table == podTable }), nil
}
