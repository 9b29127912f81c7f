//go:build node

package lab

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/images"
	"github.com/tkenode/tkenode/lab/cloud"
)

// whole is set by the campaigns, which run every part of a test, and those that are called
// TestCampaign…. make test runs the parts that only a virtual machine can show.
var whole = flag.Bool("whole", false, "run every part of a test")

// artifacts returns what `tkelab build` has built; the test builds what is
// missing, so that it can be run by itself.
func artifacts(t *testing.T) *images.Artifacts {
	t.Helper()
	a, err := images.Build(t.Context(), images.Options{
		Source: "..", Cache: cache(t), Debs: []string{filepath.Join(cache(t), "tkenode.deb")}, Progress: logProgress{t},
	})
	if err != nil {
		t.Fatalf("build: %v; run: make test-node", err)
	}
	return a
}

func cache(t *testing.T) string {
	t.Helper()
	dir, err := images.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

type logProgress struct{ t *testing.T }

func (logProgress) Begin(string)                   {}
func (logProgress) Update(string, float64, string) {}
func (p logProgress) End(step string, err error) {
	if err != nil {
		p.t.Logf("%s: %v", step, err)
	}
}

// startLab starts a lab that ends with the test. What it says is shown if the
// test fails.
func startLab(t *testing.T) *Lab {
	t.Helper()
	a := artifacts(t)
	// Unix sockets allow about 100 bytes of path: the test's own directory is too long, and $TMPDIR may be.
	dir, err := os.MkdirTemp("/tmp", "tkelab")
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	l, err := Start(ctx, Options{Dir: dir, Cache: cache(t), Bin: a.Bin, Image: a.Disk, Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := l.Stop(ctx); err != nil {
			t.Errorf("stop lab: %v", err)
		}
		if t.Failed() {
			t.Logf("the lab's directory is kept: %s\n%s", dir, Tail(log.Name(), 40))
			return
		}
		os.RemoveAll(dir)
	})
	return l
}

// within bounds a step of a test. The bounds are no targets: a machine whose
// processors are lent to others took four times as long as it does by itself.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// userData returns the lab's NodeConfig with one part of it replaced.
func userData(t *testing.T, l *Lab, part, by string) []byte {
	t.Helper()
	v, err := l.NodeConfigValues(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return replace(part, by)(t, l, v)
}

// launchWith launches a node with other disks in its NodeConfig.
func launchWith(t *testing.T, l *Lab, disks string) *CVM {
	t.Helper()
	c, err := l.Launch(t.Context(), LaunchSpec{UserData: userData(t, l, labDisks, disks)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// labDisks is what stands of disks in the lab's NodeConfig.
const labDisks = "disks:\n  - fileSystem: ext4\n    mountPoint: /var/lib/containerd\n"

// ready waits until the CVM is a Ready node.
func ready(t *testing.T, l *Lab, c *CVM, d time.Duration) {
	t.Helper()
	if _, err := l.Cluster.WaitNodeReady(within(t, d), c.Name()); err != nil {
		marks, _ := c.Timeline.Marks()
		t.Fatalf("%v\nreached: %v\nconsole:\n%s", err, marks, Tail(c.Console(), 60))
	}
}

func (l *Lab) mustRun(t *testing.T, c *CVM, command string) string {
	t.Helper()
	// The first login waits for cloud-init, which comes after everything else.
	out, err := l.SSH(within(t, 12*time.Minute), c.IP, command)
	if err != nil {
		t.Fatalf("%v\nconsole:\n%s", err, Tail(c.Console(), 30))
	}
	return strings.TrimSpace(out)
}

// status asks the agent; while it is down there is an error.
func (l *Lab) status(t *testing.T, c *CVM) (s api.Status, err error) {
	t.Helper()
	// The exit status says whether every condition is met; here the text does.
	out := l.mustRun(t, c, "tkenode status -o json || true")
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("tkenode status -o json: %w: %s", err, out)
	}
	return s, nil
}

// TestNodeLifecycle is the life of one node as a user sees it.
func TestNodeLifecycle(t *testing.T) {
	l := startLab(t)
	c, err := l.Launch(t.Context(), LaunchSpec{DataDisks: []int{20}})
	if err != nil {
		t.Fatal(err)
	}
	ready(t, l, c, 12*time.Minute)
	for _, s := range Steps { // the console is read a moment later than it is written
		if _, err := c.Timeline.Wait(within(t, time.Minute), s); err != nil {
			t.Errorf("step %q is never shown: %v", s, err)
		}
	}
	marks, _ := c.Timeline.Marks()
	t.Logf("launch: %v", marks)

	n, err := l.Cluster.Node(t.Context(), c.Name())
	if err != nil {
		t.Fatal(err)
	}
	if want := "qcloud:///100003/" + c.ID; n.Spec.ProviderID != want {
		t.Errorf("provider id %q, want %q", n.Spec.ProviderID, want)
	}
	if n.Metadata.Labels["lab.tkenode.io/pool"] != "default" {
		t.Errorf("labels of the NodeConfig are missing: %v", n.Metadata.Labels)
	}

	var web Web
	t.Run("pod", func(t *testing.T) {
		web, err = l.RunWeb(within(t, 5*time.Minute), "web", c.Name())
		if err != nil {
			t.Fatal(err)
		}
		if !netip.MustParsePrefix("10.0.16.0/20").Contains(web.IP) {
			t.Errorf("the pod has %s, which is not of the secondary ENIs' subnet", web.IP)
		}
	})
	t.Run("kubectl", func(t *testing.T) { testKubectl(t, l) })
	t.Run("disk", func(t *testing.T) {
		out := l.mustRun(t, c, "findmnt -no SOURCE,FSTYPE /var/lib/containerd; cat /sys/block/$(findmnt -no SOURCE /var/lib/containerd | xargs basename)/serial")
		if !strings.Contains(out, "ext4") || !strings.Contains(out, "disk-") {
			t.Errorf("mounted at /var/lib/containerd: %s", out)
		}
		mountUnits(t, l, c)
	})
	t.Run("disk grows", func(t *testing.T) {
		disks := l.Region.Snapshot().Disks
		i := slices.IndexFunc(disks, func(d cloud.Disk) bool { return d.Instance == c.ID && !d.System })
		l.resize(t, disks[i].ID, 30)
		l.grown(t, c, node.ContainerdRoot, 27)
	})
	t.Run("seed", func(t *testing.T) {
		out := l.mustRun(t, c, "journalctl -b -o cat -u tkenode-agent | grep -E 'seed /var/lib/containerd|import localhost/' || true; ls -A /var/lib/containerd | grep tkenode-seed || true")
		if !strings.Contains(out, "with 2 baked images") || strings.Contains(out, "import localhost/") || strings.Contains(out, ".tkenode-seed") {
			t.Errorf("the baked images were not only seeded:\n%s", out)
		}
	})
	t.Run("converged", func(t *testing.T) { converged(t, l, c) })
	t.Run("metrics", func(t *testing.T) { testMetrics(t, l, c) })
	t.Run("units", func(t *testing.T) {
		// It waits until the boot is finished, cloud-init's last stage included.
		if out := l.mustRun(t, c, "systemctl is-system-running --wait || true"); out != "running" {
			t.Errorf("the system is %s", out)
		}
		if out := l.mustRun(t, c, "systemctl --failed --no-legend --plain || true"); out != "" {
			t.Errorf("failed units:\n%s", out)
		}
		if out := l.mustRun(t, c, "systemctl show -P ActiveState cloud-final.service"); out != "active" {
			t.Errorf("cloud-init's last stage is %s", out)
		}
	})
	t.Run("no secrets", func(t *testing.T) {
		v, err := l.NodeConfigValues(t.Context()) // of the same form as the one that was used
		if err != nil {
			t.Fatal(err)
		}
		id, _, _ := strings.Cut(v.Token, ".")
		out := l.mustRun(t, c, `grep -rlE '"?bootstrapToken"?: *"?[a-z0-9]{6}\.[a-z0-9]{16}' /var/lib/tkenode /run/tkenode /etc/kubernetes 2>/dev/null; journalctl -b -u tkenode-bootstrap -u tkenode-agent | grep -E '[a-z0-9]{6}\.[a-z0-9]{16}' || true`)
		if out != "" {
			t.Errorf("a bootstrap token (such as %s.…) stands in:\n%s", id, out)
		}
	})
	t.Run("agent killed", func(t *testing.T) {
		before := l.mustRun(t, c, "systemctl show -P MainPID tkenode-agent; systemctl show -P MainPID kubelet; systemctl show -P MainPID containerd")
		l.mustRun(t, c, "systemctl kill -s KILL tkenode-agent")
		converged(t, l, c)
		after := l.mustRun(t, c, "systemctl show -P MainPID tkenode-agent; systemctl show -P MainPID kubelet; systemctl show -P MainPID containerd")
		b, a := strings.Fields(before), strings.Fields(after)
		if len(a) != 3 || a[0] == b[0] || a[1] != b[1] || a[2] != b[2] {
			t.Errorf("agent, kubelet, containerd were %v and are %v: only the agent's should differ", b, a)
		}
		if err := l.fetch(within(t, time.Minute), web.IP); err != nil {
			t.Errorf("the pod after the agent was killed: %v", err)
		}
	})
	t.Run("reboot", func(t *testing.T) { testReboot(t, l, c) })
}

// converged waits until every condition is met, and then wants an empty plan.
func converged(t *testing.T, l *Lab, c *CVM) {
	t.Helper()
	ctx := within(t, 5*time.Minute)
	for {
		s, err := l.status(t, c)
		if err == nil && s.Unmet == nil && len(s.Conditions) == len(node.ConditionTypes) {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("unmet: %+v, %v", s.Unmet, err)
		}
		time.Sleep(time.Second)
	}
	for { // what is left is for what may come, as one more spare address
		out := l.mustRun(t, c, "tkenode plan -o json || [ $? = 3 ]")
		var p api.Plan
		if err := json.Unmarshal([]byte(out), &p); err != nil {
			t.Fatalf("tkenode plan -o json: %v: %s", err, out)
		}
		if p.Empty() && len(p.Instances) > 0 {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("plan of a converged node: %s", out)
		}
		time.Sleep(time.Second)
	}
}

func testMetrics(t *testing.T, l *Lab, c *CVM) {
	ctx := within(t, 5*time.Minute)
	for _, query := range []string{
		fmt.Sprintf(`node_memory_MemTotal_bytes{instance=%q}`, c.ID),
		fmt.Sprintf(`rate(node_cpu_seconds_total{instance=%q,mode="idle"}[1m])`, c.ID),
		fmt.Sprintf(`node_filesystem_size_bytes{instance=%q,mountpoint="/var/lib/containerd"}`, c.ID),
		fmt.Sprintf(`tkenode_condition{instance=%q,type="NodeReady",status="True"} == 1`, c.ID),
	} {
		for {
			samples, err := l.Monitor.Query(ctx, query)
			if err == nil && len(samples) > 0 {
				break
			}
			if ctx.Err() != nil {
				t.Fatalf("%s: %d samples, %v", query, len(samples), err)
			}
			time.Sleep(time.Second)
		}
	}
}

// testReboot reboots the machine and wants the same node back.
func testReboot(t *testing.T, l *Lab, c *CVM) {
	identity := func() string {
		return l.mustRun(t, c, `openssl x509 -noout -serial -subject -in /var/lib/tkenode/pki/kubelet-client-current.pem
			findmnt -no UUID /var/lib/containerd
			ip rule show | grep -E '^(512|153[6-9]):'
			cat /var/lib/tkenode/config/current | sha256sum`)
	}
	before, boot := identity(), l.mustRun(t, c, "cat /proc/sys/kernel/random/boot_id")
	_, _ = l.SSH(within(t, time.Minute), c.IP, "systemctl reboot") // the connection may go first
	ctx := within(t, 12*time.Minute)
	for {
		out, err := l.SSH(ctx, c.IP, "cat /proc/sys/kernel/random/boot_id")
		if err == nil && strings.TrimSpace(out) != boot {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("the machine did not come back: %v\nconsole:\n%s", err, Tail(c.Console(), 40))
		}
		time.Sleep(time.Second)
	}
	converged(t, l, c)
	ready(t, l, c, 5*time.Minute)
	mountUnits(t, l, c)
	if after := identity(); after != before {
		t.Errorf("identity before the reboot:\n%s\nand after:\n%s", before, after)
	}
	if _, err := l.RunWeb(within(t, 5*time.Minute), "web-after-reboot", c.Name()); err != nil {
		t.Error(err)
	}
}
