//go:build kernel

package eni

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

// The campaign breaks the network at random, by a seed. A small fixed part of it
// is in the kernel tier; make campaign-eni runs all of it, in episodes, and goes on
// where it was interrupted.
var (
	campaignFile   = flag.String("campaign", "", "file of results: run the whole campaign, but for the episodes that are in it")
	campaignSeed   = flag.Uint64("seed", 1, "of the first episode")
	campaignCommit = flag.String("commit", "", "what is tested")
)

// outcome is one line of the file of results: an episode that has passed.
type outcome struct {
	Part    string             `json:"part"`
	Seed    uint64             `json:"seed"`
	Commit  string             `json:"commit"`
	Date    string             `json:"date"`
	Figures map[string]float64 `json:"figures"`
}

// episode is one run of a part of the campaign, in a node of its own.
type episode struct {
	*testNode
	*rand.Rand
	steps   int
	figures map[string]float64
}

// episodes runs a part of the campaign: once with few steps, or as often as the
// whole campaign does, with many.
func episodes(t *testing.T, part string, few, many, times int, f func(e *episode)) {
	if *campaignFile == "" {
		times, many = 1, few
	}
	done := readOutcomes(t)
	for i := range times {
		seed := *campaignSeed + uint64(i)
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			if slices.ContainsFunc(done, func(o outcome) bool { return o.Part == part && o.Seed == seed && o.Commit == *campaignCommit }) {
				t.Logf("has passed before")
				return
			}
			inNode(t, func(t *testing.T, n *testNode) {
				e := &episode{testNode: n, Rand: rand.New(rand.NewPCG(seed, 0)), steps: many, figures: map[string]float64{"steps": float64(many)}}
				f(e)
				if !t.Failed() && *campaignFile != "" {
					writeOutcome(t, outcome{part, seed, *campaignCommit, time.Now().UTC().Format(time.DateOnly), e.figures})
				}
			})
		})
	}
}

func readOutcomes(t *testing.T) (all []outcome) {
	text, err := os.ReadFile(*campaignFile)
	if err != nil && *campaignFile != "" && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var o outcome
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			t.Fatalf("%s: %v", *campaignFile, err)
		}
		all = append(all, o)
	}
	return all
}

