//go:build kernel

package eni

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

// chain calls every plugin of the conflist that the agent wrote, as a runtime does.
func (p *pod) chain(n *testNode, command string, capabilities map[string]any, prev json.RawMessage) (json.RawMessage, error) {
	data, err := os.ReadFile(n.net.paths.conflist)
	must(p.t, err)
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	must(p.t, json.Unmarshal(data, &list))
	for _, conf := range list.Plugins {
		conf["cniVersion"], conf["name"] = list.CNIVersion, list.Name
		if prev != nil {
			conf["prevResult"] = prev
		}
		if command == "GC" {
			conf["cni.dev/valid-attachments"] = []cni.Attachment{{ContainerID: p.container(), IfName: "eth0"}}
		}
		runtimeConfig := map[string]any{}
		wanted, _ := conf["capabilities"].(map[string]any)
		for name := range wanted {
			if v, ok := capabilities[name]; ok {
				runtimeConfig[name] = v
			}
		}
		conf["runtimeConfig"] = runtimeConfig
		in, err := json.Marshal(conf)
		must(p.t, err)
		ctx, cancel := context.WithTimeout(p.t.Context(), time.Minute)
		defer cancel()
		bin := filepath.Join(os.Getenv("CNI_PATH"), conf["type"].(string))
		if conf["type"] == cni.Network {
			bin = os.Getenv("TKE_ENI")
		}
		cmd := exec.CommandContext(ctx, bin)
		cmd.Env = []string{
			"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + p.container(), "CNI_IFNAME=eth0", "CNI_NETNS=" + p.path(), "CNI_PATH=" + os.Getenv("CNI_PATH"),
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + p.name, "PATH=" + os.Getenv("PATH"),
		}
		cmd.Stdin = bytes.NewReader(in)
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("%s of %s: %w: %s", command, conf["type"], err, bytes.TrimSpace(out))
		}
		if command == "ADD" {
			prev = out
		}
	}
	return prev, nil
}

// buildChain builds the plugins that the node image carries beside ours.
func buildChain(t *testing.T) {
	t.Helper()
	if os.Getenv(childVariable) == "" {
		bin := t.TempDir()
		build := exec.Command("go", "build", "-o", bin+"/",
			"github.com/containernetworking/plugins/plugins/meta/portmap", "github.com/containernetworking/plugins/plugins/meta/bandwidth")
		build.Dir = "../../images/components"
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly", "GOWORK=off")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build plugins: %v\n%s", err, out)
		}
		t.Setenv("CNI_PATH", bin)
	}
}

// TestKernelHostPort calls the whole chain, with the plugins that the node image
// carries, and connects to the node's port.
func TestKernelHostPort(t *testing.T) {
	buildChain(t)
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, client := newPod(t, "web"), newPod(t, "client")
		before := n.kernelDump()
		client.add()

		// What nobody uses does nothing, and so do commands that a plugin lacks.
		if _, err := web.chain(n, "STATUS", nil, nil); err != nil {
			t.Error(err)
		}
		ports := map[string]any{"portMappings": []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
		result, err := web.chain(n, "ADD", ports, nil)
		must(t, err)
		if _, err := web.chain(n, "CHECK", ports, result); err != nil {
			t.Error(err)
		}
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan beside portmap:\n%s", p)
		}
		web.listen()
		dial := func(context.Context, string, string) (net.Conn, error) {
			return net.DialTimeout("tcp", "10.0.0.5:8080", 3*time.Second)
		}
		if got, err := origin(dial, netip.Addr{}); err != nil || got != "10.0.0.5" {
			t.Errorf("from the node: origin %q, %v", got, err)
		}
		must(t, client.enter(func() error {
			_, err := origin(dial, netip.Addr{})
			return err
		}))
		n.noWrongFrames()
		if _, err := web.chain(n, "DEL", ports, result); err != nil {
			t.Error(err)
		}
		if c, err := dial(t.Context(), "", ""); err == nil {
			c.Close()
			t.Error("the port is open after DEL")
		}
		if _, err := client.chain(n, "GC", nil, nil); err != nil {
			t.Error(err)
		}
		if _, err := client.chain(n, "DEL", nil, nil); err != nil {
			t.Error(err)
		}
		must(t, n.net.paths.reap())
		sh(t, "nft delete table ip cni_hostport")
		if after := n.kernelDump(); after != before {
			t.Errorf("after DEL:\n%s\nbefore ADD:\n%s", after, before)
		}
	})
}

// TestKernelExclusiveHostPort is the same for a pod that has an ENI of its own.
func TestKernelExclusiveHostPort(t *testing.T) {
	buildChain(t)
	inNode(t, func(t *testing.T, n *testNode) {
		n.permitWhole()
		n.attach("eth1")
		n.attachWhole("eth2")
		n.converge()
		defer n.serve()()
		db := newPod(t, "db")
		asked := map[string]any{
			"portMappings":            []any{map[string]any{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}},
			cni.CapabilityAnnotations: map[string]string{cni.AnnotationNetwork: networkExclusive, cni.AnnotationGroups: "sg-web00001"},
		}
		result, err := db.chain(n, "ADD", asked, nil)
		must(t, err)
		// bandwidth wants a veth: of what it does nothing for, its CHECK says so, too.
		if _, err := db.chain(n, "CHECK", asked, result); err == nil || !strings.Contains(err.Error(), "CHECK of bandwidth") {
			t.Errorf("CHECK: %v", err)
		}
		db.listen()
		for _, from := range []netip.Addr{outsider, vpcPeer} {
			n.reachedAt(from, netip.AddrPortFrom(nodeAddr, 8080), nodeAddr)
		}
		n.noWrongFrames()
		if _, err := db.chain(n, "DEL", asked, result); err != nil {
			t.Error(err)
		}
	})
}
