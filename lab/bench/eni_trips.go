package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	tripWarmup = 5   // rounds that nobody counts
	tripRounds = 15  // of all three nodes, in turns
	trips      = 300 // in a round
	echoPort   = 7
	perPod     = "rules for every pod"
	settle     = 500 * time.Millisecond // for the agent to look at what it has made
)

// podCounts are the numbers of other pods on the node.
var podCounts = []int{0, 110, 500, 2000}

// measureTrips measures UDP round trips between a pod and a machine outside of its
// node, while the node gets more pods. Everything is veths: the VPC of the lab, in
// user space, would hide what the kernel takes. Beside our node there is one with
// two rules for every pod, as TKE's own agent makes them, and one that only
// forwards: what that one takes is what the machine takes, whatever it does else.
func measureTrips(ctx context.Context, n *eniNode) error {
	const enis = 10
	api := newAttached(n.facts, enis, (podCounts[len(podCounts)-1]+1)/enis+1)
	// A bridge is what the paths take for an ENI, and a veth leads out of it.
	if err := errors.Join(addBridge("eth0", n.facts.MAC), addAddress("eth0", netip.PrefixFrom(n.facts.PrivateIP, 24))); err != nil {
		return err
	}
	eth0, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := defaultVia(eth0, netip.MustParseAddr("10.0.0.1"), unix.RT_TABLE_MAIN); err != nil {
		return err
	}
	for i, e := range api.enis {
		if err := addBridge(fmt.Sprint("eth", i+1), e.MAC); err != nil {
			return err
		}
	}
	if err := n.start(ctx, api, api.config()); err != nil {
		return err
	}
	ours, plain, rules, err := n.tripNodes(ctx, api)
	if err != nil {
		return err
	}
	nodes := []*tripNode{ours, plain, rules}
	var echoes sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer echoes.Wait()
	defer cancel()
	for _, t := range nodes {
		listening := make(chan error)
		echoes.Go(func() { t.outside.enter(func() error { return echo(ctx, listening) }) })
		if err := <-listening; err != nil {
			return err
		}
	}
	var first, last []Pair // ours and the node that only forwards
	for _, count := range podCounts {
		if err := n.addTripPods(ctx, ours, rules, count); err != nil {
			return err
		}
		time.Sleep(settle)
		var beside, control []Pair
		for turn := range tripWarmup + tripRounds {
			var took [3]float64
			for i := range nodes {
				at := (i + turn) % len(nodes)
				if took[at], err = nodes[at].roundTrip(); err != nil {
					return err
				}
			}
			if turn >= tripWarmup {
				beside = append(beside, Pair{took[0], took[2]})
				control = append(control, Pair{took[0], took[1]})
			}
		}
		n.figure(compare(fmt.Sprintf("eni.rtt.%dpods", count), "µs", perPod, beside))
		c := compare("", "", "", control)
		n.say("%d pods: round trip %.1f µs, through a node that only forwards %.1f µs", count, c.Ours, c.Peer)
		if first == nil {
			first = control
		}
		last = control
	}
	// Each against the node that only forwards, in the same rounds: between the first and
	// the last count the machine's own speed changes by more than what is looked for.
	a, b := compare("", "", "", last), compare("", "", "", first)
	n.figure(Figure{Name: "eni.rtt.growth", Unit: "ratio", Ours: round(a.Ratio / b.Ratio), Runs: tripRounds})
	return nil
}

// tripNode is a node between a pod and the outside.
type tripNode struct {
	node, outside, pod *namespace
	addr               netip.Addr // of the pod
	made               int        // other pods
	last               netip.Addr // of the newest of them, where they are only rules
	side               *side      // of ours
}

var (
	outsideAddr = podCIDR.Masked().Addr().Next() // the gateway of the subnet
	anyPod      = netip.MustParseAddr("10.0.16.250")
)

