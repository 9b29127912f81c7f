//go:build kernel

package eni

import (
	"os"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

func TestKernelPodHasVPCAddress(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		defer n.serve()()
		web, client := newPod(t, "web"), newPod(t, "client")

		if _, err := web.plugin("STATUS", nil); err == nil || !strings.Contains(err.Error(), `"code":50`) {
			t.Errorf("STATUS before the network is configured: %v", err)
		}
		t.Logf("first plan:\n%s", n.converge())
		if _, err := os.Stat(n.net.paths.conflist); err != nil {
			t.Error(err)
		}
		if _, err := web.plugin("STATUS", nil); err != nil {
			t.Error(err)
		}
		before := n.kernelDump()

		webAddr, clientAddr := web.add(), client.add()
		if webAddr == clientAddr || !podSubnet.Contains(webAddr) || webAddr == n.eni.Addrs[0] {
			t.Fatalf("addresses %s and %s", webAddr, clientAddr)
		}
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan after ADD:\n%s", p)
		}
		web.listen()
		n.listen(vpcPeer)
		n.reached(webAddr)
		n.reach(client, webAddr, clientAddr)
		n.reach(client, vpcPeer, clientAddr)
		n.noWrongFrames()
		for _, p := range []*pod{web, client} {
			if _, err := p.plugin("CHECK", map[string]any{"prevResult": map[string]any{"ips": []any{}}}); err != nil {
				t.Error(err)
			}
		}
		if again := web.add(); again != webAddr {
			t.Errorf("repeated ADD: %s, want %s", again, webAddr)
		}
		if _, err := web.plugin("DEL", nil); err != nil {
			t.Error(err)
		}
		if again := web.add(); again == webAddr { // at once, while the old veth may still be there
			t.Errorf("%s has not rested", again)
		}

		for range 2 { // DEL is idempotent
			for _, p := range []*pod{web, client} {
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
		if _, err := web.plugin("CHECK", map[string]any{"prevResult": map[string]any{}}); err == nil || !strings.Contains(err.Error(), "101") {
			t.Errorf("CHECK after DEL: %v", err)
		}
		s, err := n.net.State()
		must(t, err)
		if len(s.Pods) != 0 || len(s.ENIs[0].Addresses) != 3 || s.ENIs[0].Addresses[0].State != "cooling" {
			t.Errorf("state after DEL: %+v", s)
		}
	})
}

func TestKernelGC(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		keep, lose := newPod(t, "keep"), newPod(t, "lose")
		keep.add()
		lose.add()
		valid := []cni.Attachment{{ContainerID: keep.container(), IfName: "eth0"}}
		if _, err := keep.plugin("GC", map[string]any{"cni.dev/valid-attachments": valid}); err != nil {
			t.Fatal(err)
		}
		s, err := n.net.State()
		must(t, err)
		if len(s.Pods) != 1 || s.Pods[0].Name != "keep" {
			t.Errorf("pods after GC: %v", s.Pods)
		}
		if _, err := keep.plugin("GC", nil); err == nil {
			t.Error("GC without a list succeeded")
		}
	})
}
