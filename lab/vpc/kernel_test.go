//go:build kernel

package vpc

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// namespace is a network namespace that lives as long as its thread.
type namespace struct {
	t      *testing.T
	work   chan func()
	thread int
}

const (
	patient = 5 * time.Second        // for what must happen
	brief   = 500 * time.Millisecond // for what must not
)

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	ns := &namespace{t: t, work: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		ns.thread = unix.Gettid()
		ready <- unix.Unshare(unix.CLONE_NEWNET)
		for f := range ns.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal("new network namespace:", err)
	}
	t.Cleanup(func() { close(ns.work) })
	return ns
}

// do runs f in the namespace. A socket that f opens stays there.
func (ns *namespace) do(f func()) {
	done := make(chan struct{})
	ns.work <- func() { defer close(done); f() }
	<-done
}

func (ns *namespace) ip(args string) string {
	ns.t.Helper()
	var out []byte
	var err error
	ns.do(func() { out, err = exec.Command("ip", strings.Fields(args)...).CombinedOutput() })
	if err != nil {
		ns.t.Fatalf("ip %s: %v\n%s", args, err, out)
	}
	return string(out)
}

// plug attaches a tap of the namespace to the VPC, up and without addresses.
func (ns *namespace) plug(n *Network, name string, p Port) {
	ns.t.Helper()
	ns.do(func() {
		tap, err := NewTap(name, p.MAC)
		if err == nil {
			err = n.AttachTap(p, tap)
		}
		if err != nil {
			ns.t.Error(err)
		}
	})
	if ns.t.Failed() {
		ns.t.FailNow()
	}
	ns.ip("link set " + name + " mtu 1500 up")
}

// node is a namespace with the node's primary ENI, set up as DHCP would.
func node(t *testing.T, n *Network) *namespace {
	t.Helper()
	ns := newNamespace(t)
	ns.plug(n, "eth0", nodePort())
	ns.ip("link set lo up")
	ns.ip("addr add 10.0.0.5/24 dev eth0")
	ns.ip("route add default via 10.0.0.1")
	return ns
}

func (ns *namespace) dial(from netip.Addr, to string, timeout time.Duration) (conn net.Conn, err error) {
	d := net.Dialer{Timeout: timeout}
	if from.IsValid() {
		d.LocalAddr = &net.TCPAddr{IP: from.AsSlice()}
	}
	ns.do(func() { conn, err = d.Dial("tcp", to) })
	return conn, err
}

// ping is an echo from the kernel of the namespace.
func (ns *namespace) ping(to netip.Addr, timeout time.Duration) (err error) {
	ns.do(func() {
		var conn net.PacketConn
		if conn, err = net.ListenPacket("ip4:icmp", "0.0.0.0"); err != nil {
			return
		}
		defer conn.Close()
		echo := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1}
		binary.BigEndian.PutUint16(echo[2:], checksum(echo))
		conn.SetDeadline(time.Now().Add(timeout))
		if _, err = conn.WriteTo(echo, &net.IPAddr{IP: to.AsSlice()}); err != nil {
			return
		}
		answer := make([]byte, 1500)
		for {
			size, from, fail := conn.ReadFrom(answer)
			if fail != nil {
				err = fail
				return
			}
			if size >= 6 && answer[0] == 0 && answer[4] == 0x12 && from.String() == to.String() {
				return
			}
		}
	})
	return err
}

