//go:build kernel

package eni

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/lab/vpc"
)

// A test of the kernel tier runs in a process of its own, whose network namespace
// is the node. Its ENIs are taps of the lab's VPC, its pods are further
// namespaces, and the plugin is the binary that is shipped.

func init() {
	// The main thread stays the main goroutine's: were a goroutine to enter a pod
	// on it, all of the process would seem to be there.
	runtime.LockOSThread()
}

const childVariable = "TKENODE_KERNEL_TEST"

// inNode runs f in a new node.
func inNode(t *testing.T, f func(t *testing.T, n *testNode)) {
	t.Helper()
	if os.Getenv(childVariable) == t.Name() {
		f(t, newTestNode(t))
		return
	}
	// The Makefile names the one it has built: root must not leave files in the
	// build cache of whoever called it by sudo.
	plugin := os.Getenv("TKE_ENI")
	if plugin == "" {
		plugin = filepath.Join(t.TempDir(), "tke-eni")
		build := exec.Command("go", "build", "-buildvcs=false", "-o", plugin, "github.com/tkenode/tkenode/cmd/tke-eni")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build plugin: %v\n%s", err, out)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	run := "-test.run=^" + strings.ReplaceAll(t.Name(), "/", "$/^") + "$"
	cmd := exec.CommandContext(ctx, "/proc/self/exe", run, "-test.v", "-campaign="+*campaignFile, fmt.Sprint("-seed=", *campaignSeed), "-commit="+*campaignCommit)
	cmd.Env = append(os.Environ(), childVariable+"="+t.Name(), "TKE_ENI="+plugin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if testing.Verbose() {
		t.Logf("%s", out)
	}
}

type testNode struct {
	t      *testing.T
	vpc    *vpc.Network
	dir    string
	sealed node.Sealed
	cloud  Cloud
	net    *Network
	eni    vpc.Port
	tap    *os.File
}

var (
	nodeAddr   = netip.MustParseAddr("10.0.0.5")
	vpcPeer    = netip.MustParseAddr("10.0.0.20")
	vpcPeer6   = netip.MustParseAddr("2402:4e00::20")
	outsider   = netip.MustParseAddr("203.0.113.9")
	podSubnet  = netip.MustParsePrefix("10.0.16.0/20")
	podSubnet6 = netip.MustParsePrefix("2402:4e00:0:16::/64")
	primaryMAC = "52:54:00:00:00:01"
	eniMAC     = "52:54:00:00:00:02"
)

func newTestNode(t *testing.T) *testNode {
	must(t, unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""))
	must(t, unix.Mount("tmpfs", "/run", "tmpfs", 0, ""))
	must(t, unix.Mount("tmpfs", "/var/lib", "tmpfs", 0, ""))
	must(t, os.MkdirAll("/run/tkenode", 0o755))
	n := &testNode{t: t, dir: t.TempDir()}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	var err error
	n.vpc, err = vpc.New(vpc.Config{
		CIDR: netip.MustParsePrefix("10.0.0.0/16"), CIDR6: netip.MustParsePrefix("2402:4e00::/48"),
		Subnets: []vpc.Subnet{
			{ID: "subnet-node0001", CIDR: netip.MustParsePrefix("10.0.0.0/24"), CIDR6: netip.MustParsePrefix("2402:4e00::/64")},
			{ID: "subnet-pods0001", CIDR: podSubnet, CIDR6: podSubnet6},
		},
		Log: log,
	})
	must(t, err)
	t.Cleanup(func() { n.vpc.Close() })

	lo, err := netlink.LinkByName("lo")
	must(t, err)
	must(t, netlink.LinkSetUp(lo))
	n.tap = n.plug(vpc.Port{ENI: "eni-primary", MAC: mac(primaryMAC), Subnet: "subnet-node0001", Addrs: addrs("10.0.0.5"), Primary: true}, "eth0")
	eth0, err := netlink.LinkByName("eth0")
	must(t, err)
	must(t, os.WriteFile("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", []byte("1"), 0))
	must(t, netlink.AddrAdd(eth0, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, 0, 5), Mask: net.CIDRMask(24, 32)}}))
	must(t, netlink.LinkSetUp(eth0))
	must(t, netlink.RouteAdd(&netlink.Route{Gw: net.IPv4(10, 0, 0, 1)}))

	n.eni = vpc.Port{ENI: "eni-pods0001", MAC: mac(eniMAC), Subnet: "subnet-pods0001", Addrs: addrs("10.0.16.4", "10.0.16.5", "10.0.16.6", "10.0.16.7")}
	n.sealed.Facts = node.Facts{InstanceID: "ins-00000001", MAC: primaryMAC, PrivateIP: nodeAddr}
	n.sealed.Config.Network.NonMasqueradeCIDRs = prefixes("10.0.0.0/8", "172.16.0.0/12")
	n.start()
	t.Cleanup(func() { n.net.Close() })
	return n
}

