package eni

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// routed reports whether the kernel leads packets for an address to a pod, so that
// an address that the ledger takes for free is not given back under one.
func routed(addr netip.Addr) (bool, error) {
	to := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: podTable, Dst: to}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
	})
	if err != nil {
		return false, fmt.Errorf("list routes to %s: %w", addr, err)
	}
	return len(routes) > 0, nil
}
