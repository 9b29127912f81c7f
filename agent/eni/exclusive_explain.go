package eni

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// What is told of pods that have an ENI whole.

// tellWhole completes what is known of the ENIs that pods get whole; ready are those
// that the next pod can have.
func (out *State) tellWhole(ready map[int]int, sc scene) {
	for i := range out.ENIs {
		e := &out.ENIs[i]
		if !e.exclusive() {
			continue
		}
		e.Exclusive = true
		_, e.Ready = ready[e.Number]
		for j := range out.Pods {
			p := &out.Pods[j]
			_, looked := sc.wired[p.Attachment] // else it is newer than the last look
			switch {
			case p.Slot != e.Number:
			case e.Device == "" || !looked:
				e.Device = p.IfName + " in " + p.String()
			case p.State == "wired":
				p.State = "no ENI"
			}
		}
	}
}

// wholeWay is the way of a packet of a pod that has an ENI: in the pod, and on the
// node if it goes there.
type wholeWay struct {
	inside routing
	way
}

// followWhole asks the kernel for the routes of the pod's packets, in the pod and, if
// they leave it by the veth, on the node, and of the answers.
func (k *kernel) followWhole(s *sight, to netip.Addr) error {
	rules, err := k.rules(false)
	if err != nil {
		return err
	}
	targets := []netip.Addr{to}
	if !to.IsValid() {
		targets = []netip.Addr{s.pod.Gateway, outside, s.pol.primary}
		if n := len(s.pol.services); n > 1 { // the first is link-local
			targets = append(targets, s.pol.services[1].Addr().Next())
		}
		if s.pod.Addr6.IsValid() {
			targets = append(targets, outside6)
		}
	}
	pod, err := k.enter(s.pod.NetNS)
	if err != nil {
		s.dead = err.Error() // it has just ended
		return nil
	}
	name, _, _ := vethOf(s.pod.Attachment)
	for _, a := range targets {
		if !a.IsValid() {
			continue
		}
		w := wholeWay{inside: ask(pod.nl, routing{to: a})}
		if w.inside.dev == podVeth {
			w.out = routing{from: s.pod.Addr, to: a, iif: name, mark: exclusiveMark}
			if !s.pol.sees(a) {
				w.out.mark = primaryMark
			}
			w.out = k.lookup(rules, w.out)
			w.back = routing{from: a, to: s.pod.Addr, iif: s.primary.name, mark: answerMark}
			if w.out.local {
				w.back = routing{to: s.pod.Addr}
			}
			w.back = k.lookup(rules, w.back)
		}
		s.whole = append(s.whole, w)
	}
	return nil
}

// traceWhole tells the way of the packets of a pod that has an ENI.
func (s *sight) traceWhole(cloud answered, sealed node.Sealed) []Leg {
	p := s.pod
	dev := Hop{Name: "interface", Text: fmt.Sprintf("%s is %s, MAC %s, MTU %d, address %s", p.IfName, p.ENI, p.MAC, p.MTU, listed(p.addrs()))}
	dev.Problems = s.claims(doRestart, podENI{pod: p}, podAddress{pod: p, addr: p.Addr},
		podAddress{pod: p, addr: p.Addr6}, podAddress{pod: p, addr: linkLocal(p.MAC)})
	if s.device.name != "" {
		dev.problem(doWait, "the ENI's link is on the node, as %s", s.device.name)
	}
	legs := []Leg{{Title: fmt.Sprintf("%s of pod %s", p.ENI, p), Hops: []Hop{dev, s.assigned(cloud, sealed)}}}
	for _, w := range s.whole {
		leg := Leg{Title: fmt.Sprintf("to %s%s", w.inside.to, s.known(w.inside.to)), Hops: []Hop{s.insideHop(w.inside)}}
		switch {
		case w.inside.refused != "" || w.inside.local:
		case w.inside.dev == podVeth:
			leg.Hops = append(leg.Hops, s.throughNode(w.way)...)
		default:
			leg.Hops = append(leg.Hops, Hop{Name: "SNAT", Text: fmt.Sprintf("none, it leaves as %s, and its answer comes in by %s", s.address(w.inside.to), p.IfName)})
		}
		legs = append(legs, leg)
	}
	return legs
}

