//go:build kernel

package eni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestKernelMetadataGuard asks the metadata service from pods that may and that
// may not, and from the node.
func TestKernelMetadataGuard(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.sealed.Config.Network.MetadataAccess = []string{"default/csi-*", "kube-system/*"}
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		csi, web := newPod(t, "csi-1"), newPod(t, "web")
		csi.add()
		webAddr := web.add()
		n.listen(metadataAddr)

		n.reach(csi, metadataAddr, nodeAddr)
		if got, err := origin((&net.Dialer{}).DialContext, metadataAddr); err != nil || got != nodeAddr.String() {
			t.Errorf("the node asks as %q, %v", got, err)
		}
		for i := range 20 { // more than ICMP errors a second
			if err := n.refusedAt(web); err != nil {
				t.Fatalf("try %d: %v", i, err)
			}
		}
		if err := web.enter(func() error { // a datagram is refused, too
			c, err := net.Dial("udp", netip.AddrPortFrom(metadataAddr, 53).String())
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			c.Write([]byte("x"))
			if _, err = c.Read(make([]byte, 1)); !errors.Is(err, syscall.EHOSTUNREACH) {
				return fmt.Errorf("read: %w, want no route to host", err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		s, err := n.net.State()
		must(t, err)
		// A slow machine repeats a packet before it hears that it was refused.
		if s.MetadataRefused < 21 || s.MetadataRefused > 2*21 {
			t.Errorf("%d packets are counted as refused, want 21", s.MetadataRefused)
		}

		n.sealed.Config.Network.MetadataAccess = []string{"default/web"}
		want := "add nft metadata " + webAddr.String() + "\n"
		if got := n.converge(); !strings.Contains(got, want) || !strings.Contains(got, "delete nft metadata ") {
			t.Errorf("plan:\n%s", got)
		}
		n.reach(web, metadataAddr, nodeAddr)
		if err := n.refusedAt(csi); err != nil {
			t.Error(err)
		}
		sh(t, "nft flush set inet tkenode metadata")
		if got := n.converge(); got != want {
			t.Errorf("plan:\n%s", got)
		}
		sh(t, "nft flush chain inet tkenode refuse") // the pods in the sets survive that the table is made anew
		n.converge()
		n.reach(web, metadataAddr, nodeAddr)
		if err := n.refusedAt(csi); err != nil {
			t.Error(err)
		}
		n.noWrongFrames()
	})
}

// refusedAt says if a pod is not refused at once by the metadata service.
func (n *testNode) refusedAt(p *pod) error {
	return p.enter(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(metadataAddr, 80).String())
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("pod %s connects to the metadata service: %v, want connection refused", p.name, err)
		}
		return nil
	})
}
