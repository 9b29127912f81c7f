package eni

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
)

// look finds what a packet of the pod meets. It changes nothing.
func (k *kernel) look(p Pod, s state, pol policy, to netip.Addr) (sight, error) {
	links, err := k.links()
	if err != nil {
		return sight{}, err
	}
	sc := survey(s, links)
	sc.policy = pol
	slot := s.Slots[p.Slot]
	out := sight{pod: p, pol: pol, slot: slot, device: sc.devices[slot.MAC], primary: sc.devices[pol.primaryMAC], marked: map[netip.Addr]int{}, snat: map[bool][]string{}}

	inside, err := k.observeInside(p)
	if err != nil {
		out.dead = err.Error()
		return out, nil
	}
	if p.exclusive() {
		delete(sc.devices, p.MAC) // what is inside is wanted below
	}
	// What is wanted if this were the only pod, and its ENI the only one.
	sc.alive, sc.wired = nil, map[cni.Attachment]bool{p.Attachment: true}
	only := newState()
	only.begin = s.begin
	only.Pods[p.Attachment] = p
	if _, ok := s.Slots[p.Slot]; ok {
		only.Slots[p.Slot] = slot
	}
	want := append(desired(only, sc), pol.insideObjects(p)...)
	for i, o := range want {
		if t, ok := o.(table); ok {
			t.dual = s.dual() // others may have what this one has not
			want[i] = t
		}
	}
	have, err := k.observe(want, links, only.dual())
	if err != nil {
		return out, err
	}
	out.steps = slices.DeleteFunc(diff(want, append(have, inside...)), func(st step) bool { return st.drop })
	out.lacking = slices.ContainsFunc(out.steps, func(st step) bool {
		switch st.object.(type) {
		case rule, route, table, element, neighbour:
			return true
		}
		return false
	})
	for _, o := range have {
		switch o := o.(type) {
		case table:
			out.nft = true
		case element:
			if p.has(o.addr) && o.slot >= 0 {
				out.marked[o.addr] = o.slot
			}
		}
	}
	for _, l := range links {
		if name, _, _ := vethOf(p.Attachment); l.Attrs().Name == name {
			out.veth = linkText(l)
		}
	}
	for _, a := range p.addrs() {
		if out.snat[a.Is6()], err = k.snatChains(a.Is6()); err != nil {
			return out, err
		}
	}
	if p.exclusive() {
		return out, k.followWhole(&out, to)
	}
	return out, k.follow(&out, to)
}

func linkText(l netlink.Link) string {
	a := l.Attrs()
	state := "up"
	if a.Flags&net.FlagUp == 0 {
		state = "down"
	}
	return fmt.Sprintf("%s, MAC %s, MTU %d, %s", a.Name, a.HardwareAddr, a.MTU, state)
}

// follow asks the kernel for the routes of the pod's packets, and of an answer.
func (k *kernel) follow(s *sight, to netip.Addr) error {
	targets := []netip.Addr{to}
	if !to.IsValid() {
		targets = []netip.Addr{s.slot.Gateway(), outside}
		if s.pod.Addr6.IsValid() {
			targets = append(targets, outside6)
		}
	}
	targets = slices.DeleteFunc(targets, func(a netip.Addr) bool { return !a.IsValid() }) // a slot without a subnet
	name, _, _ := vethOf(s.pod.Attachment)
	for _, a := range targets {
		own := s.address(a)
		rules, err := k.rules(a.Is6())
		if err != nil {
			return err
		}
		w := way{out: routing{from: own, to: a, iif: name}}
		slot, marked := s.marked[own]
		switch {
		case !s.nft || !marked:
		case a.Is6() || s.pol.sees(a):
			w.out.mark = slotMark(slot)
		default:
			w.out.mark = primaryMark
		}
		w.out = k.lookup(rules, w.out)
		w.back = routing{from: a, to: own}
		switch {
		case w.out.local: // the node itself answers
		case w.out.toPod():
			w.back.iif = w.out.dev
		case w.out.mark == primaryMark:
			w.back.iif = s.primary.name
		default:
			w.back.iif = s.device.name
		}
		if w.back.iif == "" && !w.out.local {
			w.back.refused = "the ENI's link is not there"
		} else {
			w.back = k.lookup(rules, w.back)
		}
		s.ways = append(s.ways, w)
	}
	pod, err := k.enter(s.pod.NetNS)
	if err != nil {
		s.dead = err.Error() // it has just ended
		return nil
	}
	for _, a := range s.pod.addrs() {
		beyond := outside
		if a.Is6() {
			beyond = outside6
		}
		if i := slices.IndexFunc(targets, func(t netip.Addr) bool { return t.Is6() == a.Is6() }); i >= 0 {
			beyond = targets[i]
		}
		s.inside = append(s.inside, ask(pod.nl, routing{to: beyond}))
	}
	return nil
}

