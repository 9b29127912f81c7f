package eni

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// What was found of a pod, told hop by hop.

// trace tells the way of the pod's packets.
func (s sight) trace(cloud answered, sealed node.Sealed) Trace {
	p := s.pod
	t := Trace{Title: fmt.Sprintf("%s  %s  container %.12s  %s of slot %d", p, listed(p.addrs()), p.ContainerID, p.ENI, p.Slot)}
	if s.dead != "" {
		h := Hop{Name: "interface", Text: s.dead}
		h.problem("the runtime's DEL, or the agent in its place, takes the rest away; if it stays: crictl pods",
			"the pod's network namespace is not there")
		t.Legs = []Leg{{Title: "out of the pod", Hops: []Hop{h}}}
		return t
	}
	if p.exclusive() {
		t.Legs = append(s.traceWhole(cloud, sealed), s.beside()...)
		return t
	}
	t.Legs = append(t.Legs, s.leaving())
	// Without a mark, and with our table in place, a packet goes no further.
	for _, w := range s.ways {
		if _, marked := s.marked[w.out.from]; marked || !s.nft {
			t.Legs = append(t.Legs, s.sent(w.out))
		}
	}
	t.Legs = append(t.Legs, s.eni(cloud, sealed))
	for _, w := range s.ways {
		t.Legs = append(t.Legs, s.returning(w.back))
	}
	t.Legs = append(t.Legs, s.beside()...)
	return t
}

// beside is what differs and is on no way that was told.
func (s *sight) beside() []Leg {
	if len(s.steps) == 0 {
		return nil
	}
	rest := Hop{Name: "node", Text: "more that packets depend on"}
	for _, st := range s.steps {
		rest.Problems = append(rest.Problems, Problem{Text: differs(st), Do: doWait})
	}
	return []Leg{{Title: "beside the way", Hops: []Hop{rest}}}
}

// leaving is the way from the pod to the node's routing.
func (s *sight) leaving() Leg {
	p := s.pod
	name, hostMAC, podMAC := vethOf(p.Attachment)
	inside := Hop{Name: "interface", Text: fmt.Sprintf("%s %s, MAC %s, MTU %d", p.IfName, listed(p.addrs()), podMAC, p.MTU)}
	inside.Problems = s.claims(doRestart, podLink{pod: p}, podAddress{pod: p, addr: p.Addr}, podAddress{pod: p, addr: p.Addr6})
	hops := []Hop{inside}
	for i, a := range p.addrs() {
		next := Hop{Name: "next hop", Text: "the pod has ended"}
		if i < len(s.inside) {
			next.Text = s.inside[i].String()
			if known := s.inside[i].neighbour; known != "" {
				next.Text += ", " + known
			}
		}
		six := a.Is6()
		next.Problems = s.claims(doRestart, podRoute{pod: p, six: six, dst: gatewayOf(six)}, podRoute{pod: p, six: six}, podNeighbour{pod: p, six: six})
		hops = append(hops, next)
	}
	veth, link := veth{pod: p}, link{dev: name, mac: hostMAC, mtu: p.MTU}
	host := Hop{Name: "veth", Text: s.veth, Problems: s.claims(doWait, veth, link)}
	if s.veth == "" {
		host.Text = "none"
	}
	hops = append(hops, host)
	for _, a := range p.addrs() {
		mark := Hop{Name: "nft pods" + family(a.Is6()), Problems: s.claims(doWait, table{}, element{addr: a})}
		slot, marked := s.marked[a]
		switch {
		case !s.nft:
			mark.Text = "no table inet " + nftTable + ": the packet gets no mark"
		case !marked:
			mark.Text = fmt.Sprintf("%s leads to no slot: the packet is dropped here", a)
		default:
			mark.Text = fmt.Sprintf("%s → slot %d, mark %#x/%#x", a, slot, slotMark(slot), markMask)
		}
		hops = append(hops, mark)
	}
	return Leg{Title: "out of the pod", Hops: hops}
}