// tripNodes makes the three nodes, each with one pod.
func (n *eniNode) tripNodes(ctx context.Context, api attached) (ours, plain, rules *tripNode, err error) {
	ns, err := newNamespaces(8)
	if err != nil {
		return nil, nil, nil, err
	}
	ours = &tripNode{outside: ns[0], pod: ns[1]}
	if ours.side, err = n.ourSide(); err != nil {
		return nil, nil, nil, err
	}
	if _, err = ours.side.add(ctx, ours.side.newPod(ours.pod)); err != nil {
		return nil, nil, nil, err
	}
	s, err := n.network.State()
	if err != nil {
		return nil, nil, nil, err
	}
	ours.addr = s.Pods[0].Addr
	bridge := fmt.Sprint("eth", s.Pods[0].Slot+1)
	if err := connect(nil, "out", ours.outside, "eth0"); err != nil {
		return nil, nil, nil, err
	}
	out, err := netlink.LinkByName("out")
	if err != nil {
		return nil, nil, nil, err
	}
	master, err := netlink.LinkByName(bridge)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := errors.Join(netlink.LinkSetMaster(out, master), netlink.LinkSetUp(out)); err != nil {
		return nil, nil, nil, err
	}
	mac := api.enis[s.Pods[0].Slot].MAC
	if err := ours.outside.enter(func() error { return answerFor(ours.addr, mac) }); err != nil {
		return nil, nil, nil, err
	}
	plain = &tripNode{node: ns[2], outside: ns[3], pod: ns[4], addr: anyPod}
	rules = &tripNode{node: ns[5], outside: ns[6], pod: ns[7], addr: anyPod, last: outsideAddr}
	return ours, plain, rules, errors.Join(plain.make(unix.RT_TABLE_MAIN), rules.make(perPodTable))
}

// connect makes a veth between two namespaces.
func connect(a *namespace, nameA string, b *namespace, nameB string) error {
	return a.enter(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = nameA, 1500
		v := &netlink.Veth{LinkAttrs: attrs, PeerName: nameB, PeerNamespace: netlink.NsFd(b.Fd()), PeerMTU: 1500}
		if err := netlink.LinkAdd(v); err != nil {
			return fmt.Errorf("add veth %s: %w", nameA, err)
		}
		return nil
	})
}

func addBridge(name, mac string) error {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, hw
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	return setUp(name)
}

// answerFor makes this namespace the outside of a node: it has the gateway's
// address, and sends to the pod by way of the node's MAC.
func answerFor(pod netip.Addr, mac string) error {
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	if err := errors.Join(setUp("eth0"), addAddress("eth0", netip.PrefixFrom(outsideAddr, podCIDR.Bits()))); err != nil {
		return err
	}
	l, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, IP: pod.AsSlice(), HardwareAddr: hw})
}

// make makes a node by hand that forwards between its pod and the outside, where
// the table leads to.
func (t *tripNode) make(table int) error {
	if err := errors.Join(connect(t.node, "veth0", t.pod, "eth0"), connect(t.node, "eth1", t.outside, "eth0")); err != nil {
		return err
	}
	var mac, podGW string
	if err := t.node.enter(func() error {
		if err := errors.Join(setUp("lo"), setUp("veth0"), setUp("eth1"), addAddress("eth1", netip.PrefixFrom(podCIDR.Masked().Addr().Next().Next(), 32))); err != nil {
			return err
		}
		eth1, err := netlink.LinkByName("eth1")
		if err != nil {
			return err
		}
		veth0, err := netlink.LinkByName("veth0")
		if err != nil {
			return err
		}
		mac, podGW = eth1.Attrs().HardwareAddr.String(), veth0.Attrs().HardwareAddr.String()
		return errors.Join(
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			netlink.RouteAdd(&netlink.Route{LinkIndex: veth0.Attrs().Index, Dst: only(t.addr), Scope: netlink.SCOPE_LINK}),
			defaultVia(eth1, outsideAddr, table))
	}); err != nil {
		return fmt.Errorf("make node: %w", err)
	}
	if err := t.outside.enter(func() error { return answerFor(t.addr, mac) }); err != nil {
		return fmt.Errorf("make outside: %w", err)
	}
	gateway := netip.MustParseAddr("169.254.1.1")
	return t.pod.enter(func() error {
		if err := errors.Join(setUp("eth0"), addAddress("eth0", netip.PrefixFrom(t.addr, 32))); err != nil {
			return err
		}
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		hw, err := net.ParseMAC(podGW)
		if err != nil {
			return err
		}
		return errors.Join(
			netlink.NeighSet(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT, IP: gateway.AsSlice(), HardwareAddr: hw}),
			defaultVia(eth0, gateway, unix.RT_TABLE_MAIN))
	})
}

