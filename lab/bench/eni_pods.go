package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	fewPods, manyPods = 60, 500
	burst             = 30
	bursts            = 5
	warmup            = 5 // pairs that nobody counts
	callLimit         = time.Minute
	goneLimit         = 10 * time.Second
)

// namespace is a network namespace; nil is the node's own.
type namespace struct{ *os.File }

// newNamespaces makes network namespaces; they go when they are closed.
func newNamespaces(count int) ([]*namespace, error) {
	all := make([]*namespace, 0, count)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		for range count {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				done <- fmt.Errorf("make network namespace: %w", err)
				return
			}
			f, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				done <- err
				return
			}
			all = append(all, &namespace{f})
		}
		done <- nil
	}()
	return all, <-done
}

// enter runs f on a thread in the namespace.
func (ns *namespace) enter(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		var err error
		if ns != nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// path of the namespace, in this process.
func (ns *namespace) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd()) }

// side is one of the two plugins that are compared, and its node.
type side struct {
	name   string
	node   *namespace
	plugin string
	path   string // CNI_PATH
	config []byte
	nl     *netlink.Handle // in node
	pods   int             // that have been made
}

// benchPod is a pod of one side.
type benchPod struct {
	container string
	ns        *namespace
	host      string // the host's end of its veth
}

func (s *side) newPod(ns *namespace) *benchPod {
	s.pods++
	return &benchPod{container: fmt.Sprintf("%s-%d", s.name, s.pods), ns: ns}
}

// call runs the plugin as a container runtime does, and returns how long that took.
func (s *side) call(ctx context.Context, command string, p *benchPod) (out []byte, took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.plugin)
	cmd.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + p.container, "CNI_IFNAME=eth0", "CNI_NETNS=" + p.ns.path(), "CNI_PATH=" + s.path,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + p.container,
	}
	cmd.Stdin = bytes.NewReader(s.config)
	err = s.node.enter(func() (err error) {
		began := time.Now()
		out, err = cmd.Output()
		took = time.Since(began)
		return err
	})
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %s of %s: %w: %s", s.name, command, p.container, err, bytes.TrimSpace(out))
	}
	return out, took, nil
}

// add returns how many milliseconds an ADD takes.
func (s *side) add(ctx context.Context, p *benchPod) (float64, error) {
	out, took, err := s.call(ctx, "ADD", p)
	if err != nil {
		return 0, err
	}
	var result struct {
		Interfaces []struct{ Name, Sandbox string }
	}
	if err := json.Unmarshal(out, &result); err != nil {
		return 0, fmt.Errorf("%s: decode result: %w", s.name, err)
	}
	for _, i := range result.Interfaces {
		if i.Sandbox == "" {
			p.host = i.Name
		}
	}
	return milliseconds(took), nil
}

