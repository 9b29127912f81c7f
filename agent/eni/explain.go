package eni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// Question asks for a pod, or for an address.
type Question struct {
	Pod string     // namespace/name
	IP  netip.Addr // if no pod is asked for
	To  netip.Addr // where packets go to; invalid: the subnet's gateway and an address outside
}

// outside stands for all that is not of the VPC: it is reserved for documentation,
// and routed as any address of the Internet is.
// Source: RFC 5737
var outside = netip.AddrFrom4([4]byte{192, 0, 2, 1})

// cloudPatience bounds what explaining waits for the cloud: whoever asks wants to
// know soon, and what the kernel says does not depend on it.
const cloudPatience = 5 * time.Second

// ErrNotHere is the answer to a question about something that this node does not
// have.
var ErrNotHere = errors.New("not on this node")

// Explanation is the way of a packet as the kernel has it, compared with the
// ledger and with the cloud.
type Explanation struct {
	Now     time.Time `json:"now"`
	Subject string    `json:"subject"`
	Traces  []Trace   `json:"traces"` // one for each interface of the pod
	// CloudNotAsked says why nothing is compared with the cloud.
	CloudNotAsked string `json:"cloudNotAsked,omitempty"`
}

// Problems returns how many disagreements there are.
func (e Explanation) Problems() int {
	n := 0
	for _, t := range e.Traces {
		for _, l := range t.Legs {
			for _, h := range l.Hops {
				n += len(h.Problems)
			}
		}
	}
	return n
}

// Trace is the way of packets of one interface of a pod, or of one address.
type Trace struct {
	Title string `json:"title"`
	Legs  []Leg  `json:"legs"`
}

// Leg is a part of the way, in the order in which a packet goes it.
type Leg struct {
	Title string `json:"title"`
	Hops  []Hop  `json:"hops"`
}

// Hop is one thing that a packet meets.
type Hop struct {
	Name     string    `json:"name"`
	Text     string    `json:"text"` // as it was found
	Problems []Problem `json:"problems,omitempty"`
}

// Problem is a disagreement, and what to do about it.
type Problem struct {
	Text string `json:"text"`
	Do   string `json:"do"`
}

func (h *Hop) problem(do, format string, args ...any) {
	h.Problems = append(h.Problems, Problem{Text: fmt.Sprintf(format, args...), Do: do})
}

// What to do.
const (
	doWait    = "the agent repairs this at once; if it stays: tkenode plan, then journalctl -u tkenode-agent"
	doRestart = "delete the pod, so that it is made anew; the agent leaves the inside of a running pod alone"
	doForeign = "find out who made it, and remove it; tkenode does not delete what is not its own"
)

// routing is what the kernel does with a packet.
type routing struct {
	from, to netip.Addr
	iif      string
	mark     uint32

	rule    string // that led to the table
	table   int
	dev     string
	gateway netip.Addr
	local   bool
	refused string // why it goes nowhere
	// neighbour is what is known of the next hop's MAC; failed, that it has none.
	neighbour string
	failed    bool
}

func (l routing) String() string {
	switch {
	case l.refused != "":
		return "the kernel refuses: " + l.refused
	case l.local:
		return fmt.Sprintf("%s is this node's own", l.to)
	case l.gateway.IsValid():
		return fmt.Sprintf("via %s dev %s", l.gateway, l.dev)
	}
	return "dev " + l.dev
}

// sight is what was found of one pod.
type sight struct {
	pod    Pod
	slot   Slot
	device device // of the slot's ENI; zero: no link has its MAC
	steps  []step // what differs from what is wanted for the pod

	dead   string  // why its network namespace cannot be looked into
	inside routing // in the pod
	veth   string  // empty: there is none
	nft    bool    // our table is there
	marked int     // slot that its address leads to; -1: none
	out    []routing
	back   routing
	snat   []string // chains that may change the source
}

// answered is what the cloud says of the instance's ENIs.
type answered struct {
	enis []tencent.ENI
	err  error
}

// Explain answers a question.
func (n *Network) Explain(ctx context.Context, q Question) (Explanation, error) {
	out := Explanation{Now: time.Now().UTC(), Subject: "address " + q.IP.String()}
	if q.Pod != "" {
		out.Subject = "pod " + q.Pod
	}
	sealed, s, err := n.current()
	if err != nil {
		return out, err
	}
	pods := slices.DeleteFunc(s.pods(), func(p Pod) bool {
		if q.Pod != "" {
			return p.String() != q.Pod
		}
		return p.Addr != q.IP
	})
	if q.Pod != "" && len(pods) == 0 {
		return out, fmt.Errorf("pod %s has no VPC address: %w; tkenode pods lists those that have; a pod with host networking has the node's", q.Pod, ErrNotHere)
	}
	n.explaining.Lock() // one at a time: each looks through the kernel and asks the cloud
	defer n.explaining.Unlock()
	cloud := n.askCloud(ctx, sealed)
	if cloud.err != nil {
		out.CloudNotAsked = cloud.err.Error()
	}
	k, err := openKernel()
	if err != nil {
		return out, err
	}
	defer k.close()
	for _, p := range pods {
		seen, err := k.look(p, s, sealed.Facts.MAC, q.To)
		if err != nil {
			return out, fmt.Errorf("look at pod %s: %w", p, err)
		}
		out.Traces = append(out.Traces, seen.trace(cloud, sealed))
	}
	if len(pods) == 0 {
		t, err := k.traceAddress(q.IP, s, cloud, sealed, out.Now)
		if err != nil {
			return out, err
		}
		out.Traces = append(out.Traces, t)
	}
	return out, nil
}

