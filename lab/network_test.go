//go:build node

package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/images"
	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/kube"
	"github.com/tkenode/tkenode/lab/vpc"
)

// outsideAddr is no address of the VPC: what comes from the nodes has the address
// of one's primary ENI there, the only one that can have a public address.
var outsideAddr = netip.MustParseAddr("203.0.113.9")

const (
	hostPort   = 18080 // of the pod with one
	repairedIn = 10 * time.Second
)

// network is two nodes with pods on each, and a Service of a pod on each.
type network struct {
	*Lab
	t     *testing.T
	nodes [2]*CVM
	pods  [2][2]Web // of each node
	// service has the first pod of each node behind it, single only that of the
	// node of this number.
	service  service
	single   [2]service
	hostPods [2]string // with the network of their node
	alone    Web       // a pod of the first node that has an ENI of its own
}

type service struct {
	ip       netip.Addr
	nodePort int
}

// TestNodeNetwork is what has to hold of the network of nodes, whatever is done to
// them: each way of a packet, and nothing that the VPC drops for its source.
func TestNodeNetwork(t *testing.T) {
	l := startLab(t)
	if err := l.FromSnapshot(within(t, 8*time.Minute), 1); err != nil {
		t.Fatal(err)
	}
	n := &network{Lab: l, t: t}
	// The second node's pods have addresses of both families.
	dual := userData(t, l, "\nnetwork:\n", "\nnetwork:\n  ipFamilies: [IPv4, IPv6]\n")
	for i, userData := range [][]byte{nil, dual} {
		c, err := l.Launch(t.Context(), LaunchSpec{DataDisks: []int{20}, UserData: userData})
		if err != nil {
			t.Fatal(err)
		}
		n.nodes[i] = c
	}
	for _, c := range n.nodes {
		ready(t, l, c, 12*time.Minute)
		converged(t, l, c)
		marks, _ := c.Timeline.Marks()
		t.Logf("launch: %v", marks)
	}
	n.populate()
	n.ways()
	n.adversary()
	if *whole {
		n.supervised()
	}
}

// populate runs the pods and creates the Services.
func (n *network) populate() {
	n.t.Helper()
	ctx := within(n.t, 6*time.Minute)
	run := func(p kube.Pod) {
		p.Image = images.Web
		if err := n.Cluster.RunPod(ctx, p); err != nil {
			n.t.Fatal(err)
		}
	}
	wait := func(name string) netip.Addr {
		p, err := n.Cluster.WaitPodRunning(ctx, name)
		if err != nil {
			n.t.Fatal(err)
		}
		return p.Status.PodIP
	}
	for i, c := range n.nodes {
		for j := range n.pods[i] {
			n.pods[i][j].Name = fmt.Sprintf("pod-%d-%d", i, j)
			labels := map[string]string{}
			if j == 0 {
				labels = map[string]string{"app": "web", "on": strconv.Itoa(i)}
			}
			run(kube.Pod{Name: n.pods[i][j].Name, Node: c.Name(), Labels: labels})
		}
		n.hostPods[i] = fmt.Sprintf("host-%d", i)
		run(kube.Pod{Name: n.hostPods[i], Node: c.Name(), HostNetwork: true})
	}
	n.alone.Name = "alone"
	run(kube.Pod{Name: n.alone.Name, Node: n.nodes[0].Name(), Annotations: map[string]string{
		cni.AnnotationNetwork: "tke-direct-eni", cni.AnnotationGroups: cloud.Default().SecurityGroups[1],
	}})
	run(kube.Pod{Name: "ported", Node: n.nodes[0].Name(), Port: webPort, HostPort: hostPort})
	n.service = n.expose(ctx, "web", map[string]string{"app": "web"})
	for i := range n.nodes {
		for j := range n.pods[i] {
			n.pods[i][j].IP = wait(n.pods[i][j].Name)
		}
		wait(n.hostPods[i])
		n.single[i] = n.expose(ctx, fmt.Sprintf("web-%d", i), map[string]string{"on": strconv.Itoa(i)})
	}
	wait("ported")
	n.alone.IP = wait(n.alone.Name)
}

func (n *network) expose(ctx context.Context, name string, selector map[string]string) service {
	n.t.Helper()
	ip, port, err := n.Cluster.Expose(ctx, kube.Service{Name: name, Selector: selector, Port: 80, Target: webPort})
	if err != nil {
		n.t.Fatal(err)
	}
	return service{ip, port}
}

