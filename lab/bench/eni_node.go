package bench

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/vpc"
)

// eniNode is the node of one stage: the network namespace of this process. The
// agent's side is what the agent itself is made of: the network, the engine that
// runs its modules, and the CNI socket.
type eniNode struct {
	reporter
	o   ENIOptions
	log *slog.Logger

	facts   node.Facts
	network *eni.Network
	stop    context.CancelFunc
	running sync.WaitGroup
	closers []func() error
}

var (
	vpcCIDR = netip.MustParsePrefix("10.0.0.0/16")
	podCIDR = cloud.Default().Subnets[1].CIDR
)

const primaryMAC = "52:54:00:00:00:01"

// newENINode makes a node whose agent does not run yet.
func newENINode(o ENIOptions, out *json.Encoder) (*eniNode, error) {
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""),
		unix.Mount("proc", "/proc", "proc", 0, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, ""),
		unix.Mount("tmpfs", "/var/lib", "tmpfs", 0, ""), // where the plugin queues a DEL
		os.MkdirAll(filepath.Dir(cni.Socket), 0o755),
	); err != nil {
		return nil, fmt.Errorf("make node: %w", err)
	}
	logTo, err := os.Create(filepath.Join(o.Dir, "log"))
	if err != nil {
		return nil, err
	}
	n := &eniNode{o: o, reporter: reporter{out}, log: slog.New(slog.NewTextHandler(logTo, nil)), closers: []func() error{logTo.Close}}
	n.facts = node.Facts{InstanceID: "ins-00000001", MAC: primaryMAC, PrivateIP: netip.MustParseAddr("10.0.0.30"), VPCID: cloud.Default().VPCID}
	return n, setUp("lo")
}

