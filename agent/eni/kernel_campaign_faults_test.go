//go:build kernel

package eni

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
)

// TestKernelCampaignChurn makes 30 ADDs at once while links come and go.
func TestKernelCampaignChurn(t *testing.T) {
	episodes(t, "churn", 1, 20, 1, func(e *episode) {
		const at = 30
		e.manyAddrs(at*e.steps + 1)
		e.attach("eth1")
		e.converge()
		defer e.serve()()
		defer e.run()()
		quit, done := make(chan struct{}), make(chan int)
		go func() {
			rounds := 0
			defer func() { done <- rounds }()
			for {
				select {
				case <-quit:
					return
				default:
				}
				// Errors do not matter: a command that was too late has nothing to delete.
				exec.Command("sh", "-c", "ip link add churn0 type veth peer name churn1; ip link set churn0 up; ip link del churn0; ip link add eni-churn type bridge; ip link del eni-churn").Run()
				rounds++
			}
		}()
		var last []float64
		for round := range e.steps {
			pods := make([]*pod, at)
			for i := range pods {
				pods[i] = newPod(e.t, fmt.Sprintf("p%d-%d", round, i))
			}
			errs := make([]error, at)
			var calls sync.WaitGroup
			began := time.Now()
			for i, p := range pods {
				calls.Go(func() { _, errs[i] = p.plugin("ADD", nil) })
			}
			calls.Wait()
			last = append(last, float64(time.Since(began).Milliseconds()))
			for i, err := range errs {
				if err != nil {
					e.t.Errorf("round %d: ADD %d: %v", round, i, err)
				}
			}
			for _, p := range pods {
				p.del()
			}
		}
		close(quit)
		e.figures["links made meanwhile"] = float64(2 * <-done)
		e.figures["ADDs"], e.figures["last round ms"] = float64(at*e.steps), last[len(last)-1]
		e.await("an empty plan", func() bool { return e.plan().Empty() })
	})
}

// TestKernelCampaignJournal damages the journal under running pods: one bit, or its
// end, or all of it. The pods stay reached, and no address is given twice.
func TestKernelCampaignJournal(t *testing.T) {
	episodes(t, "journal", 6, 300, 1, func(e *episode) {
		e.manyAddrs(12)
		e.attach("eth1")
		e.converge()
		stop := e.serve()
		held := map[netip.Addr]*pod{}
		for i := range 3 {
			p := newPod(e.t, fmt.Sprint("p", i))
			held[p.add()] = p
		}
		stop()
		path := filepath.Join(e.dir, "ledger")
		whole, err := os.ReadFile(path)
		must(e.t, err)
		rebuilt := 0
		for i := range e.steps {
			must(e.t, e.net.Close())
			what, text := e.damage(whole)
			must(e.t, os.WriteFile(path, text, 0o600))
			if text == nil {
				must(e.t, os.Remove(path))
			}
			e.start()
			s, err := e.net.ledger.state()
			must(e.t, err)
			if s.Settled.After(time.Now()) {
				rebuilt++
				if n, err := e.net.Paths().Plan(e.t.Context()); !s.Slots[0].taken() && (!n.Empty() || node.ReasonOf(err, "") != "ENIUnknown") {
					e.t.Fatalf("step %d, %s: plan before the cloud has said anything: %v\n%s", i, what, err, n)
				}
				e.record() // as the pool does when it finds the ENI by its tags
			}
			if plan := e.converge(); plan != "" {
				e.t.Fatalf("step %d, %s: plan:\n%s", i, what, plan)
			}
			for a, p := range held {
				if !e.answers(a) {
					e.t.Fatalf("step %d, %s: pod %s does not answer", i, what, p.name)
				}
			}
			e.drained(held, fmt.Sprintf("step %d, %s", i, what))
		}
		e.figures["rebuilt"] = float64(rebuilt)
	})
}

