// Package agent is the composition root of the daemon: what runs, in which
// order, and who is told of whom is written here, by hand, on one page.
//
// It decides nothing itself. It does not import bootstrap: what containerd,
// kubelet and the others are told comes in as a function.
package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/kube"
	"github.com/tkenode/tkenode/agent/metrics"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/agent/unit"
)

// Options say what the agent works with.
type Options struct {
	Version string
	Log     *slog.Logger
	// Console gets a line for every transition of a condition.
	Console io.Writer
	// Files renders what the units of the node read.
	Files func(node.Config, node.Facts) ([]node.File, error)
}

const (
	stateDir  = "/var/lib/tkenode"
	imagesDir = "/usr/lib/tkenode/images" // what the node image carries
	seedFile  = "/usr/lib/tkenode/seed.tar"
	runDir    = "/run/tkenode/disk" // what is known of disks in this boot
	// registerPatience is how long kube-proxy and CoreDNS make way for kubelet.
	registerPatience = 20 * time.Second
)

// Agent is the daemon between New and the end of Run.
type Agent struct {
	options Options
	log     *slog.Logger
	board   *reconcile.Board
	socket  string // api.Socket
	ledger  ledger
	sealed  atomic.Pointer[node.Sealed]
	engine  atomic.Pointer[reconcile.Engine] // nil until a configuration is sealed
	network atomic.Pointer[eni.Network]      // as engine
	disks   atomic.Pointer[[]*disk.Disk]     // as engine
	others  atomic.Pointer[disk.Others]      // as engine
	volumes atomic.Pointer[kube.CSINode]     // as engine
}

// Run serves the socket at once, waits for a sealed configuration, and then keeps
// the node as that configuration wants it, until ctx ends. Ending takes nothing
// down: the node goes on without the agent.
func Run(ctx context.Context, o Options) error {
	a := &Agent{options: o, log: o.Log, board: reconcile.NewBoard(), socket: api.Socket}
	cni, err := cniListener()
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	failed := make(chan error, 4) // one for each of what must not end by itself
	spawn := func(name string, f func(context.Context) error) {
		wg.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				failed <- fmt.Errorf("%s: %w", name, err)
			}
		})
	}
	collector := metrics.New(o.Log.With("module", "metrics"), a.board.Conditions)
	spawn("socket", func(ctx context.Context) error {
		return api.New(o.Log.With("module", "api"), a.source(collector)).Run(ctx, a.socket)
	})
	spawn("conditions", a.tell)
	spawn("watchdog", a.watchdog)
	spawn("node", func(ctx context.Context) error {
		s, err := a.waitSealed(ctx, filepath.Join(stateDir, "config"))
		if err != nil {
			return err
		}
		return a.keep(ctx, s, cni, collector)
	})
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		stop()
		return err
	}
}

// keep runs every module for the sealed configuration.
func (a *Agent) keep(ctx context.Context, s node.Sealed, cni net.Listener, collector *metrics.Collector) error {
	w, err := a.assemble(s)
	if err != nil {
		// Starting again would lead here again: say so for as long as it takes.
		a.board.Set("bootstrap", node.ConfigSealed, node.False, node.ReasonOf(err, "Unusable"),
			fmt.Sprintf("generation %d is sealed, but this agent cannot work with it: %v; install the version of tkenode that sealed it, or launch the instance anew", s.Generation, err))
		<-ctx.Done()
		return nil
	}
	defer w.close()
	if len(s.Config.Disks) == 0 {
		a.board.Set("config", node.DisksReady, node.True, "NoneWanted", "the NodeConfig lists no disks")
	}
	if !s.Config.KubeProxy.Enabled {
		a.board.Set("config", node.ServicesReady, node.True, "NotWanted", "the NodeConfig leaves kube-proxy to the cluster")
	}
	if !s.Config.CoreDNS.Enabled {
		a.board.Set("config", node.DNSReady, node.True, "NotWanted", "the NodeConfig leaves CoreDNS to the cluster")
	}
	engine := reconcile.New(a.log, a.board, w.modules...)
	a.engine.Store(engine)
	a.network.Store(w.network)
	a.disks.Store(&w.disks)
	a.others.Store(w.others)
	a.volumes.Store(w.volumes)

	// Serve ends by itself when it fails: the others have to end with it.
	ctx, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() { engine.Run(ctx) })
	wg.Go(func() { w.bus.Run(ctx) })
	wg.Go(func() { collector.Push(ctx, s) })
	wg.Go(func() { w.others.Run(ctx) })
	wg.Go(func() { w.volumes.Run(ctx) })
	for _, d := range w.disks {
		wg.Go(func() { d.Tend(ctx) })
	}
	return w.network.Serve(ctx, cni)
}