// insideHop is the pod's own routing.
func (s *sight) insideHop(l routing) Hop {
	p := s.pod
	h := Hop{Name: "route", Text: l.String()}
	if l.neighbour != "" {
		h.Text += ", " + l.neighbour
	}
	h.Problems = s.claim(doRestart, func(o object) bool {
		switch o := o.(type) {
		case podLink, podRoute, podNeighbour:
			return l.dev == podVeth
		case wholeRoute:
			return o.six == l.to.Is6() && (!o.dst.IsValid() || o.dst.Contains(l.to))
		}
		return false
	})
	dev := p.IfName
	if slices.ContainsFunc(s.pol.services, func(r netip.Prefix) bool { return r.Contains(l.to) }) {
		dev = podVeth
	}
	switch {
	case l.refused != "":
		h.problem(doRestart, "the packet goes nowhere")
	case l.dev != dev && !l.local:
		h.problem(doRestart, "it leaves by %s, not by %s", l.dev, dev)
	case l.failed:
		h.problem("see whether the cloud shows the ENI as attached; tkenode eni", "its next hop does not answer %s on %s", asking(l.to), l.dev)
	}
	return h
}

// throughNode is the way of a packet that the pod sends to the node, and of the answer.
func (s *sight) throughNode(w way) []Hop {
	p := s.pod
	name, hostMAC, _ := vethOf(p.Attachment)
	host := Hop{Name: "veth", Text: s.veth, Problems: s.claims(doWait, veth{pod: p}, link{dev: name, mac: hostMAC, mtu: p.MTU})}
	if s.veth == "" {
		host.Text = "none"
	}
	mark := Hop{Name: "nft pods", Problems: s.claims(doWait, table{}, element{addr: p.Addr})}
	switch {
	case !s.nft:
		mark.Text = "no table inet " + nftTable + ": the packet gets no mark"
	case s.marked[p.Addr] != exclusiveSlot:
		mark.Text = fmt.Sprintf("%s does not lead to chain %s", p.Addr, exclusiveChain)
		mark.problem(doWait, "its packets are not translated")
	default:
		mark.Text = fmt.Sprintf("%s → chain %s, mark %#x/%#x", p.Addr, exclusiveChain, w.out.mark, markMask)
	}
	hops := []Hop{host, mark}
	out := Hop{Name: "table " + tableName(w.out.table), Text: w.out.String()}
	if w.out.refused != "" {
		out.problem(doForeign, "the packet goes nowhere")
	}
	hops = append(hops, out)
	if w.out.to == metadataAddr {
		hops = append(hops, s.guarded())
	}
	if !w.out.local && w.out.refused == "" {
		hops = append(hops, Hop{Name: "SNAT", Text: fmt.Sprintf("it leaves as %s, the node's own, also to what kube-proxy makes of it", s.pol.primary)})
	}
	back := Hop{Name: "answer", Text: strings.TrimSpace(w.back.rule + ": " + w.back.String())}
	back.Problems = s.claim(doWait, func(o object) bool {
		switch o := o.(type) {
		case rule:
			return o.table == exclusiveTable
		case route:
			return o.table == exclusiveTable
		}
		return false
	})
	if w.back.dev != name {
		back.problem(s.doOf(), "the answer does not go to %s", name)
	}
	return append(hops, back)
}

// groupsFor returns the security groups that the pod's ENI should have.
func groupsFor(p Pod, sealed node.Sealed) (groups []string, whose string) {
	if !p.exclusive() {
		return sealed.Config.Network.SecurityGroupIDs, "the NodeConfig's"
	}
	if p.Groups == "" { // the ledger was rebuilt
		return nil, ""
	}
	return strings.Split(p.Groups, ","), "the pod's"
}