// ways tries every way, and after each looks whether the VPC has dropped anything
// for its source.
func (n *network) ways() {
	outside := n.listenOutside()
	for i, c := range n.nodes {
		here, there := n.pods[i], n.pods[1-i]
		other := n.nodes[1-i]
		from := here[1].Name // never one that is behind a Service itself
		n.way(i, "pod to pod of its node", func() error { return n.get(from, here[0].IP, webPort) })
		n.way(i, "pod to pod of the other node", func() error { return n.get(from, there[0].IP, webPort) })
		n.way(i, "pod to its host", func() error { return n.get(from, c.IP, webPort) })
		n.way(i, "pod to the other host", func() error { return n.get(from, other.IP, webPort) })
		n.way(i, "host to its pod", func() error { return n.get(n.hostPods[i], here[0].IP, webPort) })
		n.way(i, "host to the other's pod", func() error { return n.get(n.hostPods[i], there[0].IP, webPort) })
		n.way(i, "VPC to pod", func() error { return n.fetchFrom(ProbeAddr, here[0].IP, webPort) })
		n.way(i, "VPC to pod of the host", func() error { return n.fetchFrom(ProbeAddr, c.IP, webPort) })
		n.way(i, "pod to outside of the VPC", func() error {
			if err := n.get(from, outsideAddr, webPort); err != nil {
				return err
			}
			if saw := <-outside; saw != c.IP {
				return fmt.Errorf("outside it has the address %s, not the node's %s", saw, c.IP)
			}
			return nil
		})
		for k, s := range n.single {
			where := map[bool]string{true: "its node", false: "the other node"}[k == i]
			n.way(i, "pod to Service of a pod on "+where, func() error { return n.get(from, s.ip, 80) })
			n.way(i, "host to Service of a pod on "+where, func() error { return n.get(n.hostPods[i], s.ip, 80) })
			n.way(i, "pod to NodePort of a pod on "+where, func() error { return n.get(from, c.IP, s.nodePort) })
			n.way(i, "VPC to NodePort of a pod on "+where, func() error { return n.fetchFrom(ProbeAddr, c.IP, s.nodePort) })
			n.way(i, "outside to NodePort of a pod on "+where, func() error { return n.fetchFrom(outsideAddr, c.IP, s.nodePort) })
		}
		n.way(i, "pod to the Service that it is behind", func() error { return n.get(here[0].Name, n.single[i].ip, 80) })
		for _, pod := range []string{from, n.hostPods[i]} {
			n.way(i, pod+" to Service by name", func() error { return n.exec(pod, "wget", "-qO-", "http://web/") })
			n.way(i, pod+" resolves a name of the VPC", func() error { return n.exec(pod, "nslookup", "metadata.tencentyun.com") })
		}
	}
	n.aloneWays()
	n.dualWays()
	n.way(0, "pod to hostPort", func() error { return n.get(n.pods[1][1].Name, n.nodes[0].IP, hostPort) })
	n.way(0, "VPC to hostPort", func() error { return n.fetchFrom(ProbeAddr, n.nodes[0].IP, hostPort) })
}

// aloneWays tries the ways of a pod that has an ENI of its own.
func (n *network) aloneWays() {
	alone := n.alone
	n.t.Run("alone has the ENI and the security group that it asks for", func(t *testing.T) {
		groups := cloud.Default().SecurityGroups[1:2]
		for _, e := range n.Region.Snapshot().ENIs {
			if e.IPs[0].Addr == alone.IP {
				if e.Instance != n.nodes[0].ID || !slices.Equal(e.SecurityGroups, groups) {
					t.Errorf("its ENI: %+v", e)
				}
				return
			}
		}
		t.Errorf("no ENI has its address, %s", alone.IP)
	})
	n.way(0, "VPC to alone", func() error { return n.fetchFrom(ProbeAddr, alone.IP, webPort) })
	n.way(0, "host to alone", func() error { return n.get(n.hostPods[0], alone.IP, webPort) })
	for i := range n.nodes {
		n.way(i, "pod to alone", func() error { return n.get(n.pods[i][1].Name, alone.IP, webPort) })
		n.way(i, "alone to pod", func() error { return n.get(alone.Name, n.pods[i][0].IP, webPort) })
		n.way(i, "alone to Service of a pod", func() error { return n.get(alone.Name, n.single[i].ip, 80) })
	}
	n.way(0, "alone to Service by name", func() error { return n.exec(alone.Name, "wget", "-qO-", "http://web/") })
	n.t.Run("alone is explained", func(t *testing.T) {
		out := n.mustRun(t, n.nodes[0], "tkenode explain pod default/alone || true")
		if strings.Contains(out, "!!") || !strings.Contains(out, alone.IP.String()) {
			t.Errorf("explained:\n%s", out)
		}
	})
}