// askCloud asks for the ENIs of the instance.
func (n *Network) askCloud(ctx context.Context, sealed node.Sealed) answered {
	if n.pool.cloud == nil {
		return answered{err: errors.New("the agent has no access to the cloud's API")}
	}
	ctx, cancel := context.WithTimeout(ctx, cloudPatience)
	defer cancel()
	enis, err := n.pool.cloud.DescribeENIs(ctx, sealed.Facts.InstanceID)
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("no answer within %s: %w", cloudPatience, err)
	}
	return answered{enis, err}
}

// claims takes those differences that are about the objects, as problems.
func (s *sight) claims(do string, objects ...object) (out []Problem) {
	s.steps = slices.DeleteFunc(s.steps, func(st step) bool {
		mine := slices.ContainsFunc(objects, func(o object) bool { return o.key() == st.object.key() })
		if mine {
			out = append(out, Problem{Text: differs(st), Do: do})
		}
		return mine
	})
	return out
}

// differs says what is wrong, in place of what would put it right.
func differs(st step) string {
	if text, ok := strings.CutPrefix(st.text, "add "); ok {
		return "missing: " + text
	}
	return "wrong: " + strings.Replace(strings.TrimPrefix(st.text, "set "), " (was ", " is what it should be (found ", 1)
}

// trace tells the way of the pod's packets.
func (s sight) trace(cloud answered, sealed node.Sealed) Trace {
	p := s.pod
	t := Trace{Title: fmt.Sprintf("%s  %s  container %.12s  %s of slot %d", p, p.Addr, p.ContainerID, p.ENI, p.Slot)}
	if s.dead != "" {
		h := Hop{Name: "interface", Text: s.dead}
		h.problem("the runtime's DEL, or the agent in its place, takes the rest away; if it stays: crictl pods",
			"the pod's network namespace is not there")
		t.Legs = []Leg{{Title: "out of the pod", Hops: []Hop{h}}}
		return t
	}
	t.Legs = append(t.Legs, s.leaving())
	// Without a mark, and with our table in place, a packet goes no further.
	if s.marked >= 0 || !s.nft {
		for _, l := range s.out {
			t.Legs = append(t.Legs, s.sent(l, sealed))
		}
	}
	t.Legs = append(t.Legs, s.eni(cloud, sealed), s.returning())
	if len(s.steps) > 0 {
		rest := Hop{Name: "node", Text: "more that packets depend on"}
		for _, st := range s.steps {
			rest.Problems = append(rest.Problems, Problem{Text: differs(st), Do: doWait})
		}
		t.Legs = append(t.Legs, Leg{Title: "beside the way", Hops: []Hop{rest}})
	}
	return t
}

// leaving is the way from the pod to the node's routing.
func (s *sight) leaving() Leg {
	p := s.pod
	name, hostMAC, podMAC := vethOf(p.Attachment)
	inside := Hop{Name: "interface", Text: fmt.Sprintf("%s %s, MAC %s, MTU %d", p.IfName, p.Addr, podMAC, p.MTU)}
	next := Hop{Name: "next hop", Text: s.inside.String()}
	veth, link := veth{pod: p}, link{dev: name, mac: hostMAC, mtu: p.MTU}
	inside.Problems = s.claims(doRestart, podLink{pod: p}, podAddress{pod: p})
	next.Problems = s.claims(doRestart, podRoute{pod: p, dst: podGateway}, podRoute{pod: p}, podNeighbour{pod: p})
	if s.inside.neighbour != "" {
		next.Text += ", " + s.inside.neighbour
	}
	host := Hop{Name: "veth", Text: s.veth, Problems: s.claims(doWait, veth, link)}
	if s.veth == "" {
		host.Text = "none"
	}
	mark := Hop{Name: "nft pods", Problems: s.claims(doWait, table{}, element{addr: p.Addr})}
	switch {
	case !s.nft:
		mark.Text = "no table inet " + nftTable + ": the packet gets no mark"
	case s.marked < 0:
		mark.Text = fmt.Sprintf("%s leads to no slot: the packet is dropped here", p.Addr)
	default:
		mark.Text = fmt.Sprintf("%s → slot %d, mark %#x/%#x", p.Addr, s.marked, slotMark(s.marked), markMask)
	}
	return Leg{Title: "out of the pod", Hops: []Hop{inside, next, host, mark}}
}