// plug gives the node an ENI.
func (n *testNode) plug(p vpc.Port, name string) *os.File {
	tap, err := vpc.NewTap(name, p.MAC)
	must(n.t, err)
	must(n.t, n.vpc.AttachTap(p, tap))
	return tap
}

// start starts an agent on the node's state.
func (n *testNode) start() {
	n.net = New(Options{
		Sealed:   func() (node.Sealed, bool) { return n.sealed, true },
		Cloud:    n.cloud,
		Log:      slog.New(slog.NewTextHandler(n.t.Output(), nil)),
		Dir:      n.dir,
		Conflist: filepath.Join(n.dir, "net.d/10-tke-eni.conflist"),
		Plugins:  os.Getenv("CNI_PATH"),
	})
}

// restart replaces the agent, as after a kill.
func (n *testNode) restart() {
	must(n.t, n.net.Close())
	n.start()
}

// attach plugs the secondary ENI and tells the pool's side of the ledger.
func (n *testNode) attach(name string) {
	n.plug(n.eni, name)
	n.record()
}

func (n *testNode) record() {
	l := n.net.ledger
	if _, err := l.state(); err != nil {
		n.t.Fatal(err)
	}
	must(n.t, l.begin(n.sealed.Facts.InstanceID))
	slot := Slot{Number: 0, ENI: n.eni.ENI, MAC: n.eni.MAC.String(), Subnet: podSubnet, Primary: n.eni.Addrs[0]}
	for _, a := range n.eni.Addrs[1:] {
		switch {
		case a.Is4():
			slot.Addrs = append(slot.Addrs, a)
		case !slot.Primary6.IsValid():
			slot.Subnet6, slot.Primary6 = podSubnet6, a
		default:
			slot.Addrs6 = append(slot.Addrs6, a)
		}
	}
	must(n.t, l.record(record{Slot: &slot}))
}

// plan plans the paths.
func (n *testNode) plan() node.Plan {
	n.t.Helper()
	p, err := n.net.Paths().Plan(n.t.Context())
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

// converge plans, applies, and plans again: the second plan must be empty. It
// returns the text of the first.
func (n *testNode) converge() string {
	n.t.Helper()
	first := n.plan()
	if err := n.net.Paths().Apply(n.t.Context(), first); err != nil {
		n.t.Fatalf("apply: %v; plan:\n%s", err, first)
	}
	if second := n.plan(); !second.Empty() {
		n.t.Fatalf("plan after apply:\n%sapplied was:\n%s", second, first)
	}
	return first.String()
}

// serve answers the plugin until stop is called.
func (n *testNode) serve() (stop func()) {
	os.Remove(cni.Socket)
	l, err := net.Listen("unix", cni.Socket)
	must(n.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- n.net.Serve(ctx, l) }()
	return func() {
		cancel()
		must(n.t, <-done)
	}
}

// pod is a network namespace.
type pod struct {
	t    *testing.T
	name string
	ns   *os.File
}

func newPod(t *testing.T, name string) *pod {
	p := &pod{t: t, name: name}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			p.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		done <- err
	}()
	must(t, <-done)
	t.Cleanup(func() { p.ns.Close() })
	return p
}

// enter runs f in the pod.
func (p *pod) enter(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(p.ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func (p *pod) container() string { return "c0ffee" + p.name }

// path of the namespace, in this process.
func (p *pod) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.ns.Fd()) }

// plugin calls the shipped binary.
func (p *pod) plugin(command string, conf map[string]any) (map[string]any, error) {
	return p.pluginAt(command, p.path(), conf)
}

// pluginAt calls it for a namespace that may be gone.
func (p *pod) pluginAt(command, path string, conf map[string]any) (map[string]any, error) {
	config := map[string]any{"cniVersion": "1.1.0", "name": "tke-eni", "type": "tke-eni"}
	for k, v := range conf {
		config[k] = v
	}
	in, err := json.Marshal(config)
	must(p.t, err)
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Getenv("TKE_ENI"))
	cmd.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + p.container(), "CNI_IFNAME=eth0", "CNI_NETNS=" + path, "CNI_PATH=/opt/cni/bin",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + p.name,
	}
	cmd.Stdin = bytes.NewReader(in)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", command, err, bytes.TrimSpace(out))
	}
	if len(out) == 0 {
		return nil, nil
	}
	var result map[string]any
	return result, json.Unmarshal(out, &result)
}