// dualWays tries the ways of IPv6, of the pods of the second node.
func (n *network) dualWays() {
	var st eni.State
	if out := n.mustRun(n.t, n.nodes[1], "tkenode pods -o json"); json.Unmarshal([]byte(out), &st) != nil {
		n.t.Fatalf("tkenode pods: %s", out)
	}
	six := map[string]netip.Addr{}
	for _, p := range st.Pods {
		six[p.Name] = p.Addr6
	}
	here := n.pods[1]
	for _, pod := range here {
		n.way(1, "VPC to "+pod.Name+" by IPv6", func() error { return n.fetchFrom(ProbeAddr6, six[pod.Name], webPort) })
	}
	n.way(1, "pod to pod of its node by IPv6", func() error {
		return n.exec(here[1].Name, "wget", "-qO-", fmt.Sprintf("http://[%s]:%d/", six[here[0].Name], webPort))
	})
	n.way(1, "Kubernetes knows both addresses of a pod", func() error {
		p, err := n.Cluster.WaitPodRunning(within(n.t, time.Minute), here[0].Name)
		if err == nil && (len(p.Status.PodIPs) != 2 || p.Status.PodIPs[0].IP != here[0].IP || p.Status.PodIPs[1].IP != six[here[0].Name]) {
			err = fmt.Errorf("podIPs %v, want %s and %s", p.Status.PodIPs, here[0].IP, six[here[0].Name])
		}
		return err
	})
}

// way is one subtest. A Service's rules, and the answer of DNS about it, may be some
// seconds behind its creation.
func (n *network) way(i int, name string, try func() error) {
	n.t.Run(fmt.Sprintf("%d %s", i, name), func(t *testing.T) {
		if _, err := eventually(t, repairedIn, try); err != nil {
			t.Error(err)
		}
		n.wantNoDrops(t)
	})
}

// eventually tries until there is no error, and returns how long it took.
func eventually(t *testing.T, limit time.Duration, try func() error) (time.Duration, error) {
	began := time.Now()
	for {
		err := try()
		took := time.Since(began)
		if err == nil || took > limit {
			return took, err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-t.Context().Done():
			return took, err
		}
	}
}

// wantNoDrops wants that no ENI has sent in another's name.
func (n *network) wantNoDrops(t *testing.T) {
	t.Helper()
	for eni, c := range n.Net.Counters() {
		for _, why := range []vpc.Reason{vpc.DropMAC, vpc.DropSource, vpc.DropARPSender} {
			if c.Drops[why] > 0 {
				t.Errorf("%s: the VPC has dropped %d for %s", eni, c.Drops[why], why)
			}
		}
	}
}

// listenOutside serves a page at outsideAddr and tells who has asked.
func (n *network) listenOutside() <-chan netip.Addr {
	n.t.Helper()
	l, err := n.Net.Listen(netip.AddrPortFrom(outsideAddr, webPort))
	if err != nil {
		n.t.Fatal(err)
	}
	saw := make(chan netip.Addr, 16)
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		saw <- netip.MustParseAddrPort(r.RemoteAddr).Addr()
		io.WriteString(w, "outside\n")
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	n.t.Cleanup(func() { s.Close(); <-done })
	return saw
}

// get fetches a page from within a pod. A connection whose first packet was sent past a
// Service that is being repaired stays past it for ever: whoever waits dials anew.
// busybox's wget -T dies of a signal.
func (n *network) get(pod string, ip netip.Addr, port int) error {
	return n.exec(pod, "busybox", "timeout", "10", "wget", "-qO-", fmt.Sprintf("http://%s:%d/", ip, port))
}

// exec runs a command in a pod.
func (n *network) exec(pod string, command ...string) error {
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(n.options.Bin, "kubectl"), append([]string{"exec", pod, "--"}, command...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+n.Cluster.Kubeconfig())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s in %s: %w: %s", strings.Join(command, " "), pod, err, out)
	}
	return nil
}