func TestKernelTraffic(t *testing.T) {
	n := newNetwork(t)
	ns := node(t, n)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	if err := ns.ping(gateway, patient); err != nil {
		t.Fatal("ping the gateway:", err)
	}
	if neigh := ns.ip("neigh show 10.0.0.1"); !strings.Contains(neigh, net.HardwareAddr(fabricMAC[:]).String()) {
		t.Errorf("gateway's neighbour entry %q", neigh)
	}
	if rtt, err := n.Ping(ctx, probe, nodeIP); err != nil || rtt <= 0 {
		t.Errorf("ping the node: %s, %v", rtt, err)
	}

	// The machine dials a service of the lab, by a name that the lab's DNS gives.
	service, err := n.Listen(netip.MustParseAddrPort("169.254.0.23:80"))
	if err != nil {
		t.Fatal(err)
	}
	go pour(service)
	conn, err := ns.dial(netip.Addr{}, "169.254.0.23:80", patient)
	if err != nil {
		t.Fatal("dial a service:", err)
	}
	exchange(t, conn, "machine to lab")

	// The lab dials the machine.
	var listener net.Listener
	ns.do(func() { listener, err = net.Listen("tcp", "10.0.0.5:10250") })
	if err != nil {
		t.Fatal(err)
	}
	go pour(listener)
	defer listener.Close()
	if conn, err = n.DialContext(ctx, probe, "tcp", "10.0.0.5:10250"); err != nil {
		t.Fatal(err)
	}
	exchange(t, conn, "lab to machine")
	if _, err := n.DialContext(ctx, probe, "tcp", "10.0.0.5:1"); err == nil || ctx.Err() != nil {
		t.Errorf("dial a closed port: %v", err)
	}

	drops := n.Counters()["eni-node"].Drops
	delete(drops, DropIPv6)      // the kernel looks for a router
	delete(drops, DropUnknown)   // and joins multicast groups
	delete(drops, DropQueueFull) // and is slower than the lab for a moment
	if len(drops) > 0 {
		t.Errorf("dropped: %v", drops)
	}
}

const volume = 16 << 20