// drained takes all the addresses there are, when all have rested.
func (e *episode) drained(held map[netip.Addr]*pod, what string) {
	later := time.Now().Add(2 * coolDown)
	unclean, _ := e.net.ledger.unclean(later)
	e.net.ledger.cleaned(unclean)
	for i := 0; ; i++ {
		p, _, err := e.net.ledger.allocate(Pod{Attachment: keyOf(fmt.Sprint("more", i))}, map[int]int{0: 1500}, later)
		must(e.t, err)
		if !p.Addr.IsValid() {
			if i == 0 {
				e.t.Fatalf("%s: there is no address", what)
			}
			return
		}
		if held[p.Addr] != nil {
			e.t.Fatalf("%s: %s is given to a second pod", what, p.Addr)
		}
	}
}

// damage returns a journal that is not as it was written.
func (e *episode) damage(whole []byte) (string, []byte) {
	text := append([]byte{}, whole...)
	switch e.IntN(8) {
	case 0:
		return "missing", nil
	case 1, 2:
		at := e.IntN(len(text))
		return fmt.Sprintf("cut at %d", at), text[:at]
	}
	at, bit := e.IntN(len(text)), e.IntN(8)
	text[at] ^= 1 << bit
	return fmt.Sprintf("bit %d of byte %d", bit, at), text
}

// TestKernelCampaignFullDisk fills the disk of the ledger. ADDs are refused and say
// why, DELs are repeated by the runtime, and nothing is lost when there is room.
func TestKernelCampaignFullDisk(t *testing.T) {
	episodes(t, "full disk", 2, 30, 1, func(e *episode) {
		e.manyAddrs(25 * e.steps) // none is used twice, as all rest
		must(e.t, e.net.Close())
		must(e.t, unix.Mount("tmpfs", e.dir, "tmpfs", 0, "size=256k"))
		e.start()
		e.attach("eth1")
		e.converge()
		defer func() { must(e.t, unix.Unmount(e.dir, unix.MNT_DETACH)) }()
		stop := e.serve()
		defer func() { stop() }()
		live := map[netip.Addr]*pod{}
		add := func(name string) error {
			p := newPod(e.t, name)
			result, err := p.plugin("ADD", nil)
			if err != nil {
				return err
			}
			a := netip.MustParsePrefix(result["ips"].([]any)[0].(map[string]any)["address"].(string)).Addr()
			if live[a] != nil {
				e.t.Fatalf("%s given to %s and to %s", a, live[a].name, name)
			}
			live[a] = p
			return nil
		}
		refused := 0
		for i := range e.steps {
			must(e.t, add(fmt.Sprint("before", i)))
			e.fill(filepath.Join(e.dir, "filler"))
			for j := range 23 { // what is left of the journal's last page is used up first
				if err := add(fmt.Sprintf("full%d-%d", i, j)); err != nil {
					if !strings.Contains(err.Error(), "no space left on device") {
						e.t.Fatal(err)
					}
					refused++
					break
				}
			}
			must(e.t, os.Remove(filepath.Join(e.dir, "filler")))
			must(e.t, add(fmt.Sprint("after", i)))
			stop()
			e.restart()
			e.converge()
			s, err := e.net.State()
			must(e.t, err)
			if len(s.Pods) != len(live) {
				e.t.Fatalf("round %d: %d pods in the ledger, %d have been added", i, len(s.Pods), len(live))
			}
			stop = e.serve()
			for a, p := range live {
				p.del()
				delete(live, a)
			}
		}
		if refused == 0 {
			e.t.Error("nothing was refused: the disk was not full")
		}
		e.figures["ADDs refused"] = float64(refused)
	})
}

// fill writes until the disk is full.
func (e *episode) fill(path string) {
	f, err := os.Create(path)
	must(e.t, err)
	defer f.Close()
	for block := make([]byte, 4096); len(block) > 0; {
		if _, err := f.Write(block); err != nil {
			return
		}
	}
}