// fetchFrom fetches a page from an address of the lab's. A connection that is not there
// at once is an error: whoever waits dials anew, for a lost SYN is repeated only after a
// second, and would make every repair look as if it had taken one.
func (n *network) fetchFrom(from, ip netip.Addr, port int) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
			defer cancel()
			return n.Net.DialContext(ctx, from, network, addr)
		},
	}}
	resp, err := client.Get(fmt.Sprintf("http://%s/", netip.AddrPortFrom(ip, uint16(port))))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || len(body) == 0 {
		return fmt.Errorf("%s with %d bytes: %w", resp.Status, len(body), err)
	}
	return nil
}

// adversary does to a node what has cut off pods elsewhere. How long it takes until
// a pod answers again is told; the bound allows for a machine without hardware
// virtualisation, and the campaign of agent/eni judges the time. What leaves by another
// ENI before the rules are back, the VPC drops.
func (n *network) adversary() {
	c, pod := n.nodes[0], n.pods[0][0].IP
	for _, act := range []string{
		"systemctl restart systemd-networkd",
		"networkctl reload",
		"udevadm trigger --subsystem-match=net --settle",
		"ip rule flush && ip rule add priority 32766 table main",
		"ip route flush table main proto tkenode; for t in $(ip rule | sed -n 's/.*lookup \\([0-9]*\\)$/\\1/p' | sort -u); do ip route flush table $t; done",
		"nft flush ruleset",
		"ip link set eth1 address 02:00:00:00:00:99",
		"sysctl -q -w net.ipv4.conf.all.rp_filter=1 $(cd /proc/sys/net/ipv4/conf && ls -d eth* eni* | sed 's/.*/net.ipv4.conf.&.rp_filter=1/')",
	} {
		n.t.Run(act, func(t *testing.T) {
			n.mustRun(t, c, act)
			took, err := eventually(t, repairedIn, func() error { return n.fetchFrom(ProbeAddr, pod, webPort) })
			if err != nil {
				t.Errorf("the pod does not answer: %v", err)
			}
			t.Logf("the pod answered after %s", took.Round(time.Millisecond))
		})
	}
}

// supervised wants kube-proxy and CoreDNS back, as they were.
func (n *network) supervised() {
	c := n.nodes[0]
	client := n.pods[0][1].Name
	service := func() error { return n.get(client, n.single[1].ip, 80) }
	name := func() error { return n.exec(client, "nslookup", "web.default.svc.cluster.local") }
	for _, unit := range []struct {
		name, file string
		serves     func() error
	}{
		{node.KubeProxyUnit, "/etc/kubernetes/kube-proxy.yaml", service},
		{node.CoreDNSUnit, "/etc/kubernetes/Corefile", name},
	} {
		pid := func(t *testing.T) string { return n.mustRun(t, c, "systemctl show -P MainPID "+unit.name) }
		n.t.Run(unit.name+" killed", func(t *testing.T) {
			before := pid(t)
			n.mustRun(t, c, "systemctl kill -s KILL "+unit.name)
			converged(t, n.Lab, c)
			if after := pid(t); after == before || after == "0" {
				t.Errorf("its process was %s and is %s", before, after)
			}
			if _, err := eventually(t, 3*repairedIn, unit.serves); err != nil {
				t.Error(err)
			}
		})
		n.t.Run(unit.name+" with an edited file", func(t *testing.T) {
			// Of the same size, and read by the process.
			before := n.mustRun(t, c, "sha256sum "+unit.file)
			n.mustRun(t, c, "sed -i 's/127.0.0.1/127.0.0.2/' "+unit.file+" && systemctl restart "+unit.name)
			if _, err := eventually(t, 6*repairedIn, func() error {
				if after := n.mustRun(t, c, "sha256sum "+unit.file); after != before {
					return fmt.Errorf("%s is %s, was %s", unit.file, after, before)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			converged(t, n.Lab, c)
			// The agent may have been faster than the restart, and needs none of its own then.
			if out := n.mustRun(t, c, "ss -ltnH src 127.0.0.2"); out != "" {
				t.Errorf("%s runs with the edited file: %s", unit.name, out)
			}
		})
	}
	n.t.Run("kube-proxy without its table", func(t *testing.T) {
		n.mustRun(t, c, "nft delete table ip kube-proxy")
		if _, err := eventually(t, 6*repairedIn, service); err != nil {
			t.Error(err)
		}
		converged(t, n.Lab, c)
	})
	n.t.Run("CoreDNS without its address", func(t *testing.T) {
		n.mustRun(t, c, "ip address del 169.254.20.10/32 dev lo")
		if _, err := eventually(t, 6*repairedIn, name); err != nil {
			t.Error(err)
		}
		converged(t, n.Lab, c)
	})
}