func only(a netip.Addr) *net.IPNet { return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(32, 32)} }

func defaultVia(l netlink.Link, gateway netip.Addr, table int) error {
	return netlink.RouteReplace(&netlink.Route{
		LinkIndex: l.Attrs().Index, Gw: gateway.AsSlice(), Table: table, Flags: int(netlink.FLAG_ONLINK), Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
	})
}

// addTripPods brings both nodes to so many other pods.
func (n *eniNode) addTripPods(ctx context.Context, ours, rules *tripNode, count int) error {
	spare, err := newNamespaces(count - ours.made)
	if err != nil {
		return err
	}
	for _, ns := range spare {
		if _, err := ours.side.add(ctx, ours.side.newPod(ns)); err != nil {
			return err
		}
		n.closers = append(n.closers, ns.Close)
	}
	ours.made = count
	return rules.layRules(count)
}

// layRules makes the rules of so many other pods. Those of the pod that is measured
// stand behind all of them, as those of the newest pod do.
func (t *tripNode) layRules(count int) error {
	nl, err := netlink.NewHandleAt(netns.NsHandle(t.node.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	mine := podRules(t.addr)
	for _, r := range mine {
		if err := nl.RuleDel(r); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete rule: %w", err)
		}
	}
	var add []*netlink.Rule
	for ; t.made < count; t.made++ {
		if t.last = t.last.Next(); t.last == t.addr {
			t.last = t.last.Next()
		}
		add = append(add, podRules(t.last)...)
	}
	for _, r := range append(add, mine...) {
		if err := nl.RuleAdd(r); err != nil {
			return fmt.Errorf("add rule: %w", err)
		}
	}
	return nil
}

const perPodTable = 100

// podRules are what TKE's agent makes for a pod.
func podRules(pod netip.Addr) []*netlink.Rule {
	to, from := netlink.NewRule(), netlink.NewRule()
	to.Priority, to.Dst, to.Table = 512, only(pod), unix.RT_TABLE_MAIN
	from.Priority, from.Src, from.Table = 1536, only(pod), perPodTable
	return []*netlink.Rule{to, from}
}

// echo answers datagrams in this namespace until ctx ends, on a thread of its own
// that blocks in the kernel: a runtime's poller would be measured, too.
func echo(ctx context.Context, listening chan<- error) error {
	fd, err := udpSocket()
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: echoPort})
	}
	listening <- err
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := make([]byte, 64)
	for ctx.Err() == nil {
		size, from, err := unix.Recvfrom(fd, b, 0)
		if err == nil {
			err = unix.Sendto(fd, b[:size], 0, from)
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return nil
}

// udpSocket blocks at most for a second.
func udpSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	return fd, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
}

// roundTrip returns the median of a round, in microseconds.
func (t *tripNode) roundTrip() (float64, error) {
	took := make([]float64, 0, trips)
	err := t.pod.enter(func() error {
		fd, err := udpSocket()
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: outsideAddr.As4(), Port: echoPort}); err != nil {
			return err
		}
		b := make([]byte, 64)
		for range trips {
			began := time.Now()
			if _, err := unix.Write(fd, b[:16]); err != nil {
				return fmt.Errorf("send: %w", err)
			}
			for {
				_, err := unix.Read(fd, b)
				if errors.Is(err, unix.EINTR) {
					continue
				}
				if err != nil {
					return fmt.Errorf("receive: %w", err)
				}
				break
			}
			took = append(took, float64(time.Since(began))/float64(time.Microsecond))
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("round trip of %s: %w", t.addr, err)
	}
	return median(took), nil
}