// sent is the way of one packet through the node's routing.
func (s *sight) sent(l routing) Leg {
	tbl, six := slotTable+s.pod.Slot, l.to.Is6()
	own := s.slot.Primary
	if six {
		own = s.slot.Primary6
	}
	leg := Leg{Title: fmt.Sprintf("to %s%s", l.to, s.known(l.to))}
	if l.mark == primaryMark {
		leg.Hops = append(leg.Hops, Hop{Name: "nft pods", Text: fmt.Sprintf(
			"not in network.nonMasqueradeCIDRs, so by the primary ENI: mark %#x/%#x", l.mark, markMask)})
	}
	r := Hop{Name: "rule", Text: l.rule, Problems: s.claim(doWait, func(o object) bool {
		r, ok := o.(rule)
		return ok && r.six == six && (r.from != own || !r.from.IsValid())
	})}
	if l.rule == "" {
		r.Text = "none leads to a route"
	}
	hop := Hop{Name: "table " + tableName(l.table), Text: l.String(), Problems: s.claim(doWait, func(o object) bool {
		r, ok := o.(route)
		return ok && r.six == six && r.table == tbl
	})}
	table, dev := tbl, s.device.name
	if l.mark == primaryMark {
		table, dev = mainTable, s.primary.name
	}
	stays := l.local || l.toPod()
	switch {
	case stays:
	case l.refused != "" && s.device.name == "" && s.slot.taken() && table == tbl:
		hop.problem("attach the ENI again, or drain the node", "no link has the MAC %s of %s: its pods' packets are kept from leaving by another", s.slot.MAC, s.slot.ENI)
	case l.refused != "":
		hop.problem(s.doOf(), "the packet goes nowhere")
	case l.table != table:
		r.problem(s.doOf(), "it leads to table %s, not to table %s", tableName(l.table), tableName(table))
	case l.dev != dev:
		hop.problem(s.doOf(), "it leaves by %s, not by %s", l.dev, dev)
	}
	leg.Hops = append(leg.Hops, r, hop)
	if l.to == metadataAddr && !stays {
		leg.Hops = append(leg.Hops, s.guarded())
	}
	if l.gateway.IsValid() && l.neighbour != "" {
		h := Hop{Name: "gateway", Text: l.neighbour}
		if l.failed {
			h.problem("see whether the cloud shows the ENI as attached; tkenode eni", "%s does not answer %s on %s", l.gateway, asking(l.gateway), l.dev)
		}
		leg.Hops = append(leg.Hops, h)
	}
	if l.refused == "" && !stays {
		leg.Hops = append(leg.Hops, s.translated(l))
	}
	return leg
}

// doOf says what to do when a packet goes another way than it should: if something
// of ours is missing that will do, and else somebody has added to it.
func (s *sight) doOf() string {
	if s.lacking {
		return doWait
	}
	return doForeign
}

// guarded is the guard of the metadata service.
func (s *sight) guarded() Hop {
	h := Hop{Name: "nft guard", Text: "the pod may ask: network.metadataAccess names it", Problems: s.claims(doWait, permit{addr: s.pod.Addr})}
	if !s.pol.permits(s.pod) {
		h.Text = "refused: network.metadataAccess does not name the pod"
	}
	return h
}

// translated is the source that a packet has when it leaves the node.
func (s *sight) translated(l routing) Hop {
	h, own := Hop{Name: "SNAT"}, s.address(l.to)
	switch {
	case s.nft && l.mark == primaryMark && l.dev == s.primary.name:
		h.Text = fmt.Sprintf("it leaves as %s, the node's own", s.pol.primary)
		return h
	case len(s.snat[own.Is6()]) > 0:
		h.Text = fmt.Sprintf("it leaves as %s, unless these chains say otherwise: %s", own, strings.Join(s.snat[own.Is6()], ", "))
	default:
		h.Text = fmt.Sprintf("none, it leaves as %s", own)
	}
	if s.device.name != l.dev {
		h.problem("put the route right, see above", "the VPC drops %s on %s: it is an address of %s", own, l.dev, s.pod.ENI)
	}
	return h
}

// known says what an address is.
func (s *sight) known(a netip.Addr) string {
	switch {
	case a == s.slot.Gateway():
		return ", the subnet's gateway"
	case a == outside || a == outside6:
		return ", an address outside of the VPC"
	case a == metadataAddr:
		return ", the metadata service"
	}
	return ""
}

// eni is the ENI as the kernel, the ledger and the cloud have it.
func (s *sight) eni(cloud answered, sealed node.Sealed) Leg {
	slot := s.slot
	leg := Leg{Title: fmt.Sprintf("%s in slot %d", s.pod.ENI, s.pod.Slot)}
	if slot.ENI != s.pod.ENI {
		h := Hop{Name: "ledger", Text: fmt.Sprintf("slot %d has %q", s.pod.Slot, slot.ENI)}
		h.problem(doRestart, "the pod's address is of %s, which is not in the slot any more", s.pod.ENI)
		leg.Hops = append(leg.Hops, h)
	}
	dev := Hop{Name: "device", Text: "no link has the MAC " + slot.MAC}
	if s.device.name != "" {
		dev.Text = fmt.Sprintf("%s, MAC %s, MTU %d", s.device.name, slot.MAC, s.device.mtu)
		dev.Problems = s.claims(doWait, s.pol.slotObjects(slot, s.device)...)
	}
	leg.Hops = append(leg.Hops, dev, s.assigned(cloud, sealed))
	return leg
}