func writeOutcome(t *testing.T, o outcome) {
	line, err := json.Marshal(o)
	must(t, err)
	f, err := os.OpenFile(*campaignFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	must(t, err)
	_, err = f.Write(append(line, '\n'))
	must(t, err)
	must(t, f.Close())
}

// run runs the agent as it does on a node: the engine repairs what changes.
func (n *testNode) run() (stop func()) {
	board := reconcile.NewBoard()
	board.Set("test", node.ConfigSealed, node.True, "Sealed", "")
	engine := reconcile.New(n.net.log, board, n.net.Paths())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		engine.Run(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}

// await waits until ok, for longer than anything here takes.
func (n *testNode) await(what string, ok func() bool) time.Duration {
	n.t.Helper()
	began := time.Now()
	for !ok() {
		if time.Since(began) > 20*time.Second {
			n.t.Fatalf("%s: not within 20 s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return time.Since(began)
}

// answers reports whether the address answers a ping of the VPC.
func (n *testNode) answers(a netip.Addr) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	from := vpcPeer
	if a.Is6() {
		from = vpcPeer6
	}
	_, err := n.vpc.Ping(ctx, from, a)
	return err == nil
}

// manyAddrs gives the ENI so many addresses for pods, before it is attached.
func (n *testNode) manyAddrs(count int) {
	a := n.eni.Addrs[0]
	for len(n.eni.Addrs) < count+1 {
		if a = a.Next(); !slices.Contains(n.eni.Addrs, a) {
			n.eni.Addrs = append(n.eni.Addrs, a)
		}
	}
}

// del removes the pod's network.
func (p *pod) del() {
	p.t.Helper()
	_, err := p.plugin("DEL", nil)
	must(p.t, err)
}

// TestKernelCampaignModel makes random calls and compares the kernel with the plan
// after each, and the addresses with a model.
func TestKernelCampaignModel(t *testing.T) {
	episodes(t, "model", 40, 500, 20, func(e *episode) { e.model(false) })
}

// TestKernelCampaignModelDualStack does the same where pods have IPv6 addresses, too.
func TestKernelCampaignModelDualStack(t *testing.T) {
	episodes(t, "model, dual-stack", 20, 500, 10, func(e *episode) { e.model(true) })
}

func (e *episode) model(dual bool) {
	e.manyAddrs(300)
	if dual {
		e.dual()
	}
	e.attach("eth1")
	e.converge()
	defer e.serve()()
	before := e.kernelDump()
	m := model{episode: e, live: map[*pod]netip.Addr{}, rested: map[netip.Addr]time.Time{}}
	if dual {
		m.six = map[*pod]netip.Addr{}
	}
	for i := range e.steps {
		call := m.step()
		plan := e.plan()
		if strings.HasPrefix(plan.String(), "forget connections") && len(plan.Changes) == 1 { // addresses have rested
			must(e.t, e.net.Paths().Apply(e.t.Context(), plan))
			plan = e.plan()
		}
		if !plan.Empty() {
			e.t.Fatalf("step %d, plan after %s:\n%s", i, call, plan)
		}
		s, err := e.net.State()
		must(e.t, err)
		if len(s.Pods) != len(m.live) {
			e.t.Fatalf("step %d, %s: %d pods, the model has %d", i, call, len(s.Pods), len(m.live))
		}
	}
	for p := range m.live {
		p.del()
	}
	must(e.t, e.net.paths.reap())
	if after := e.kernelDump(); after != before {
		e.t.Errorf("after all DELs:\n%s\nbefore:\n%s", after, before)
	}
	if s, err := e.net.State(); err != nil || len(s.Pods) != 0 || len(s.ENIs[0].Addrs) != 300 {
		e.t.Errorf("%d pods, %d addresses at the end, error %v", len(s.Pods), len(s.ENIs[0].Addrs), err)
	}
	e.figures["pods"] = float64(m.made)
}

// model is what there must be.
type model struct {
	*episode
	live   map[*pod]netip.Addr
	six    map[*pod]netip.Addr      // nil: pods have none
	rested map[netip.Addr]time.Time // when its last pod was deleted
	made   int
}

// any returns a pod by chance.
func (m *model) any() *pod {
	all := make([]*pod, 0, len(m.live))
	for p := range m.live {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b *pod) int { return strings.Compare(a.name, b.name) })
	return all[m.IntN(len(all))]
}

// add adds a pod, once more or not, and checks its addresses.
func (m *model) add(p *pod) {
	old, again := m.live[p]
	var four, six netip.Addr
	if m.six == nil {
		four = p.add()
	} else if four, six = p.add6(); again && six != m.six[p] {
		m.t.Fatalf("repeated ADD of %s: %s, had %s", p.name, six, m.six[p])
	}
	if again && four != old {
		m.t.Fatalf("repeated ADD of %s: %s, had %s", p.name, four, old)
	}
	for other := range m.live {
		if other != p && (m.live[other] == four || six.IsValid() && m.six[other] == six) {
			m.t.Fatalf("%s and %s given to %s and one of them to %s", four, six, p.name, other.name)
		}
	}
	for _, a := range []netip.Addr{four, six} {
		if gone, ok := m.rested[a]; ok && !again && time.Since(gone) < coolDown-time.Second { // the ledger has whole seconds
			m.t.Fatalf("%s given %s after its last pod", a, time.Since(gone))
		}
	}
	if m.live[p] = four; six.IsValid() {
		m.six[p] = six
	}
}

func (m *model) step() string {
	const most = 30
	choice := m.IntN(100)
	switch {
	case len(m.live) == 0 || choice < 45 && len(m.live) < most:
		p := newPod(m.t, fmt.Sprintf("p%04d", m.made))
		m.made++
		m.add(p)
		return "ADD of " + p.name
	case choice < 55:
		p := m.any()
		m.add(p)
		return "repeated ADD of " + p.name
	case choice < 70:
		p := m.any()
		ips := []any{map[string]any{"address": m.live[p].String() + "/32"}}
		if six := m.six[p]; six.IsValid() {
			ips = append(ips, map[string]any{"address": six.String() + "/128"})
		}
		_, err := p.plugin("CHECK", map[string]any{"prevResult": map[string]any{"ips": ips}})
		must(m.t, err)
		return "CHECK of " + p.name
	case choice < 75:
		p := newPod(m.t, "stranger")
		p.del()
		return "DEL of an unknown pod"
	case choice < 78:
		return m.gc()
	case choice < 84: // the pod's namespace goes first, as when its node's memory ends
		p := m.any()
		path := p.path()
		must(m.t, p.ns.Close())
		m.gone(p)
		_, err := p.pluginAt("DEL", path, nil)
		must(m.t, err)
		return "DEL of " + p.name + " after its namespace"
	}
	p := m.any()
	p.del()
	m.gone(p)
	return "DEL of " + p.name
}

func (m *model) gone(p *pod) {
	for _, a := range []netip.Addr{m.live[p], m.six[p]} {
		if a.IsValid() {
			m.rested[a] = time.Now()
		}
	}
	delete(m.live, p)
	delete(m.six, p)
}

// gc keeps most of the pods.
func (m *model) gc() string {
	by, valid := m.any(), []cni.Attachment{}
	all := make([]*pod, 0, len(m.live))
	for p := range m.live {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b *pod) int { return strings.Compare(a.name, b.name) })
	for _, p := range all {
		if m.IntN(5) > 0 {
			valid = append(valid, keyOf(p.container()))
			continue
		}
		m.gone(p)
	}
	_, err := by.plugin("GC", map[string]any{"cni.dev/valid-attachments": valid})
	must(m.t, err)
	return fmt.Sprintf("GC that keeps %d", len(valid))
}

// TestKernelCampaignAdversary undoes what the paths have made, one thing after the
// other, while the agent runs: every pod is reached again.
func TestKernelCampaignAdversary(t *testing.T) {
	episodes(t, "adversary", 10, 100, 5, func(e *episode) { e.adversary(false) })
}

// TestKernelCampaignAdversaryDualStack does the same where pods have IPv6 addresses,
// too, and have to be reached by both.
func TestKernelCampaignAdversaryDualStack(t *testing.T) {
	episodes(t, "adversary, dual-stack", 10, 100, 5, func(e *episode) { e.adversary(true) })
}

func (e *episode) adversary(dual bool) {
	e.manyAddrs(20)
	if dual {
		e.dual()
	}
	e.attach("eth1")
	e.converge()
	defer e.serve()()
	defer e.run()()
	var four, six []netip.Addr
	var hosts []string
	for i := range 8 {
		p := newPod(e.t, fmt.Sprint("p", i))
		if dual {
			a4, a6 := p.add6()
			four, six = append(four, a4), append(six, a6)
		} else {
			four = append(four, p.add())
		}
		host, _, _ := vethOf(keyOf(p.container()))
		hosts = append(hosts, host)
	}
	lost := func(a netip.Addr) bool { return !e.answers(a) }
	reached := func() bool { return !slices.ContainsFunc(four, lost) && !slices.ContainsFunc(six, lost) }
	e.await("pods before anything is broken", reached)
	var took []float64
	worst := ""
	for range e.steps {
		act := e.act(hosts, four, six)
		sh(e.t, act)
		took = append(took, float64(e.await(act, reached).Microseconds())/1000)
		if took[len(took)-1] == slices.Max(took) {
			worst = act
		}
		e.await("an empty plan after "+act, func() bool {
			p, err := e.net.Paths().Plan(e.t.Context())
			return err == nil && p.Empty() // an error: what is listed is just being made anew
		})
	}
	slices.Sort(took)
	e.t.Logf("longest, %.0f ms: %s", took[len(took)-1], worst)
	e.figures["eni.repair.p50"] = took[len(took)/2]
	e.figures["eni.repair.p99"] = took[(len(took)*99+99)/100-1]
	e.figures["eni.repair.max"] = took[len(took)-1]
}

// act is something that an adversary does.
func (e *episode) act(hosts []string, addrs, six []netip.Addr) string {
	i := e.IntN(len(hosts))
	acts := []string{
		"ip rule del pref 512",
		"ip rule flush; ip rule add pref 32766 lookup main",
		"ip route flush table 4000",
		"ip route flush table 4001",
		"ip route flush table 4000; ip route flush table 4001; nft flush ruleset",
		"nft delete table inet " + nftTable,
		"nft flush ruleset",
		"nft flush map inet " + nftTable + " pods",
		"nft flush chain inet " + nftTable + " outside",
		"nft flush set inet " + nftTable + " inside",
		"sysctl -qw net.ipv4.conf." + hosts[i] + ".forwarding=0",
		"sysctl -qw net.ipv4.ip_forward=0",
		"sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1 net.ipv4.conf.eth1.rp_filter=1",
		"ip link set eth1 down",
		"ip addr flush dev eth1",
		"ip link set " + hosts[i] + " down",
		"ip link set " + hosts[i] + " address 02:00:00:00:00:99",
		"ip link del " + hosts[i],
		"ip route del " + addrs[i].String() + " table 4000",
		"ip route replace " + addrs[i].String() + " dev eth0 table 4000",
		"ip route replace default via 10.0.0.1 dev eth0 onlink table 4001",
	}
	if len(six) > 0 {
		acts = append(acts,
			"ip -6 rule del pref 512",
			"ip -6 rule flush; ip -6 rule add pref 32766 lookup main",
			"ip -6 route flush table 4000",
			"ip -6 route flush table 4001",
			"ip -6 route del "+six[i].String()+" table 4000",
			"ip -6 route replace unreachable "+six[i].String()+" table 4000",
			"ip -6 addr flush dev eth1",
			"ip -6 neigh flush nud permanent",
			"sysctl -qw net.ipv6.conf.all.forwarding=0",
			"sysctl -qw net.ipv6.conf.eth1.disable_ipv6=1",
			"sysctl -qw net.ipv6.conf."+hosts[i]+".disable_ipv6=1",
		)
	}
	return acts[e.IntN(len(acts))]
}

// TestKernelCampaignTornOut tears the ENI out under traffic. Nothing of the pods
// leaves by the primary ENI, and they are reached again on another device.
func TestKernelCampaignTornOut(t *testing.T) {
	episodes(t, "torn out", 2, 30, 1, func(e *episode) {
		e.manyAddrs(8)
		tap := e.plug(e.eni, "eth1")
		e.record()
		e.converge()
		defer e.serve()()
		defer e.run()()
		p := newPod(e.t, "web")
		addr := p.add()
		e.await("pod", func() bool { return e.answers(addr) })
		stop := p.send()
		defer stop()
		var back []float64
		for i := range e.steps {
			before := e.vpc.Counters()["eni-primary"]
			dev := fmt.Sprint("eth", i+1)
			must(e.t, e.vpc.Detach(e.eni.ENI))
			tap.Close()
			waitGone(e.t, dev)
			time.Sleep(time.Duration(e.IntN(300)) * time.Millisecond)
			tap = e.plug(e.eni, fmt.Sprint("eth", i+2))
			back = append(back, float64(e.await("pod on another device", func() bool { return e.answers(addr) }).Milliseconds()))
			if after := e.vpc.Counters()["eni-primary"]; after.Tx != before.Tx || fmt.Sprint(after.Drops) != fmt.Sprint(before.Drops) {
				e.t.Fatalf("round %d: packets left by the primary ENI: %+v, before %+v", i, after, before)
			}
		}
		slices.Sort(back)
		e.figures["back p50 ms"], e.figures["back max ms"] = back[len(back)/2], back[len(back)-1]
		e.noWrongFrames()
	})
}

// send sends datagrams to the VPC until stop is called, whatever becomes of them.
func (p *pod) send() (stop func()) {
	var conn net.Conn
	must(p.t, p.enter(func() (err error) {
		conn, err = net.Dial("udp", net.JoinHostPort(vpcPeer.String(), "9"))
		return err
	}))
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-quit:
				return
			case <-time.After(500 * time.Microsecond):
				conn.Write([]byte("x")) // unreachable, while the ENI is gone
			}
		}
	}()
	return func() {
		close(quit)
		<-done
		conn.Close()
	}
}