// start starts the agent's side, and waits until it serves.
func (n *eniNode) start(ctx context.Context, api eni.Cloud, config node.NetworkConfig) error {
	sealed := node.Sealed{Facts: n.facts}
	sealed.Config.Cluster.ID = cluster
	sealed.Config.Network = config
	n.network = eni.New(eni.Options{
		Sealed: func() (node.Sealed, bool) { return sealed, true }, Cloud: api, Log: n.log,
		Dir: filepath.Join(n.o.Dir, "ledger"), Conflist: filepath.Join(n.o.Dir, "net.d/10-tke-eni.conflist"),
	})
	n.closers = append(n.closers, n.network.Close)
	l, err := net.Listen("unix", cni.Socket)
	if err != nil {
		return err
	}
	board := reconcile.NewBoard()
	board.Set("bench", node.ConfigSealed, node.True, "Sealed", "")
	engine := reconcile.New(n.log, board, n.network.Pool(), n.network.Paths())
	ctx, n.stop = context.WithCancel(ctx)
	n.running.Go(func() { engine.Run(ctx) })
	n.running.Go(func() {
		if err := n.network.Serve(ctx, l); err != nil {
			n.log.Error("serve CNI", "err", err)
		}
	})
	for {
		if _, err := os.Stat(cni.ConfiguredFile); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (n *eniNode) close() error {
	if n.stop != nil {
		n.stop()
	}
	n.running.Wait()
	var errs []error
	for i := range n.closers {
		errs = append(errs, n.closers[len(n.closers)-1-i]())
	}
	return errors.Join(errs...)
}

const cluster = "cls-lab00001"

// attached is a cloud in which ENIs are attached already, each with more addresses
// than any instance type has: it lets hundreds of pods be on a node. There is
// nothing left to be asked of it.
type attached struct {
	eni.Cloud
	enis []tencent.ENI
}

// newAttached returns so many ENIs with so many addresses for pods.
func newAttached(facts node.Facts, enis, each int) attached {
	addr := podCIDR.Addr().Next().Next() // after the gateway
	var c attached
	for slot := range enis {
		e := tencent.ENI{
			ID: fmt.Sprintf("eni-bench%03d", slot), SubnetID: cloud.Default().Subnets[1].ID, VPCID: facts.VPCID,
			MAC: fmt.Sprintf("52:54:00:00:01:%02x", slot), State: tencent.StateAvailable,
			Attachment: &tencent.Attachment{InstanceID: facts.InstanceID, DeviceIndex: slot + 1},
		}
		for i := range each + 1 {
			e.IPs = append(e.IPs, tencent.IP{Addr: addr, Primary: i == 0, State: tencent.StateAvailable})
			addr = addr.Next()
		}
		c.enis = append(c.enis, e)
	}
	return c
}

// config is what the NodeConfig of such a node says: somebody else attaches ENIs.
func (c attached) config() node.NetworkConfig {
	return node.NetworkConfig{Allocator: node.AllocatorObserve, NonMasqueradeCIDRs: []netip.Prefix{vpcCIDR}, Layout: node.LayoutMark}
}

func (c attached) DescribeENIs(context.Context, string) ([]tencent.ENI, error) { return c.enis, nil }

func (c attached) DescribeSubnets(context.Context, []string) ([]tencent.Subnet, error) {
	return []tencent.Subnet{{ID: cloud.Default().Subnets[1].ID, CIDR: podCIDR}}, nil
}

// fabric is the VPC of the lab. The ENIs of the node are taps in it.
type fabric struct {
	*vpc.Network
	mu    sync.Mutex // guards the rest
	ports map[string]vpc.Port
	next  int // device
}

func (n *eniNode) newFabric() (*fabric, error) {
	config := vpc.Config{CIDR: vpcCIDR, Log: n.log}
	for _, s := range cloud.Default().Subnets {
		config.Subnets = append(config.Subnets, vpc.Subnet{ID: s.ID, CIDR: s.CIDR})
	}
	network, err := vpc.New(config)
	if err != nil {
		return nil, err
	}
	n.closers = append(n.closers, network.Close)
	return &fabric{Network: network, ports: map[string]vpc.Port{}}, nil
}

// plug makes the next device of the node from a port.
func (f *fabric) plug(p vpc.Port) (dev string, err error) {
	f.mu.Lock()
	dev = fmt.Sprint("eth", f.next)
	f.next++
	f.mu.Unlock()
	tap, err := vpc.NewTap(dev, p.MAC)
	if err != nil {
		return "", err
	}
	return dev, f.AttachTap(p, tap)
}

// configure makes a device what the primary ENI is on a node.
func (f *fabric) configure(dev string, addr netip.Addr) error {
	return errors.Join(
		os.WriteFile("/proc/sys/net/ipv6/conf/"+dev+"/disable_ipv6", []byte("1"), 0),
		addAddress(dev, netip.PrefixFrom(addr, cloud.Default().Subnets[0].CIDR.Bits())), setUp(dev))
}

// plugAll plugs the primary ENI and those of the cloud.
func (f *fabric) plugAll(facts node.Facts, c attached) error {
	mac, err := net.ParseMAC(facts.MAC)
	if err != nil {
		return err
	}
	dev, err := f.plug(vpc.Port{ENI: "eni-primary", MAC: mac, Subnet: cloud.Default().Subnets[0].ID, Addrs: []netip.Addr{facts.PrivateIP}, Primary: true})
	if err != nil {
		return err
	}
	if err := f.configure(dev, facts.PrivateIP); err != nil {
		return err
	}
	for _, e := range c.enis {
		mac, err := net.ParseMAC(e.MAC)
		if err != nil {
			return err
		}
		p := vpc.Port{ENI: e.ID, MAC: mac, Subnet: e.SubnetID}
		for _, ip := range e.IPs {
			p.Addrs = append(p.Addrs, ip.Addr)
		}
		if _, err := f.plug(p); err != nil {
			return err
		}
	}
	return nil
}

func setUp(dev string) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("set %s up: %w", dev, err)
	}
	return netlink.LinkSetUp(l)
}

func addAddress(dev string, p netip.Prefix) error {
	l, err := netlink.LinkByName(dev)
	if err != nil {
		return fmt.Errorf("add %s to %s: %w", p, dev, err)
	}
	return netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}})
}

// comparePercentile compares percentiles of the two sides of pairs.
func comparePercentile(name, unit, peer string, pairs []Pair, percent int) Figure {
	var ours, peers []float64
	for _, p := range pairs {
		ours, peers = append(ours, p.Ours), append(peers, p.Peer)
	}
	a, b := percentile(ours, percent), percentile(peers, percent)
	return Figure{Name: name, Unit: unit, PeerName: peer, Runs: len(pairs), Ours: round(a), Peer: round(b), Ratio: round(a / cmp.Or(b, 1))}
}