// rules returns the routing rules in the order in which the kernel goes through them.
func (k *kernel) rules(six bool) ([]netlink.Rule, error) {
	rules, err := dump(func() ([]netlink.Rule, error) { return k.nl.RuleList(familyOf(six)) })
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	for i := range rules {
		rules[i].Family = familyOf(six)
	}
	slices.SortStableFunc(rules, func(a, b netlink.Rule) int { return cmp.Compare(a.Priority, b.Priority) })
	return rules, nil
}

// lookup asks the kernel where it sends a packet, and finds the rule that led there.
func (k *kernel) lookup(rules []netlink.Rule, l routing) routing {
	l = ask(k.nl, l)
	for _, r := range rules {
		if !selects(r, l) || l.refused == "" && r.Table != l.table || l.refused != "" && !k.answers(r.Table, l.to) {
			continue
		}
		l.table = r.Table
		r.Priority = max(r.Priority, 0)
		_, l.rule, _ = strings.Cut(ruleOf(r).key(), " ")
		return l
	}
	return l
}

// ask has the kernel look a route up.
func ask(nl *netlink.Handle, l routing) routing {
	opts := &netlink.RouteGetOptions{Iif: l.iif, Mark: l.mark}
	if l.from.IsValid() {
		opts.SrcAddr = l.from.AsSlice()
	}
	found, err := nl.RouteGetWithOptions(l.to.AsSlice(), opts)
	if err != nil || len(found) == 0 {
		l.refused = refusal(err)
		return l
	}
	r := found[0]
	l.table, l.local = r.Table, r.Type == unix.RTN_LOCAL
	if r.Gw != nil {
		l.gateway = addrOf(r.Gw)
	}
	if dev, err := nl.LinkByIndex(r.LinkIndex); err == nil {
		l.dev = dev.Attrs().Name
	}
	if !l.local {
		l.resolve(nl, r.LinkIndex)
	}
	return l
}

// refusal says why the kernel does not route a packet.
func refusal(err error) string {
	switch {
	case errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH):
		return "unreachable"
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EXDEV):
		return "not from this device, says rp_filter, or not to or from such an address"
	case err == nil:
		return "no answer"
	}
	return err.Error()
}

// resolve finds what is known of the next hop's MAC.
func (l *routing) resolve(nl *netlink.Handle, index int) {
	hop := l.to
	if l.gateway.IsValid() {
		hop = l.gateway
	}
	all, err := dump(func() ([]netlink.Neigh, error) { return nl.NeighList(index, familyOf(hop.Is6())) })
	if err != nil {
		return
	}
	for _, n := range all {
		if addrOf(n.IP) != hop {
			continue
		}
		l.failed = n.State&(netlink.NUD_FAILED|netlink.NUD_INCOMPLETE) != 0
		switch {
		case l.failed:
			l.neighbour = fmt.Sprintf("%s does not answer", hop)
		case n.State&netlink.NUD_PERMANENT != 0:
			l.neighbour = fmt.Sprintf("%s is at %s, for good", hop, n.HardwareAddr)
		default:
			l.neighbour = fmt.Sprintf("%s is at %s", hop, n.HardwareAddr)
		}
	}
}

// selects reports whether a rule takes the packet, whatever it carries: one that
// asks for a protocol, a port or a user takes some packets only, and is passed over.
func selects(r netlink.Rule, l routing) bool {
	if r.IPProto != 0 || r.Dport != nil || r.Sport != nil || r.UIDRange != nil || r.Tos != 0 || r.OifName != "" {
		return false
	}
	mask := uint32(1<<32 - 1)
	if r.Mask != nil {
		mask = *r.Mask
	}
	in := func(n *net.IPNet, a netip.Addr) bool { return n == nil || n.Contains(a.AsSlice()) }
	match := in(r.Src, l.from) && in(r.Dst, l.to) && (r.IifName == "" || r.IifName == l.iif) && (r.Mark == 0 && r.Mask == nil || l.mark&mask == r.Mark)
	return match != r.Invert
}