// sent is the way of one packet through the node's routing.
func (s *sight) sent(l routing, sealed node.Sealed) Leg {
	tbl := slotTable + s.pod.Slot
	leg := Leg{Title: fmt.Sprintf("to %s%s", l.to, s.known(l.to))}
	r := Hop{Name: "rule", Text: l.rule, Problems: s.claims(doWait,
		rule{priority: podPriority, table: podTable}, rule{priority: slotPriority + s.pod.Slot, mark: slotMark(s.pod.Slot), table: tbl})}
	if l.rule == "" {
		r.Text = "none leads to a route"
	}
	way := Hop{Name: fmt.Sprintf("table %d", l.table), Text: l.String(), Problems: s.claims(doWait,
		route{table: tbl}, route{table: tbl, metric: lastMetric})}
	switch {
	case l.local || l.table == podTable: // it stays on the node
	case l.refused != "" && s.device.name == "" && s.slot.taken():
		way.problem("attach the ENI again, or drain the node", "no link has the MAC %s of %s: its pods' packets are kept from leaving by another", s.slot.MAC, s.slot.ENI)
	case l.refused != "":
		way.problem(doWait, "the packet goes nowhere")
	case l.table != tbl:
		r.problem(doForeign, "it leads to table %d, the ENI's is %d", l.table, tbl)
	case l.dev != s.device.name:
		way.problem(doWait, "it leaves by %s, the ENI is %s", l.dev, s.device.name)
	}
	leg.Hops = append(leg.Hops, r, way)
	if l.gateway.IsValid() && l.neighbour != "" {
		h := Hop{Name: "gateway", Text: l.neighbour}
		if l.failed {
			h.problem("see whether the cloud shows the ENI as attached; tkenode eni", "%s does not answer ARP on %s", l.gateway, l.dev)
		}
		leg.Hops = append(leg.Hops, h)
	}
	if l.refused == "" && !l.local && l.table != podTable {
		h := Hop{Name: "SNAT", Text: fmt.Sprintf("none, it leaves as %s", s.pod.Addr)}
		if len(s.snat) > 0 {
			h.Text = "as these chains say: " + strings.Join(s.snat, ", ")
		}
		if s.device.name != l.dev {
			h.problem("put the route right, see above", "the VPC drops %s on %s: it is an address of %s", s.pod.Addr, l.dev, s.pod.ENI)
		}
		leg.Hops = append(leg.Hops, h)
	}
	return leg
}

// known says what an address is.
func (s *sight) known(a netip.Addr) string {
	switch {
	case a == s.slot.Gateway():
		return ", the subnet's gateway"
	case a == outside:
		return ", an address outside of the VPC"
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
		dev.Problems = s.claims(doWait, slotObjects(slot, s.device)...)
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
	if want := sealed.Config.Network.SecurityGroupIDs; len(want) > 0 && !sameSet(want, e.SecurityGroups) {
		h.problem("somebody has changed them in the cloud: change them back, or the NodeConfig", "the NodeConfig's security groups are %s", strings.Join(want, ", "))
	}
	h.Problems = append(h.Problems, addressProblems(p.Addr, p.ENI, cloud)...)
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

// owner returns which ENI of the instance has an address.
func (c answered) owner(a netip.Addr) (string, tencent.IP) {
	for _, e := range c.enis {
		for _, ip := range e.IPs {
			if ip.Addr == a {
				return e.ID, ip
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
func (s *sight) returning() Leg {
	name, _, podMAC := vethOf(s.pod.Attachment)
	l := s.back
	r := Hop{Name: "rule", Text: l.rule}
	if l.rule == "" {
		r.Text = "none leads to a route"
	}
	way := Hop{Name: fmt.Sprintf("table %d", l.table), Text: l.String(), Problems: s.claims(doWait, route{table: podTable, dst: s.pod.Addr})}
	switch {
	case l.refused != "":
		way.problem(doWait, "the answer goes nowhere")
	case l.table != podTable:
		r.problem(doForeign, "it leads to table %d, the pods' is %d", l.table, podTable)
	case l.dev != name:
		way.problem(doWait, "it goes to %s, the pod's veth is %s", l.dev, name)
	}
	hops := []Hop{r, way}
	if l.neighbour != "" {
		h := Hop{Name: "pod", Text: l.neighbour}
		if l.failed {
			h.problem(doRestart, "the pod does not answer ARP for %s; its MAC should be %s", s.pod.Addr, podMAC)
		}
		hops = append(hops, h)
	}
	title := "back from " + l.from.String()
	if l.iif != "" {
		title += ", in by " + l.iif
	}
	return Leg{Title: title, Hops: hops}
}
