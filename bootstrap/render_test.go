package bootstrap

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/bootstrap/nodeconfig"
)

var update = flag.Bool("update", false, "write the goldens")

var labFacts = node.Facts{
	InstanceID: "ins-lab00001", InstanceType: "S5.MEDIUM2", Region: "ap-guangzhou", Zone: "ap-guangzhou-3", ZoneID: 100003,
	VPCID: "vpc-lab00001", SubnetID: "subnet-node0001", MAC: "52:54:00:00:00:01", PrivateIP: netip.MustParseAddr("10.0.0.5"),
	Hostname: "vm-0-5", CAMRole: "TKENodeRole", ENIQuota: 4, IPQuota: 10,
}

// TestRender: each golden is a NodeConfig and every file that it gives, whole.
func TestRender(t *testing.T) {
	goldens, err := filepath.Glob("testdata/render-*.txtar")
	if err != nil || len(goldens) == 0 {
		t.Fatalf("no goldens: %v", err)
	}
	for _, golden := range goldens {
		t.Run(filepath.Base(golden), func(t *testing.T) {
			want, err := txtar.ParseFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			cfg, err := nodeconfig.FromUserData(want.Files[0].Data)
			if err != nil {
				t.Fatal(err)
			}
			files, err := Render(cfg, labFacts, Machine{CPUs: 2, MemoryBytes: 2 << 30})
			if err != nil {
				t.Fatal(err)
			}
			got := &txtar.Archive{Comment: want.Comment, Files: want.Files[:1:1]}
			for _, f := range files {
				name := fmt.Sprintf("%s %04o %s", f.Path, f.Mode, strings.Join(f.Units, ","))
				got.Files = append(got.Files, txtar.File{Name: strings.TrimSpace(name), Data: f.Data})
			}
			if *update {
				if err := os.WriteFile(golden, txtar.Format(got), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if string(txtar.Format(got)) != string(txtar.Format(want)) {
				t.Errorf("got:\n%s\nwant:\n%s", txtar.Format(got), txtar.Format(want))
			}
		})
	}
}

// TestKubeletDisks: kubelet does not start on the bare directory of a disk of its own,
// and requires no other disk.
func TestKubeletDisks(t *testing.T) {
	text := func(mountPoints ...string) string {
		var c node.Config
		for _, dir := range mountPoints {
			c.Disks = append(c.Disks, node.DiskConfig{MountPoint: dir})
		}
		files, err := Render(c, labFacts, Machine{CPUs: 2, MemoryBytes: 2 << 30})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if f.Path == unitPath(node.KubeletUnit) {
				return string(f.Data)
			}
		}
		t.Fatal("no unit is rendered")
		return ""
	}
	if got := text("/var/lib/containerd", "/data", "/var/lib/kubelet-other"); strings.Contains(got, "Assert") || strings.Count(got, "RequiresMountsFor=") != 1 {
		t.Errorf("with disks of others:\n%s", got)
	}
	if got := text("/data", "/var/lib/kubelet/pods"); !strings.Contains(got, "\nRequiresMountsFor=/var/lib/kubelet/pods\nAssertPathIsMountPoint=/var/lib/kubelet/pods\n") || strings.Contains(got, "/data") {
		t.Errorf("with a disk of its own:\n%s", got)
	}
}

// TestReserved: the examples of Tencent's page.
// TestCounterparts: kubelet refuses to start with a default of ours beside the
// setting that stands for something else.
func TestCounterparts(t *testing.T) {
	for setting, ours := range map[string]string{
		"serializeImagePulls": "maxParallelImagePulls", "shutdownGracePeriodByPodPriority": "shutdownGracePeriod",
	} {
		with := kubeletConfig(node.Config{Kubelet: node.KubeletConfig{Config: map[string]any{setting: true}}}, labFacts, Machine{})
		without := kubeletConfig(node.Config{}, labFacts, Machine{})
		if with[ours] != nil || without[ours] == nil {
			t.Errorf("%s: %v with %s, %v without", ours, with[ours], setting, without[ours])
		}
	}
}

func TestReserved(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		m           Machine
		cpu, memory string
	}{
		{Machine{1, 2 * gib}, "100m", "512Mi"},
		{Machine{4, 8 * gib}, "100m", "1843Mi"},
		{Machine{32, 12 * gib}, "800m", "2252Mi"},
		{Machine{96, 32 * gib}, "2000m", "3645Mi"},
		{Machine{196, 320 * gib}, "2740m", "13475Mi"},
	} {
		want := map[string]any{"cpu": c.cpu, "memory": c.memory}
		if got := reserved(c.m); !reflect.DeepEqual(got, want) {
			t.Errorf("%+v: got %v, want %v", c.m, got, want)
		}
	}
}

func TestThisMachine(t *testing.T) {
	m, err := ThisMachine()
	if err != nil || m.CPUs < 1 || m.MemoryBytes < 1<<26 {
		t.Errorf("%+v, %v", m, err)
	}
}
