package eni

import (
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routed reports whether the kernel leads packets for an address to a pod, in any
// layout, so that an address that the ledger takes for free is not given back under
// one.
func routed(addr netip.Addr) (bool, error) {
	to := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Dst: to}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	})
	if err != nil {
		return false, fmt.Errorf("list routes to %s: %w", addr, err)
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Protocol == protocol || r.Table == podTable }), nil
}