// assigned is what the cloud says of the pod's ENI and address.
func (s *sight) assigned(cloud answered, sealed node.Sealed) Hop {
	h := Hop{Name: "cloud"}
	if cloud.err != nil {
		h.Text = "not asked: " + cloud.err.Error()
		return h
	}
	p := s.pod
	i := slices.IndexFunc(cloud.enis, func(e tencent.ENI) bool { return e.ID == p.ENI })
	if i < 0 {
		h.Text = fmt.Sprintf("%s is not attached to this instance", p.ENI)
		h.problem("attach the ENI again, or drain the node", "the VPC does not carry the pod's packets")
		return h
	}
	e := cloud.enis[i]
	h.Text = fmt.Sprintf("%s, MAC %s, %s %s, security groups %s", strings.ToLower(e.State), e.MAC, e.SubnetID, s.slot.Subnet, strings.Join(e.SecurityGroups, ", "))
	if !e.AttachedTo(sealed.Facts.InstanceID) {
		h.problem("wait for the cloud; tkenode eni shows what is under way", "%s is not attached for good", e.ID)
	}
	if e.MAC != s.slot.MAC {
		h.problem("wait for the pool's next look, at most 75 s", "the ledger has the MAC %s", s.slot.MAC)
	}
	if want, whose := groupsFor(p, sealed); len(want) > 0 && !sameSet(want, e.SecurityGroups) {
		h.problem("somebody has changed them in the cloud: change them back, or "+strings.TrimSuffix(whose, "'s"), "%s security groups are %s", whose, strings.Join(want, ", "))
	}
	for _, a := range p.addrs() {
		h.Problems = append(h.Problems, addressProblems(a, p.ENI, cloud)...)
	}
	return h
}

// addressProblems compares an address with what the cloud has assigned.
func addressProblems(a netip.Addr, eni string, cloud answered) []Problem {
	const do = "delete the pod, so that it gets another address; see who changes the ENI's addresses in the cloud"
	owner, ip := cloud.owner(a)
	switch {
	case owner == "":
		return []Problem{{fmt.Sprintf("%s is not assigned to %s any more: the VPC drops what the pod sends", a, eni), do}}
	case owner != eni:
		return []Problem{{fmt.Sprintf("%s is assigned to %s, not to %s", a, owner, eni), do}}
	case ip.State != "" && ip.State != tencent.StateAvailable:
		return []Problem{{fmt.Sprintf("%s is %s in the cloud", a, ip.State), "wait for the cloud; if it stays, delete the pod"}}
	}
	return nil
}

// asking is how a MAC is asked for.
func asking(a netip.Addr) string {
	if a.Is6() {
		return "neighbour discovery"
	}
	return "ARP"
}

// owner returns which ENI of the instance has an address.
func (c answered) owner(a netip.Addr) (string, tencent.IP) {
	for _, e := range c.enis {
		for _, ip := range e.IPs {
			if ip.Addr == a {
				return e.ID, ip
			}
		}
		for _, ip := range e.IP6s {
			if ip.Addr == a {
				return e.ID, tencent.IP(ip)
			}
		}
	}
	return "", tencent.IP{}
}

func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

// returning is the way of an answer.
func (s *sight) returning(l routing) Leg {
	name, _, podMAC := vethOf(s.pod.Attachment)
	table := podTable
	if s.pol.compat {
		table = mainTable
	}
	r := Hop{Name: "rule", Text: l.rule}
	if l.rule == "" {
		r.Text = "none leads to a route"
	}
	hop := Hop{Name: "table " + tableName(l.table), Text: l.String(), Problems: s.claims(doWait, route{table: table, six: l.to.Is6(), dst: l.to}, neighbour{dev: name, addr: l.to})}
	switch {
	case l.refused != "":
		hop.problem(s.doOf(), "the answer goes nowhere")
	case l.table != table:
		r.problem(s.doOf(), "it leads to table %s, not to table %s", tableName(l.table), tableName(table))
	case l.dev != name:
		hop.problem(s.doOf(), "it goes to %s, the pod's veth is %s", l.dev, name)
	}
	hops := []Hop{r, hop}
	if l.neighbour != "" {
		h := Hop{Name: "pod", Text: l.neighbour}
		if l.failed {
			h.problem(doRestart, "the pod does not answer %s for %s; its MAC should be %s", asking(l.to), l.to, podMAC)
		}
		hops = append(hops, h)
	}
	title := "back from " + l.from.String()
	if l.iif != "" {
		title += ", in by " + l.iif
	}
	return Leg{Title: title, Hops: hops}
}