// works is what keeps a node of one sealed configuration.
type works struct {
	modules []reconcile.Module
	network *eni.Network
	bus     *unit.Systemd
	disks   []*disk.Disk
	others  *disk.Others  // attached, and not of the NodeConfig
	volumes *kube.CSINode // how many the CSI driver may attach
	close   func()
}

// assemble makes every module. It touches neither the node nor the network, so
// an error of it is for good.
func (a *Agent) assemble(s node.Sealed) (*works, error) {
	log := func(module string) *slog.Logger { return a.log.With("module", module) }
	files, err := a.options.Files(s.Config, s.Facts)
	if err != nil {
		return nil, fmt.Errorf("render files: %w", err)
	}
	cloud, err := tencent.NewClient(s.Config.Cloud, s.Facts.Region, tencent.NewMetadata(""))
	if err != nil {
		return nil, fmt.Errorf("reach cloud API: %w", err)
	}
	apiServer, err := kube.New(s.Config.Cluster.Endpoint, []byte(s.Config.Cluster.CertificateAuthority), node.ClientCertPath)
	if err != nil {
		return nil, fmt.Errorf("reach API server: %w", err)
	}
	containerd, err := unit.NewRuntime()
	if err != nil {
		return nil, fmt.Errorf("reach containerd: %w", err)
	}
	bus := unit.NewSystemd(log("unit"))
	network := eni.New(eni.Options{Sealed: a.currentSealed, Cloud: cloud, Sandboxes: containerd.Sandboxes, Log: log("eni")})
	name := s.Config.Name(s.Facts)
	ready := kube.NewReady(apiServer, name)

	var modules []reconcile.Module
	var disks []*disk.Disk
	options := disk.Options{
		Sealed: s, FirstBoot: sealedNow(s, node.ReportFile), Cloud: cloud, Ledger: filepath.Join(stateDir, "disk"),
		Run: runDir, Systemd: bus, Tell: a.tellNode, Log: log("disk"),
	}
	for _, options.Want = range s.Config.Disks {
		disks = append(disks, disk.New(options))
		modules = append(modules, disks[len(disks)-1])
	}
	for _, d := range disk.Detached(options) {
		modules = append(modules, d)
	}
	modules = append(modules,
		unit.Containerd(files, bus, containerd, seedFile),
		unit.NewImages(imagesDir, bus, containerd),
		network.Pool(),
		network.Paths(),
		kube.NewJoin(name),
		unit.Kubelet(files, bus),
		ready,
		kube.NewConditions(ready, func() kube.Wanted { return wanted(disks) }),
	)
	hold := unregistered(ready, registerPatience)
	if s.Config.KubeProxy.Enabled {
		modules = append(modules, unit.KubeProxy(files, bus, hold))
	}
	if s.Config.CoreDNS.Enabled {
		modules = append(modules, unit.CoreDNS(files, bus, s.Config.LocalDNS(), s.Config.Cluster.Domain, hold))
	}
	others := disk.NewOthers(a.diskStates, log("disk"))
	volumes := kube.NewCSINode(apiServer, name, disk.CSIDriver, func(ctx context.Context) (int, error) {
		n, err := cloud.CountDisks(ctx, s.Facts.InstanceID)
		return n.Max, err
	}, func(volumes []string) ([]string, <-chan struct{}, bool) {
		all, changed, known := others.All()
		return disk.NotCSI(a.diskStates(), all, volumes), changed, known
	}, log("volumes"))
	return &works{modules, network, bus, disks, others, volumes, func() {
		apiServer.Close()
		containerd.Close()
		bus.Close()
		network.Close()
		for _, d := range disks {
			d.Close()
		}
	}}, nil
}

// unregistered reports whether kubelet has yet to register the Node, for which others
// make way: kubelet that has to share the processors with them while it starts asks for
// its CSINode too early, and then waits for up to 19 s. It is waited for no longer than
// patience, from the first time that somebody asks: a node whose API server is away may
// still resolve names.
func unregistered(ready *kube.Ready, patience time.Duration) func() bool {
	var first sync.Once
	var until time.Time
	return func() bool {
		first.Do(func() { until = time.Now().Add(patience) })
		return !ready.Registered() && time.Now().Before(until)
	}
}
