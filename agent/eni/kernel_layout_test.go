//go:build kernel

package eni

import (
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// TestKernelTKECompat switches a node with pods to TKE's layout and back. No
// connection of a pod fails meanwhile, and nothing of the other layout is left.
func TestKernelTKECompat(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		before := n.kernelDump()
		web, client := newPod(t, "web"), newPod(t, "client")
		webAddr, clientAddr := web.add(), client.add()
		web.listen()
		n.listen(vpcPeer)
		n.listen(outsider)
		mark := n.kernelDump()
		say := n.talk(client, netip.AddrPortFrom(vpcPeer, 7))

		failed := func(switchTo node.Layout) {
			t.Helper()
			n.sealed.Config.Network.Layout = switchTo
			var stop atomic.Bool
			tried := make(chan error)
			go func() {
				tried <- client.enter(func() error {
					for !stop.Load() {
						if _, err := origin((&net.Dialer{}).DialContext, vpcPeer); err != nil {
							return err
						}
					}
					return nil
				})
			}()
			t.Logf("to %s:\n%s", switchTo, n.converge())
			stop.Store(true)
			if err := <-tried; err != nil {
				t.Errorf("while switching to %s: %v", switchTo, err)
			}
		}
		isRouted := func() {
			t.Helper()
			if there, err := routed(webAddr); !there || err != nil {
				t.Errorf("the address of a pod may be given back: routed %v, %v", there, err)
			}
			if there, err := routed(n.eni.Addrs[3]); there || err != nil {
				t.Errorf("a free address may not be given back: routed %v, %v", there, err)
			}
		}
		isRouted()
		failed(node.LayoutTKECompat)
		isRouted()
		compat := n.kernelDump()
		for _, want := range []string{
			"512:	from all to " + webAddr.String() + " lookup main proto 154\n",
			"1535:	from all fwmark 0x20000000/0x3f000000 lookup main proto 154\n",
			"1536:	from " + webAddr.String() + " lookup 4001 proto 154\n",
		} {
			if !strings.Contains(compat, want) {
				t.Errorf("no rule %q in\n%s", want, compat)
			}
		}
		if strings.Contains(compat, "lookup 4000") || strings.Contains(compat, "table 4000") || strings.Contains(compat, "fwmark 0x1000000") {
			t.Errorf("left of the other layout:\n%s", compat)
		}
		n.reached(webAddr)
		n.reach(client, webAddr, clientAddr)
		n.reach(client, vpcPeer, clientAddr)
		n.reach(client, outsider, nodeAddr)
		third := newPod(t, "third")
		third.listen()
		n.reached(third.add())
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan after ADD:\n%s", p)
		}
		if _, err := third.plugin("CHECK", map[string]any{"prevResult": map[string]any{}}); err != nil {
			t.Error(err)
		}
		if _, err := third.plugin("DEL", nil); err != nil {
			t.Error(err)
		}
		must(t, n.net.paths.reap())
		if after := n.kernelDump(); sorted(after) != sorted(compat) {
			t.Errorf("after DEL:\n%s\nbefore ADD:\n%s", after, compat)
		}
		sh(t, "ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default")
		n.converge()
		n.reached(webAddr)

		failed(node.LayoutMark)
		if after := n.kernelDump(); sorted(after) != sorted(mark) {
			t.Errorf("after both switches:\n%s\nbefore:\n%s", after, mark)
		}
		say()
		for _, p := range []*pod{web, client} {
			if _, err := p.plugin("DEL", nil); err != nil {
				t.Error(err)
			}
		}
		must(t, n.net.paths.reap())
		if after := n.kernelDump(); sorted(after) != sorted(before) {
			t.Errorf("after DEL:\n%s\nbefore ADD:\n%s", after, before)
		}
		n.noWrongFrames()
	})
}

// sorted orders the lines of a dump: the kernel lists tables as they were made.
func sorted(dump string) string {
	return strings.Join(slices.Sorted(strings.Lines(dump)), "")
}