// answers reports whether a table has a route for an address, be it that there is none.
func (k *kernel) answers(table int, to netip.Addr) bool {
	routes, err := dump(func() ([]netlink.Route, error) {
		return k.nl.RouteListFiltered(familyOf(to.Is6()), &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
	return err == nil && slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst == nil || r.Dst.Contains(to.AsSlice()) })
}

// snatChains returns the chains of others that see a packet when its source may be
// changed.
func (k *kernel) snatChains(six bool) ([]string, error) {
	family := nftables.TableFamilyIPv4
	if six {
		family = nftables.TableFamilyIPv6
	}
	c, err := k.nft.begin()
	if err != nil {
		return nil, err
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	var out []string
	for _, c := range chains {
		if c.Table.Name == nftTable && c.Table.Family == nftables.TableFamilyINet {
			continue
		}
		sees := c.Table.Family == family || c.Table.Family == nftables.TableFamilyINet
		if sees && c.Type == nftables.ChainTypeNAT && c.Hooknum != nil && *c.Hooknum == *nftables.ChainHookPostrouting {
			out = append(out, fmt.Sprintf("%s in table %s", c.Name, c.Table.Name))
		}
	}
	return out, nil
}

// traceAddress tells what an address is that no pod has, and where packets to it go.
func (k *kernel) traceAddress(a netip.Addr, s state, cloud answered, sealed node.Sealed, now time.Time) (Trace, error) {
	links, err := k.links()
	if err != nil {
		return Trace{}, err
	}
	have, err := k.observe(nil, links, true)
	if err != nil {
		return Trace{}, err
	}
	rules, err := k.rules(a.Is6())
	if err != nil {
		return Trace{}, err
	}
	owner, ip := cloud.owner(a)
	ledger := Hop{Name: "ledger", Text: "no ENI has it, and no pod"}
	for _, slot := range s.slots() {
		switch {
		case a == slot.Primary || a == slot.Primary6:
			ledger.Text = fmt.Sprintf("%s's own, in slot %d; pods are never given it", slot.ENI, slot.Number)
		case slices.Contains(slot.addrs(), a):
			ledger.Text = fmt.Sprintf("an address of %s in slot %d, no pod has it", slot.ENI, slot.Number)
			if until := s.restsUntil(a); until.After(now) {
				ledger.Text += fmt.Sprintf("; it rests until %s", until.UTC().Format(time.RFC3339))
			}
			if cloud.err == nil && owner != slot.ENI {
				ledger.problem("wait for the pool's next look, at most 75 s", "the cloud does not have it on %s", slot.ENI)
			}
		}
	}
	if a == sealed.Facts.PrivateIP {
		ledger.Text = "the node's own address; pods with host networking have it"
	}
	said := Hop{Name: "cloud", Text: "no ENI of this instance has it"}
	switch {
	case cloud.err != nil:
		said.Text = "not asked: " + cloud.err.Error()
	case owner != "":
		said.Text = strings.TrimSpace(fmt.Sprintf("assigned to %s %s", owner, strings.ToLower(ip.State)))
	}
	l := k.lookup(rules, routing{to: a})
	rule := Hop{Name: "rule", Text: cmp.Or(l.rule, "none leads to a route")}
	hop := Hop{Name: "table " + tableName(l.table), Text: l.String()}
	left := Hop{Name: "left over", Text: "nothing"}
	for _, o := range have {
		switch o := o.(type) {
		case element:
			if o.addr == a {
				left.problem(doWait, "the map of pods has it: %s", text(o))
			}
		case foundRoute:
			if o.dst == a {
				left.problem(doWait, "a route leads to it: %s", text(o))
			}
		case foundRule:
			if o.priority < primaryPriority && (o.from == a || o.to == a) {
				left.problem(doWait, "a rule has it: %s", text(o))
			}
		case foundNeighbour:
			if o.addr == a {
				left.problem(doWait, "a neighbour entry has it: %s", text(o))
			}
		case permit:
			if o.addr == a {
				left.problem(doWait, "it may ask the metadata service: %s", text(o))
			}
		}
	}
	if len(left.Problems) > 0 {
		left.Text = "what a pod needs, and there is no pod"
	}
	return Trace{Title: a.String(), Legs: []Leg{
		{Title: "what it is", Hops: []Hop{ledger, said}},
		{Title: "packets from this node to it", Hops: []Hop{rule, hop, left}},
	}}, nil
}