// del returns how many milliseconds a DEL takes, and how many until the link is
// gone, too.
func (s *side) del(ctx context.Context, p *benchPod) (took, gone float64, err error) {
	began := time.Now()
	_, answered, err := s.call(ctx, "DEL", p)
	if err != nil {
		return 0, 0, err
	}
	waited := time.Now()
	for {
		_, err := s.nl.LinkByName(p.host)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return milliseconds(answered), milliseconds(answered + time.Since(waited)), nil
		}
		if err != nil || time.Since(began) > goneLimit {
			return 0, 0, fmt.Errorf("%s: link %s stays after DEL: %w", s.name, p.host, err)
		}
		time.Sleep(200 * time.Microsecond)
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// ourSide is the plugin that is shipped, in the node of this process.
func (n *eniNode) ourSide() (*side, error) {
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	return &side{name: "ours", plugin: n.o.Plugin, config: []byte(`{"cniVersion":"1.0.0","name":"tke-eni","type":"tke-eni"}`), nl: nl}, err
}

// peerSide is ptp with host-local, in a node of its own. It keeps its addresses
// on the same disk as our ledger is on.
func (n *eniNode) peerSide() (*side, error) {
	made, err := newNamespaces(1)
	if err != nil {
		return nil, err
	}
	if err := made[0].enter(func() error { return setUp("lo") }); err != nil {
		return nil, err
	}
	config, err := json.Marshal(map[string]any{
		"cniVersion": "1.0.0", "name": "peer", "type": "ptp", "mtu": 1500,
		"ipam": map[string]any{
			"type": "host-local", "dataDir": filepath.Join(n.o.Dir, "host-local"),
			"ranges": [][]map[string]string{{{"subnet": podCIDR.String()}}}, "routes": []map[string]string{{"dst": "0.0.0.0/0"}},
		},
	})
	if err != nil {
		return nil, err
	}
	nl, err := netlink.NewHandleAt(netns.NsHandle(made[0].Fd()), unix.NETLINK_ROUTE)
	return &side{name: "peer", node: made[0], plugin: filepath.Join(n.o.Peer, "ptp"), path: n.o.Peer, config: config, nl: nl}, err
}

// pairOf makes ours and the peer do the same, in turns.
func pairOf(turn int, ours, peer func() error) error {
	sides := []func() error{ours, peer}
	if err := sides[turn%2](); err != nil {
		return err
	}
	return sides[1-turn%2]()
}

// podsStage measures ADD and DEL.
type podsStage struct {
	*eniNode
	ours, peer *side
}

// measurePods measures ADD and DEL while the number of pods grows.
func measurePods(ctx context.Context, n *eniNode) (err error) {
	if err := n.startAttached(ctx, manyPods+2*(n.o.Runs+warmup)+burst*bursts); err != nil {
		return err
	}
	s := podsStage{eniNode: n}
	if s.ours, err = n.ourSide(); err != nil {
		return err
	}
	if s.peer, err = n.peerSide(); err != nil {
		return err
	}
	// All namespaces are made now, so that what the heap grows by is the agent's.
	spare, err := newNamespaces(2 * (manyPods + burst + 1))
	if err != nil {
		return err
	}
	stay, bursting, cycling := spare[:2*manyPods], spare[2*manyPods:2*(manyPods+burst)], spare[2*(manyPods+burst):]
	before := heap()
	if err := s.grow(ctx, stay[:2*fewPods]); err != nil {
		return err
	}
	if err := s.cycles(ctx, fewPods, cycling); err != nil {
		return err
	}
	if err := s.burst(ctx, bursting); err != nil {
		return err
	}
	if err := s.grow(ctx, stay[2*fewPods:]); err != nil {
		return err
	}
	n.figure(Figure{Name: "eni.agent.memory.100pods", Unit: "KiB", Ours: round((heap() - before) / 1024 * 100 / manyPods)})
	if err := s.cycles(ctx, manyPods, cycling); err != nil {
		return err
	}
	runtime.KeepAlive(spare)
	return nil
}

// heap returns how many bytes are in use.
func heap() float64 {
	runtime.GC()
	runtime.GC() // what had a finalizer or was in a pool
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// grow adds a pod to each side, in turns.
func (s *podsStage) grow(ctx context.Context, spare []*namespace) error {
	for i := 0; i < len(spare); i += 2 {
		err := pairOf(i/2,
			func() error { _, err := s.ours.add(ctx, s.ours.newPod(spare[i])); return err },
			func() error { _, err := s.peer.add(ctx, s.peer.newPod(spare[i+1])); return err })
		if err != nil {
			return err
		}
	}
	return nil
}

// cycles measures ADD and DEL of one more pod than there are.
func (s *podsStage) cycles(ctx context.Context, pods int, spare []*namespace) error {
	var add, del, gone []Pair
	for i := range warmup + s.o.Runs {
		var a, d, g Pair
		cycle := func(side *side, ns *namespace, add, del, gone *float64) (err error) {
			p := side.newPod(ns)
			if *add, err = side.add(ctx, p); err != nil {
				return err
			}
			*del, *gone, err = side.del(ctx, p)
			return err
		}
		err := pairOf(i,
			func() error { return cycle(s.ours, spare[0], &a.Ours, &d.Ours, &g.Ours) },
			func() error { return cycle(s.peer, spare[1], &a.Peer, &d.Peer, &g.Peer) })
		if err != nil {
			return err
		}
		if i >= warmup {
			add, del, gone = append(add, a), append(del, d), append(gone, g)
		}
	}
	for _, c := range []struct {
		name  string
		pairs []Pair
	}{{"eni.add", add}, {"eni.del", del}, {"eni.del.gone", gone}} {
		s.figure(compare(fmt.Sprintf("%s.p50.%dpods", c.name, pods), "ms", ENIPeer, c.pairs))
		s.figure(comparePercentile(fmt.Sprintf("%s.p99.%dpods", c.name, pods), "ms", ENIPeer, c.pairs, 99))
	}
	a, d := compare("", "", "", add), compare("", "", "", del)
	s.say("%d pods: ADD %.1f ms, %s %.1f ms, ratio %.2f; DEL %.1f ms, %.1f ms, ratio %.2f",
		pods, a.Ours, ENIPeer, a.Peer, a.Ratio, d.Ours, d.Peer, d.Ratio)
	return nil
}

// burst measures ADDs at once, until the last has ended.
func (s *podsStage) burst(ctx context.Context, spare []*namespace) error {
	var pairs []Pair
	for turn := range bursts {
		var p Pair
		err := pairOf(turn,
			func() (err error) { p.Ours, err = s.ours.burst(ctx, spare[:burst]); return },
			func() (err error) { p.Peer, err = s.peer.burst(ctx, spare[burst:]); return })
		if err != nil {
			return err
		}
		pairs = append(pairs, p)
	}
	s.figure(compare("eni.add.burst30", "ms", ENIPeer, pairs))
	return nil
}

// burst adds a pod in each of the namespaces, at once, and deletes them one by one.
func (s *side) burst(ctx context.Context, spare []*namespace) (float64, error) {
	pods := make([]*benchPod, len(spare))
	for i := range spare {
		pods[i] = s.newPod(spare[i])
	}
	errs := make([]error, len(pods))
	var calls sync.WaitGroup
	began := time.Now()
	for i, p := range pods {
		calls.Go(func() { _, errs[i] = s.add(ctx, p) })
	}
	calls.Wait()
	took := milliseconds(time.Since(began))
	for _, p := range pods {
		if p.host != "" {
			_, _, err := s.del(ctx, p)
			errs = append(errs, err)
		}
	}
	return took, errors.Join(errs...)
}
