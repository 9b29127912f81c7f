//go:build kernel

package eni

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/lab/vpc"
)

const wholeMAC = "52:54:00:00:00:03"

var wholeAddr = netip.MustParseAddr("10.0.16.20")

// attachWhole plugs an ENI that pods get whole, and tells the pool's side of the
// ledger.
func (n *testNode) attachWhole(name string) {
	n.plug(vpc.Port{ENI: "eni-whole001", MAC: mac(wholeMAC), Subnet: "subnet-pods0001", Addrs: []netip.Addr{wholeAddr}}, name)
	must(n.t, n.net.ledger.record(record{Slot: &Slot{
		Number: exclusiveSlot, ENI: "eni-whole001", MAC: wholeMAC, Subnet: podSubnet, Primary: wholeAddr, Addrs: []netip.Addr{wholeAddr}, Groups: []string{"sg-web00001"},
	}}))
}

// permitWhole has the NodeConfig give ENIs away.
func (n *testNode) permitWhole() {
	c := &n.sealed.Config
	c.Network.ExclusiveENIs, c.Network.SecurityGroupIDs, c.Network.PodSecurityGroupIDs = 2, []string{"sg-node0001"}, []string{"sg-web00001"}
	c.Cluster.ServiceCIDR = netip.MustParsePrefix("172.16.0.0/16")
	c.Cluster.DNS = addrs("172.16.0.10")
}

// asks is the part of the configuration by which the runtime hands annotations over.
func asks(network, groups string) map[string]any {
	return map[string]any{"runtimeConfig": map[string]any{cni.CapabilityAnnotations: map[string]string{
		cni.AnnotationNetwork: network, cni.AnnotationGroups: groups, "other": "value",
	}}}
}

// addWhole wires the pod with an ENI of its own and returns its address.
func (p *pod) addWhole() netip.Addr {
	p.t.Helper()
	result, err := p.plugin("ADD", asks(networkExclusive, "sg-web00001"))
	must(p.t, err)
	ip := result["ips"].([]any)[0].(map[string]any)
	if ip["gateway"] != "10.0.16.1" || len(result["interfaces"].([]any)) != 3 {
		p.t.Errorf("result %v", result)
	}
	return netip.MustParsePrefix(ip["address"].(string)).Addr()
}

// TestKernelExclusivePod holds which way each packet of a pod goes that has an ENI of
// its own, and that nothing of it is left.
func TestKernelExclusivePod(t *testing.T) {
	for _, layout := range []node.Layout{node.LayoutMark, node.LayoutTKECompat} {
		t.Run(string(layout), func(t *testing.T) { inNode(t, exclusivePod) })
	}
}

func exclusivePod(t *testing.T, n *testNode) {
	n.permitWhole()
	n.sealed.Config.Network.Layout = node.Layout(filepath.Base(t.Name()))
	sh(t, "sysctl -qw net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.default.rp_filter=2") // as systemd sets it
	n.attach("eth1")
	n.attachWhole("eth2")
	defer n.serve()()
	t.Logf("first plan:\n%s", n.converge())
	before := n.kernelDump()
	db, web, local := newPod(t, "db"), newPod(t, "web"), newPod(t, "local")
	must(t, db.enter(func() error { // as where the node's own setting is that
		return errors.Join(os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("1"), 0), os.WriteFile("/proc/sys/net/ipv4/conf/default/rp_filter", []byte("1"), 0))
	}))
	addr := db.addWhole()
	if addr != wholeAddr {
		t.Fatalf("address %s", addr)
	}
	localAddr := local.add()
	webAddr := web.add()
	if p := n.plan(); !p.Empty() {
		t.Errorf("plan after ADD:\n%s", p)
	}
	if _, err := db.plugin("CHECK", map[string]any{"prevResult": map[string]any{"ips": []any{}}}); err != nil {
		t.Error(err)
	}
	db.listen()
	local.listen()
	n.listen(vpcPeer)
	n.listen(outsider)

	n.reached(addr)              // the VPC reaches it
	n.reach(db, vpcPeer, addr)   // with its own address
	n.reach(db, outsider, addr)  // also outside, for a NAT gateway
	n.reach(db, localAddr, addr) // a pod of this node, through the VPC
	n.reach(web, addr, webAddr)  // and from it
	n.probe(addr)                // kubelet
	n.services(db, localAddr)    // through the node, under its address
	for _, from := range []netip.Addr{outsider, vpcPeer} {
		n.reachedAt(from, netip.AddrPortFrom(nodeAddr, 30080), nodeAddr) // a hostPort
		n.reachedAt(from, netip.AddrPortFrom(nodeAddr, 30081), nodeAddr) // a NodePort
	}
	n.reach(web, netip.MustParseAddr("172.16.0.14"), webAddr) // a Service, from another pod
	n.listen(metadataAddr)
	if err := n.refusedAt(db); err != nil {
		t.Error(err)
	}
	if err := db.boundTo("eth0", metadataAddr); err == nil || !os.IsTimeout(err) {
		t.Errorf("a socket bound to the ENI's device asks for metadata: %v, want no answer", err)
	}
	n.sealed.Config.Network.MetadataAccess = []string{"default/db"}
	n.converge()
	n.reach(db, metadataAddr, nodeAddr)
	n.sealed.Config.Network.MetadataAccess = nil
	n.converge()
	n.noWrongFrames()
	sh(t, "nft delete table ip proxy")

	if again := db.addWhole(); again != addr {
		t.Errorf("repeated ADD: %s", again)
	}
	for range 2 {
		for _, p := range []*pod{db, web, local} {
			if _, err := p.plugin("DEL", nil); err != nil {
				t.Error(err)
			}
		}
	}
	if p := n.plan(); !p.Empty() {
		t.Errorf("plan after DEL:\n%s", p)
	}
	must(t, n.net.paths.reap())
	if after := n.kernelDump(); after != before {
		t.Errorf("after DEL:\n%s\nbefore ADD:\n%s", after, before)
	}
	s, err := n.net.State()
	must(t, err)
	if len(s.Pods) != 0 || s.ENIs[1].Addresses[0].State != "cooling" {
		t.Errorf("state after DEL: %+v", s)
	}
	n.noWrongFrames()
}

