package bench

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/bootstrap"
)

func TestHandmadeFiles(t *testing.T) {
	h := handmade{
		config: node.Config{
			Cluster: node.ClusterConfig{Endpoint: "https://10.0.0.10:6443", CertificateAuthority: "CA"},
			Disks:   []node.DiskConfig{{FileSystem: node.Ext4, MountPoint: "/var/lib/containerd"}},
		},
		facts:       node.Facts{InstanceID: "ins-handmade", PrivateIP: netip.MustParseAddr("10.0.0.200"), ZoneID: 100003},
		machine:     bootstrap.Machine{CPUs: 2, MemoryBytes: 4 << 30},
		certificate: []byte("pair"),
		eni:         netip.MustParsePrefix("10.0.16.2/20"),
		gateway:     netip.MustParseAddr("10.0.16.1"),
	}
	files, err := h.files()
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]file{}
	for _, f := range files {
		if _, twice := have[f.path]; twice {
			t.Errorf("%s twice", f.path)
		}
		have[f.path] = f
	}
	// What ours is started with, the peer has, too.
	rendered, err := bootstrap.Render(h.config, h.facts, h.machine)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range rendered {
		if got := have[f.Path]; string(got.data) != string(f.Data) || got.mode != f.Mode {
			t.Errorf("%s is not as ours is", f.Path)
		}
	}
	for path, want := range map[string]string{
		"/var/lib/tkenode/pki/kubelet-client-handmade.pem": "pair",
		"/etc/systemd/system/var-lib-containerd.mount":     "What=/dev/disk/by-uuid/" + diskUUID + "\nWhere=/var/lib/containerd\n",
		"/etc/systemd/network/15-eth1.network":             "Address=10.0.16.2/20\n",
		"/etc/cni/net.d/10-handmade.conflist":              `"cniVersion": "1.0.0"`,
	} {
		if got := string(have[path].data); !strings.Contains(got, want) {
			t.Errorf("%s has no %q:\n%s", path, want, got)
		}
	}
	network := string(have["/etc/systemd/network/15-eth1.network"].data)
	for _, want := range []string{"Gateway=10.0.16.1\n", "From=10.0.16.2\n"} {
		if !strings.Contains(network, want) {
			t.Errorf("no %q in %s", want, network)
		}
	}
	for at, target := range map[string]string{
		"/var/lib/tkenode/pki/kubelet-client-current.pem":                "kubelet-client-handmade.pem",
		"/etc/systemd/system/multi-user.target.wants/kubelet.service":    "../kubelet.service",
		"/etc/systemd/system/multi-user.target.wants/containerd.service": "../containerd.service",
		"/etc/systemd/system/tkenode-agent.service":                      "/dev/null",
	} {
		if have[at].link != target {
			t.Errorf("%s leads to %q, want %q", at, have[at].link, target)
		}
	}
	if mode := have["/var/lib/tkenode/pki/kubelet-client-handmade.pem"].mode; mode != 0o600 {
		t.Errorf("the key has mode %v", mode)
	}
}
