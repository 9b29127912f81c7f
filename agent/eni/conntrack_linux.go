package eni

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forget removes what connection tracking remembers of addresses, when they have
// rested and before a pod gets one: an entry of a Service would lead packets of an
// old connection to the new pod, and the mark of one would choose its ENI. The
// kernel lists every connection of the node for it, so all addresses are done at
// once, and nobody waits but an ADD that finds no other address.
func (p *Paths) forget(addrs []netip.Addr) error {
	filter := flowsOf{}
	for _, a := range addrs {
		filter[a] = true
	}
	nl, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer nl.Close()
	if err := nl.SetSocketTimeout(netlinkTimeout); err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		if !slices.ContainsFunc(addrs, func(a netip.Addr) bool { return a.Is6() == (family == unix.AF_INET6) }) {
			continue
		}
		if _, err := dump(func() (uint, error) {
			return nl.ConntrackDeleteFilters(netlink.ConntrackTable, family, filter)
		}); err != nil {
			return fmt.Errorf("delete connection tracking entries: %w", err)
		}
	}
	p.network.ledger.cleaned(addrs)
	return nil
}

// flowsOf matches the connections that have one of the addresses at either end,
// before or after NAT.
type flowsOf map[netip.Addr]bool

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f flowsOf) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return f[addrOf(flow.Forward.SrcIP)] || f[addrOf(flow.Forward.DstIP)] || f[addrOf(flow.Reverse.SrcIP)] || f[addrOf(flow.Reverse.DstIP)]
}
