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
// Source: RFC 5737, RFC 3849
var (
	outside  = netip.AddrFrom4([4]byte{192, 0, 2, 1})
	outside6 = netip.MustParseAddr("2001:db8::1")
)

// Explicable reports whether an address can be asked for: it is routed, and means the
// same everywhere.
func Explicable(a netip.Addr) bool {
	return a.IsValid() && a.Zone() == "" && !a.Is4In6() && !a.IsMulticast() && !a.IsLoopback() && (a.Is4() || !a.IsLinkLocalUnicast())
}

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

// toPod reports whether the packet goes to a pod of this node.
func (l routing) toPod() bool {
	return l.refused == "" && !l.gateway.IsValid() && strings.HasPrefix(l.dev, hostPrefix)
}

// sight is what was found of one pod.
type sight struct {
	pod     Pod
	pol     policy
	slot    Slot
	device  device // of the slot's ENI; zero: no link has its MAC
	primary device // of the primary ENI
	steps   []step // what differs from what is wanted for the pod
	lacking bool   // something of it says which way packets go

	dead   string             // why its network namespace cannot be looked into
	inside []routing          // in the pod, one for each of its addresses
	veth   string             // empty: there is none
	nft    bool               // our table is there
	marked map[netip.Addr]int // slot that an address of it leads to
	ways   []way
	whole  []wholeWay        // of a pod that has its ENI whole, in the place of ways
	snat   map[bool][]string // chains of others that may change the source; of IPv6
}

// address returns the pod's address of the family of another one.
func (s *sight) address(as netip.Addr) netip.Addr {
	if as.Is6() {
		return s.pod.Addr6
	}
	return s.pod.Addr
}

// way is the routing of the first packet of a new connection, and of its answer.
type way struct{ out, back routing }

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
		return !p.has(q.IP)
	})
	if q.Pod != "" && len(pods) == 0 {
		return out, fmt.Errorf("pod %s has no VPC address: %w; tkenode pods lists those that have; a pod with host networking has the node's", q.Pod, ErrNotHere)
	}
	select { // one at a time: each looks through the kernel and asks the cloud
	case n.explaining <- struct{}{}:
		defer func() { <-n.explaining }()
	case <-ctx.Done(): // nobody listens any more
		return out, fmt.Errorf("wait for another question to be answered: %w", ctx.Err())
	}
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
		if q.To.Is6() && !p.Addr6.IsValid() {
			return out, fmt.Errorf("pod %s has no IPv6 address: %w", p, ErrNotHere)
		}
		seen, err := k.look(p, s, policyOf(sealed), q.To)
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
func (s *sight) claims(do string, objects ...object) []Problem {
	return s.claim(do, func(o object) bool {
		return slices.ContainsFunc(objects, func(mine object) bool { return mine.key() == o.key() })
	})
}

// claim takes those differences that are about an object for which mine holds.
func (s *sight) claim(do string, mine func(object) bool) (out []Problem) {
	s.steps = slices.DeleteFunc(s.steps, func(st step) bool {
		ok := mine(st.object)
		if ok {
			out = append(out, Problem{Text: differs(st), Do: do})
		}
		return ok
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