// TestKernelCampaignRestart restarts the agent under load, again and again, with
// the socket held as systemd holds it: no packet is lost, no connection ends, and
// an ADD that finds no agent waits.
func TestKernelCampaignRestart(t *testing.T) {
	episodes(t, "restart", 3, 60, 1, func(e *episode) {
		e.manyAddrs(e.steps + 8)
		e.attach("eth1")
		e.converge()
		held, err := net.ListenUnix("unix", &net.UnixAddr{Name: cni.Socket})
		must(e.t, err)
		defer held.Close()
		begin := func() func() {
			stopServing, stopRunning := e.serveOn(held), e.run()
			return func() { stopServing(); stopRunning() }
		}
		stop := begin()
		defer func() { stop() }()
		web := newPod(e.t, "web")
		addr := web.add()
		e.await("pod", func() bool { return e.answers(addr) })
		load := e.load(web, addr)
		for i := range e.steps {
			added := make(chan error)
			p := newPod(e.t, fmt.Sprint("p", i))
			go func() {
				_, err := p.plugin("ADD", nil)
				added <- err
			}()
			time.Sleep(time.Duration(e.IntN(20)) * time.Millisecond) // before, amid or after the call
			stop()
			e.restart()
			stop = begin()
			if err := <-added; err != nil {
				e.t.Fatalf("ADD across restart %d: %v", i, err)
			}
			p.del()
		}
		e.await("an empty plan", func() bool { return e.plan().Empty() })
		e.figures["pings"], e.figures["lost"], e.figures["bytes over one connection"] = load()
		if e.figures["lost"] != 0 {
			e.t.Errorf("%v of %v pings lost", e.figures["lost"], e.figures["pings"])
		}
		e.noWrongFrames()
	})
}

// serveOn answers the plugin on a socket that is held meanwhile.
func (n *testNode) serveOn(held *net.UnixListener) (stop func()) {
	f, err := held.File()
	must(n.t, err)
	l, err := net.FileListener(f)
	must(n.t, err)
	must(n.t, f.Close())
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	network := n.net
	go func() { done <- network.Serve(ctx, l) }()
	return func() {
		cancel()
		must(n.t, <-done)
	}
}

// load pings the pod and echoes over one TCP connection until it is called; then
// it returns how much there was, and fails where the connection has ended.
func (n *testNode) load(p *pod, addr netip.Addr) func() (pings, lost, echoed float64) {
	must(n.t, p.enter(func() error {
		l, err := net.Listen("tcp", ":7")
		if err != nil {
			return err
		}
		go func() {
			c, err := l.Accept()
			l.Close()
			if err == nil {
				io.Copy(c, c)
				c.Close()
			}
		}()
		return nil
	}))
	conn, err := n.vpc.DialContext(n.t.Context(), vpcPeer, "tcp", net.JoinHostPort(addr.String(), "7"))
	must(n.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	var pings, lost, echoed atomic.Int64
	running.Go(func() {
		for ctx.Err() == nil {
			pctx, cancel := context.WithTimeout(context.Background(), time.Second)
			if _, err := n.vpc.Ping(pctx, vpcPeer, addr); err != nil {
				lost.Add(1)
			}
			cancel()
			pings.Add(1)
			time.Sleep(time.Millisecond)
		}
	})
	var broken error
	running.Go(func() {
		b := make([]byte, 1024)
		for ctx.Err() == nil && broken == nil {
			conn.SetDeadline(time.Now().Add(5 * time.Second))
			if _, broken = conn.Write(b); broken == nil {
				_, broken = io.ReadFull(conn, b)
			}
			echoed.Add(int64(len(b)))
			time.Sleep(time.Millisecond)
		}
	})
	return func() (float64, float64, float64) {
		cancel()
		running.Wait()
		if broken != nil {
			n.t.Errorf("the pod's connection has ended: %v", broken)
		}
		conn.Close()
		return float64(pings.Load()), float64(lost.Load()), float64(echoed.Load())
	}
}
