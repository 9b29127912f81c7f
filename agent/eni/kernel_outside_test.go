//go:build kernel

package eni

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestKernelOutside holds which address a pod is seen under, and by which ENI its
// packets and the answers go: the VPC drops and counts every other choice.
func TestKernelOutside(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, client := newPod(t, "web"), newPod(t, "client")
		webAddr, clientAddr := web.add(), client.add()
		web.listen()
		n.listen(vpcPeer)
		n.listen(outsider)
		n.reach(client, vpcPeer, clientAddr)
		n.reach(client, webAddr, clientAddr)
		n.reach(client, outsider, nodeAddr)
		n.reachedAt(outsider, netip.AddrPortFrom(webAddr, 80), outsider) // as a CLB that keeps its client's address

		// What has begun goes on as it began when the list changes.
		before := n.talk(client, netip.AddrPortFrom(outsider, 7))
		n.sealed.Config.Network.NonMasqueradeCIDRs = prefixes("0.0.0.0/0")
		if got := n.converge(); !strings.Contains(got, "inside [0.0.0.0/0] (was another inside)") {
			t.Errorf("plan:\n%s", got)
		}
		n.reach(client, outsider, clientAddr)
		during := n.talk(client, netip.AddrPortFrom(outsider, 8))
		n.sealed.Config.Network.NonMasqueradeCIDRs = prefixes("10.0.0.0/8", "172.16.0.0/12")
		n.converge()
		n.reach(client, outsider, nodeAddr)
		before()
		during()
		n.noWrongFrames()
	})
}

// TestKernelNodePort sends connections through destination NAT as kube-proxy makes
// it. What came in by the primary ENI is answered by it.
func TestKernelNodePort(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, client := newPod(t, "web"), newPod(t, "client")
		webAddr, clientAddr := web.add(), client.add()
		web.listen()
		sh(t, `nft -f - <<EOF
table ip proxy {
	chain nat-prerouting {
		type nat hook prerouting priority dstnat
		ip daddr 10.0.0.5 tcp dport 30080 dnat to `+webAddr.String()+`:80
		ip daddr 10.0.0.5 tcp dport 30081 meta mark set mark or 0x4000 dnat to `+webAddr.String()+`:80
		ip daddr { 172.16.0.10, 198.51.100.7 } tcp dport 80 dnat to `+webAddr.String()+`:80
	}
	chain nat-postrouting {
		type nat hook postrouting priority srcnat
		meta mark and 0x4000 != 0 meta mark set mark xor 0x4000 masquerade fully-random
	}
}
EOF`)
		local, cluster := netip.AddrPortFrom(nodeAddr, 30080), netip.AddrPortFrom(nodeAddr, 30081)
		for _, from := range []netip.Addr{outsider, vpcPeer} {
			n.reachedAt(from, local, from)
			n.reachedAt(from, cluster, nodeAddr)
		}
		for _, service := range addrs("172.16.0.10", "198.51.100.7") {
			n.reach(client, service, clientAddr)
		}
		n.noWrongFrames()
	})
}

// talk opens a connection from a pod. The function that it returns says something
// on it and expects the same back.
func (n *testNode) talk(from *pod, to netip.AddrPort) (again func()) {
	n.t.Helper()
	l, err := n.vpc.Listen(to)
	must(n.t, err)
	echoed, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(echoed)
		c, err := l.Accept()
		l.Close()
		if err != nil {
			return
		}
		go func() { // the pod may be gone by then, and say nothing
			<-ended
			c.Close()
		}()
		io.Copy(c, c)
	}()
	var c net.Conn
	must(n.t, from.enter(func() (err error) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		c, err = (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
		return err
	}))
	n.t.Cleanup(func() {
		c.Close()
		l.Close()
		close(ended)
		<-echoed
	})
	say := func() {
		n.t.Helper()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		got := make([]byte, 5)
		_, err := io.WriteString(c, "hello")
		if err == nil {
			_, err = io.ReadFull(c, got)
		}
		if err != nil || string(got) != "hello" {
			n.t.Errorf("connection of %s to %s: %q, %v", from.name, to, got, err)
		}
	}
	say()
	return say
}