// probe has the node reach the pod under its own address, by the veth.
func (n *testNode) probe(to netip.Addr) {
	n.t.Helper()
	if got, err := origin((&net.Dialer{}).DialContext, to); err != nil || got != nodeAddr.String() {
		n.t.Errorf("the node reaches %s as %q, %v", to, got, err)
	}
}

// services has the pod ask Services whose endpoints are on the node and in the VPC,
// as kube-proxy translates, and the node itself.
func (n *testNode) services(db *pod, localAddr netip.Addr) {
	n.t.Helper()
	sh(n.t, `nft -f - <<EOF
table ip proxy {
	chain nat-prerouting {
		type nat hook prerouting priority dstnat
		ip daddr 172.16.0.10 tcp dport 80 dnat to `+localAddr.String()+`:80
		ip daddr 172.16.0.11 tcp dport 80 dnat to `+vpcPeer.String()+`:80
		ip daddr 172.16.0.12 tcp dport 80 dnat to `+outsider.String()+`:80
		ip daddr 172.16.0.13 tcp dport 80 dnat to `+nodeAddr.String()+`:80
		ip daddr 172.16.0.14 tcp dport 80 dnat to `+wholeAddr.String()+`:80
		ip daddr 10.0.0.5 tcp dport 30080 dnat to `+wholeAddr.String()+`:80
		ip daddr 10.0.0.5 tcp dport 30081 meta mark set mark or 0x4000 dnat to `+wholeAddr.String()+`:80
	}
	chain nat-postrouting {
		type nat hook postrouting priority srcnat
		meta mark and 0x4000 != 0 meta mark set mark xor 0x4000 masquerade fully-random
	}
}
EOF`)
	l, err := net.Listen("tcp", netip.AddrPortFrom(nodeAddr, 80).String())
	must(n.t, err)
	n.t.Cleanup(func() { l.Close() })
	go tellOrigin(l)
	for _, service := range addrs("172.16.0.10", "172.16.0.11", "172.16.0.12", "172.16.0.14") {
		n.reach(db, service, nodeAddr)
	}
	for _, own := range addrs("172.16.0.13", nodeAddr.String()) {
		n.reach(db, own, wholeAddr) // nothing leaves the node
	}
}

// boundTo connects to an address by a device, whatever the routes prefer.
func (p *pod) boundTo(dev string, to netip.Addr) error {
	return p.enter(func() error {
		d := net.Dialer{Timeout: time.Second, Control: func(_, _ string, c syscall.RawConn) error {
			var bound error
			err := c.Control(func(fd uintptr) { bound = unix.BindToDevice(int(fd), dev) })
			return errors.Join(err, bound)
		}}
		c, err := d.Dial("tcp", netip.AddrPortFrom(to, 80).String())
		if err == nil {
			c.Close()
		}
		return err
	})
}