// add wires the pod and returns its address.
func (p *pod) add() netip.Addr {
	p.t.Helper()
	result, err := p.plugin("ADD", nil)
	must(p.t, err)
	ip := result["ips"].([]any)[0].(map[string]any)
	return netip.MustParsePrefix(ip["address"].(string)).Addr()
}

// listen answers TCP connections in the pod with the address they come from.
func (p *pod) listen() {
	must(p.t, p.enter(func() error {
		for network, at := range map[string]string{"tcp4": "0.0.0.0:80", "tcp6": "[::]:80"} {
			l, err := net.Listen(network, at)
			if err != nil {
				return err
			}
			p.t.Cleanup(func() { l.Close() })
			go tellOrigin(l)
		}
		return nil
	}))
}

func tellOrigin(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		io.WriteString(c, host)
		c.Close()
	}
}

type dialer func(ctx context.Context, network, addr string) (net.Conn, error)

// origin connects to a tellOrigin and returns what it says.
func origin(dial dialer, to netip.Addr) (string, error) {
	return originAt(dial, netip.AddrPortFrom(to, 80))
}

func originAt(dial dialer, to netip.AddrPort) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	c, err := dial(ctx, "tcp", to.String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

// reach checks that from reaches to, and under which address.
func (n *testNode) reach(from *pod, to, as netip.Addr) {
	n.t.Helper()
	var got string
	err := from.enter(func() (err error) {
		got, err = origin((&net.Dialer{}).DialContext, to)
		return err
	})
	if err != nil || got != as.String() {
		n.t.Errorf("pod %s to %s: origin %q, error %v; want origin %s", from.name, to, got, err, as)
	}
}

// reached checks that the VPC reaches the address.
func (n *testNode) reached(to netip.Addr) {
	n.t.Helper()
	from := vpcPeer
	if to.Is6() {
		from = vpcPeer6
	}
	n.reachedAt(from, netip.AddrPortFrom(to, 80), from)
}

// reachedAt checks that an address of the VPC or outside of it reaches to, and
// under which address.
func (n *testNode) reachedAt(from netip.Addr, to netip.AddrPort, as netip.Addr) {
	n.t.Helper()
	if got, err := originAt(n.dialFrom(from), to); err != nil || got != as.String() {
		n.t.Errorf("%s to %s: origin %q, error %v; want origin %s", from, to, got, err, as)
	}
}

func (n *testNode) dialFrom(from netip.Addr) dialer {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		return n.vpc.DialContext(ctx, from, network, addr)
	}
}

// listen answers TCP connections at an address of the VPC or outside of it.
func (n *testNode) listen(at netip.Addr) {
	n.t.Helper()
	l, err := n.vpc.Listen(netip.AddrPortFrom(at, 80))
	must(n.t, err)
	n.t.Cleanup(func() { l.Close() })
	go tellOrigin(l)
}

// noWrongFrames checks that the VPC has dropped nothing for being in the name of
// somebody else.
func (n *testNode) noWrongFrames() {
	n.t.Helper()
	for eni, c := range n.vpc.Counters() {
		for _, r := range []vpc.Reason{vpc.DropMAC, vpc.DropSource, vpc.DropARPSender, vpc.DropIPv6, vpc.DropMalformed, vpc.DropProtocol} {
			if c.Drops[r] != 0 {
				n.t.Errorf("%s: %d frames dropped: %s", eni, c.Drops[r], r)
			}
		}
	}
}

// kernelDump is everything that could leak.
func (n *testNode) kernelDump() string {
	n.t.Helper()
	var b strings.Builder
	for _, args := range []string{"ip -o link", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 addr", "ip neigh", "nft -s list ruleset"} {
		f := strings.Fields(args)
		out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
		if err != nil {
			n.t.Fatalf("%s: %v: %s", args, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if !strings.Contains(line, vpcPeer.String()) && !strings.Contains(line, vpcPeer6.String()) && !strings.Contains(line, "lladdr") { // what traffic leaves behind
				b.WriteString(line)
			}
		}
	}
	return b.String()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func prefixes(all ...string) (out []netip.Prefix) {
	for _, s := range all {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func addrs(all ...string) (out []netip.Addr) {
	for _, s := range all {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}