// pour sends the accepted connection a known stream and then the digest of what it gets.
func pour(l net.Listener) {
	conn, err := l.Accept()
	if err != nil {
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	io.Copy(conn, io.LimitReader(rand.NewChaCha8([32]byte{1}), volume))
	sum := sha256.New()
	io.CopyN(sum, conn, volume)
	conn.Write(sum.Sum(nil))
}

// exchange is the other end of pour: both directions carry every byte.
func exchange(t *testing.T, conn net.Conn, what string) {
	t.Helper()
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	start := time.Now()
	got, want, remote := sha256.New(), sha256.New(), make([]byte, sha256.Size)
	io.CopyN(want, rand.NewChaCha8([32]byte{1}), volume)
	if _, err := io.CopyN(got, conn, volume); err != nil {
		t.Fatalf("%s: receive: %v", what, err)
	}
	received := time.Since(start)
	start = time.Now()
	if _, err := io.Copy(conn, io.LimitReader(rand.NewChaCha8([32]byte{1}), volume)); err != nil {
		t.Fatalf("%s: send: %v", what, err)
	}
	if _, err := io.ReadFull(conn, remote); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	t.Logf("%s: %.0f MB/s in, %.0f MB/s out", what, volume/received.Seconds()/1e6, volume/time.Since(start).Seconds()/1e6)
	if string(got.Sum(nil)) != string(want.Sum(nil)) || string(remote) != string(want.Sum(nil)) {
		t.Errorf("%s: bytes changed on their way", what)
	}
}

func TestKernelWrongSource(t *testing.T) {
	n := newNetwork(t)
	ns := node(t, n)
	other := netip.MustParseAddr("10.0.0.99")
	ns.ip("addr add 10.0.0.99/32 dev eth0")
	ns.ip("neigh replace 10.0.0.10 lladdr " + net.HardwareAddr(fabricMAC[:]).String() + " dev eth0")
	accept(t, func() (net.Listener, error) { return n.Listen(netip.MustParseAddrPort("10.0.0.10:6443")) })
	dial := func(timeout time.Duration) error {
		conn, err := ns.dial(other, "10.0.0.10:6443", timeout)
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := dial(brief); err == nil || n.Counters()["eni-node"].Drops[DropSource] == 0 {
		t.Errorf("from an address that is not assigned: %v, %v", err, n.Counters()["eni-node"])
	}
	if err := n.SetAddrs("eni-node", []netip.Addr{nodeIP, other}); err != nil {
		t.Fatal(err)
	}
	if err := dial(patient); err != nil {
		t.Error("from an assigned address:", err)
	}

	// A link that is down carries nothing, and everything again when it is up.
	n.SetLink("eni-node", false)
	if err := ns.ping(gateway, brief); err == nil || n.Counters()["eni-node"].Drops[DropLinkDown] == 0 {
		t.Errorf("ping over a link that is down: %v, %v", err, n.Counters()["eni-node"])
	}
	n.SetLink("eni-node", true)
	if err := ns.ping(gateway, patient); err != nil {
		t.Error("ping over a link that is up again:", err)
	}

	ns.ip("link set eth0 down")
	ns.ip("link set eth0 address 52:54:00:00:00:77 up")
	ns.ip("route add default via 10.0.0.1")
	if err := ns.ping(gateway, brief); err == nil || n.Counters()["eni-node"].Drops[DropMAC] == 0 {
		t.Errorf("ping from a wrong MAC: %v, %v", err, n.Counters()["eni-node"])
	}
}

// accept makes a listener that takes connections and ends them.
func accept(t *testing.T, listen func() (net.Listener, error)) {
	t.Helper()
	l, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

// A pod behind a secondary ENI, wired as on a TKE node: its packets must leave by the ENI that has its address.
func TestKernelSecondaryENI(t *testing.T) {
	n := newNetwork(t)
	client := node(t, n)
	host, pod := newNamespace(t), newNamespace(t)
	primary := nodePort()
	primary.ENI, primary.MAC, primary.Addrs = "eni-node2", net.HardwareAddr{0x52, 0x54, 0, 0, 0, 3}, []netip.Addr{netip.MustParseAddr("10.0.0.6")}
	host.plug(n, "eth0", primary)
	host.ip("addr add 10.0.0.6/24 dev eth0")
	host.ip("route add default via 10.0.0.1")
	host.plug(n, "eth1", podPort())
	host.ip(fmt.Sprintf("link add veth0 type veth peer name eth0 netns %d", pod.thread))
	host.ip("link set veth0 address 02:00:00:00:00:01 up")
	host.do(func() {
		for name, value := range map[string]string{"ip_forward": "1", "conf/all/rp_filter": "0", "conf/eth0/rp_filter": "0"} {
			if err := writeSysctl("net/ipv4/"+name, value); err != nil {
				t.Error(err)
			}
		}
	})
	host.ip("route add 10.0.16.10 dev veth0")
	pod.ip("link set eth0 up")
	pod.ip("addr add 10.0.16.10/32 dev eth0")
	pod.ip("route add 169.254.1.1 dev eth0")
	pod.ip("neigh add 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent")
	pod.ip("route add default via 169.254.1.1")
	accept(t, func() (l net.Listener, err error) {
		pod.do(func() { l, err = net.Listen("tcp", "10.0.16.10:80") })
		return l, err
	})
	dial := func(timeout time.Duration) error {
		conn, err := client.dial(netip.Addr{}, "10.0.16.10:80", timeout)
		if err == nil {
			conn.Close()
		}
		return err
	}
	drops := func(eni string, why Reason) uint64 { return n.Counters()[eni].Drops[why] }

	if err := dial(brief); err == nil || drops("eni-node2", DropSource) == 0 {
		t.Errorf("the pod answers through the primary ENI: %v, %v", err, n.Counters())
	}
	host.ip("rule add from 10.0.16.10 priority 1536 lookup 4000")
	host.ip("route add default via 10.0.16.1 dev eth1 onlink table 4000")
	if err := dial(brief); err == nil || drops("eni-pods", DropARPSender) == 0 {
		t.Errorf("eth1 asks for its gateway in the name of eth0's address: %v, %v", err, n.Counters())
	}
	host.ip("addr add 10.0.16.9/20 dev eth1 noprefixroute")
	if err := dial(patient); err != nil {
		t.Errorf("through the pod's own ENI: %v, %v", err, n.Counters())
	}

	// The ENI is torn out: its interface goes, and nobody has its addresses.
	if err := n.Detach("eni-pods"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patient); strings.Contains(host.ip("-br link"), "eth1"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the detached ENI is still there")
		}
	}
	before := drops("eni-node", DropUnknown)
	if err := dial(brief); err == nil || drops("eni-node", DropUnknown) == before {
		t.Errorf("dial the address of a detached ENI: %v, %v", err, n.Counters())
	}
}

func writeSysctl(name, value string) error {
	// /proc/sys/net shows the namespace of the thread that opens it.
	fd, err := unix.Open("/proc/sys/"+name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", name, err)
	}
	_, err = unix.Write(fd, []byte(value))
	return errors.Join(err, unix.Close(fd))
}
