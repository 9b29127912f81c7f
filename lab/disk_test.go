//go:build node

package lab

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/kube"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/images"
	"github.com/tkenode/tkenode/lab/cloud"
	labkube "github.com/tkenode/tkenode/lab/kube"
)

// losses is a node with a disk for containerd and one at /data, whose disks are
// taken from it.
type losses struct {
	*Lab
	t *testing.T
	c *CVM
}

var (
	runtimeDisk = cloud.Volume{Disk: "disk-lossrun1", SizeGiB: 6}
	dataDisk    = cloud.Volume{Disk: "disk-lossdat1", SizeGiB: 1}
)

// TestNodeDiskLoss: disks that go ill, or go away, under a node that works.
func TestNodeDiskLoss(t *testing.T) {
	l := startLab(t)
	if err := l.FromSnapshot(within(t, 8*time.Minute), 2); err != nil {
		t.Fatal(err)
	}
	disks := fmt.Sprintf("disks:\n  - {diskID: %s, fileSystem: ext4, mountPoint: %s}\n  - {diskID: %s, fileSystem: ext4, mountPoint: /data}\n",
		runtimeDisk.Disk, node.ContainerdRoot, dataDisk.Disk)
	c := launchWith(t, l, disks)
	n := &losses{l, t, c}
	n.plug(runtimeDisk)
	n.plug(dataDisk)
	ready(t, l, c, 12*time.Minute)
	converged(t, l, c)
	marks, _ := c.Timeline.Marks()
	t.Logf("launch: %v", marks)

	t.Run("mount units", func(t *testing.T) { mountUnits(t, l, c, "data.mount") })
	t.Run("read-only", n.readOnly)
	t.Run("hangs", n.hang)
	if *whole {
		t.Run("hangs before it is mounted", n.hangUnmounted)
		t.Run("ext4 error", n.ext4Error)
	}
	t.Run("data disk torn out", n.loseData)
	t.Run("runtime disk torn out", n.loseRuntime)
}

func (n *losses) plug(v cloud.Volume) {
	n.t.Helper()
	if err := n.host.PlugDisk(within(n.t, time.Minute), n.c.ID, v); err != nil {
		n.t.Fatal(err)
	}
}

// tearOut takes a disk away: every access fails from then on, and then the device
// goes.
func (n *losses) tearOut(t *testing.T, v cloud.Volume) {
	t.Helper()
	m, err := n.host.machine(n.c.ID)
	if err == nil {
		err = m.PullDisk(within(t, time.Minute), v.Disk)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (n *losses) sh(t *testing.T, command string) string {
	t.Helper()
	return n.mustRun(t, n.c, command)
}

// until waits until the Node is as it is to be.
func (n *losses) until(t *testing.T, what string, is func(*labkube.Node) bool) {
	t.Helper()
	ctx, began := within(t, 4*time.Minute), time.Now()
	for {
		o, err := n.Cluster.Node(ctx, n.c.Name())
		if err == nil && is(o) {
			t.Logf("%s after %s", what, time.Since(began).Round(time.Second))
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("never: %s; the Node: %+v, %v\n%s", what, o, err, n.sh(t, "tkenode status; tkenode disks; tkenode plan; journalctl -b -u tkenode-agent -n 60 --no-pager -o cat"))
		}
		time.Sleep(500 * time.Millisecond)
	}
}

func (n *losses) condition(t *testing.T, kind node.ConditionType, status node.Status, reason string) {
	t.Helper()
	n.until(t, fmt.Sprintf("%s is %s (%s)", kind, status, reason), func(o *labkube.Node) bool {
		c := o.Condition(string(kind))
		return c.Status == string(status) && c.Reason == reason
	})
}

func (n *losses) cordoned(t *testing.T, yes bool) {
	t.Helper()
	n.until(t, fmt.Sprintf("cordoned is %v", yes), func(o *labkube.Node) bool {
		_, ours := o.Metadata.Annotations[kube.CordonedBy]
		return o.Spec.Unschedulable == yes && ours == yes
	})
}

// expect fails unless what a command prints has all of want in it.
func (n *losses) expect(t *testing.T, command string, want ...string) {
	t.Helper()
	out := n.sh(t, command)
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("%s: %q is not in\n%s", command, w, out)
		}
	}
}

// mountUnits: systemd knows the mounts, has not been reloaded for them, and containerd
// requires its own.
func mountUnits(t *testing.T, l *Lab, c *CVM, units ...string) {
	t.Helper()
	for _, u := range append(units, "var-lib-containerd.mount") {
		out := l.mustRun(t, c, "systemctl show -p FragmentPath -p ActiveState -p NeedDaemonReload "+u)
		for _, want := range []string{"FragmentPath=/run/systemd/system/" + u, "ActiveState=active", "NeedDaemonReload=no"} {
			if !strings.Contains(out, want) {
				t.Errorf("%s: %q is not in %s", u, want, out)
			}
		}
	}
	for _, property := range []string{"Requires", "After"} {
		if out := l.mustRun(t, c, "systemctl show -P "+property+" containerd"); !strings.Contains(out, "var-lib-containerd.mount") {
			t.Errorf("containerd's %s: %s", property, out)
		}
	}
	if out := l.mustRun(t, c, "journalctl -b -u tkenode-agent -o cat | grep 'reload systemd' || true"); out != "" {
		t.Errorf("systemd was reloaded: %s", out)
	}
}

// write runs a pod that writes to /data, and waits until it does.
func (n *losses) write(t *testing.T, name string) {
	t.Helper()
	ctx := within(t, 5*time.Minute)
	err := n.Cluster.RunPod(ctx, labkube.Pod{
		Name: name, Node: n.c.Name(), Image: images.Web, HostPath: "/data",
		Command: []string{"sh", "-c", "while true; do date >> /data/" + name + "; sync; sleep 1; done"},
	})
	if err == nil {
		_, err = n.Cluster.WaitPodRunning(ctx, name)
	}
	if err != nil {
		t.Fatal(err)
	}
	n.sh(t, "for i in $(seq 60); do test -s /data/"+name+" && exit; sleep 1; done; exit 1")
}

func (n *losses) readOnly(t *testing.T) {
	n.sh(t, "mount -o remount,ro /data")
	n.condition(t, node.ReadonlyFilesystem, node.True, "DiskReadOnly")
	n.expect(t, "tkenode status || true", "ReadonlyFilesystem since")
	n.expect(t, "tkenode disks", "ReadonlyFilesystem since")
	n.sh(t, "mount -o remount,rw /data")
	n.condition(t, node.ReadonlyFilesystem, node.False, "DiskWritable")
	converged(t, n.Lab, n.c)
}

// throttle makes the disk of /data stop, or go on, to answer.
func (n *losses) throttle(t *testing.T, hang bool) {
	t.Helper()
	m, err := n.host.machine(n.c.ID)
	if err == nil {
		err = m.HangDisk(within(t, time.Minute), dataDisk.Disk, hang)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// restart restarts the agent, and fails unless the old one ends by itself.
func (n *losses) restart(t *testing.T) {
	t.Helper()
	before := n.sh(t, "systemctl show -P MainPID tkenode-agent")
	began := time.Now()
	n.sh(t, "systemctl restart tkenode-agent")
	took := time.Since(began)
	if after := n.sh(t, "systemctl show -P MainPID tkenode-agent"); after == before {
		t.Errorf("the agent was %s and is %s", before, after)
	}
	// systemd would say that it has not ended.
	if out := n.sh(t, "journalctl -b -u tkenode-agent -o cat | grep -E 'stop-sig[a-z]+. timed out|still around' || true"); out != "" {
		t.Errorf("the agent did not end by itself: %s", out)
	}
	t.Logf("restarted in %s beside a disk that hangs", took.Round(100*time.Millisecond))
}

// hang: a disk that does not answer is told of, and keeps nobody from restarting the
// agent.
func (n *losses) hang(t *testing.T) {
	n.throttle(t, true)
	defer n.throttle(t, false) // the next part is not to suffer when this one fails
	n.condition(t, node.IOError, node.True, "DiskHung")
	n.expect(t, "tkenode disks", "does not answer")
	scope := "systemctl list-units --no-legend --plain 'tkenode-disk-helper-data.scope'"
	n.expect(t, scope, "running")
	n.restart(t)
	n.sh(t, "for i in $(seq 90); do tkenode disks 2>/dev/null | grep -q 'does not answer' && exit; sleep 1; done; tkenode disks >&2; exit 1")
	n.throttle(t, false)
	n.condition(t, node.IOError, node.False, "DiskAnswers")
	converged(t, n.Lab, n.c)
	if out := n.sh(t, scope); out != "" {
		t.Errorf("left: %s", out)
	}
}

// hangUnmounted: the same of a disk that is only to be mounted.
func (n *losses) hangUnmounted(t *testing.T) {
	n.sh(t, "systemctl stop tkenode-cni.socket tkenode-agent; umount /data")
	n.throttle(t, true)
	defer n.throttle(t, false)
	n.sh(t, "systemctl start tkenode-agent")
	// Which of the two does not return first, the read of what it holds or that of its
	// serial, is a matter of chance.
	says := func() {
		t.Helper()
		n.sh(t, "for i in $(seq 90); do tkenode disks 2>/dev/null | grep -qE 'does not answer|has not told its serial, as a disk does not that hangs' && exit; sleep 1; done; tkenode disks >&2; exit 1")
	}
	says()
	n.restart(t)
	says()
	n.throttle(t, false)
	converged(t, n.Lab, n.c)
	n.expect(t, "findmnt -no SOURCE,TARGET /data", "/data")
	if out := n.sh(t, "systemctl list-units --no-legend --plain 'tkenode-disk-helper-data-reads-*.scope'"); out != "" {
		t.Errorf("left: %s", out)
	}
}

func (n *losses) ext4Error(t *testing.T) {
	dev := n.sh(t, "basename $(findmnt -no SOURCE /data)")
	n.sh(t, "echo 1 > /sys/fs/ext4/"+dev+"/trigger_fs_error")
	n.condition(t, node.Ext4Error, node.True, "DiskDamaged")
	n.condition(t, node.ReadonlyFilesystem, node.True, "DiskReadOnly")
	n.expect(t, "tkenode explain disk "+dataDisk.Disk+" || true", "Ext4Error since", "noted")
	// As RUNBOOK.md says it.
	n.sh(t, "systemctl stop tkenode-cni.socket tkenode-agent; umount /data; e2fsck -fy /dev/"+dev+"; systemctl start tkenode-agent")
	n.condition(t, node.Ext4Error, node.False, "DiskSound")
	n.condition(t, node.ReadonlyFilesystem, node.False, "DiskWritable")
	converged(t, n.Lab, n.c)
}

func (n *losses) loseData(t *testing.T) {
	n.write(t, "writer")
	pids := "systemctl show -P MainPID kubelet containerd"
	before := n.sh(t, pids)
	n.tearOut(t, dataDisk)
	n.cordoned(t, true)
	n.condition(t, node.IOError, node.True, "DiskGone")
	n.expect(t, "tkenode disks", dataDisk.Disk, "Gone", "is gone since", "attach it to this instance again")
	n.expect(t, "tkenode status || true", "IOError since")
	if out := n.sh(t, "findmnt /data; ls -A /data; touch /data/beneath 2>/dev/null && echo written || true"); out != "" {
		t.Errorf("the bare directory: %s", out)
	}
	n.plug(dataDisk)
	n.cordoned(t, false)
	n.condition(t, node.IOError, node.False, "DiskAnswers")
	converged(t, n.Lab, n.c)
	if out := n.sh(t, "head -1 /data/writer"); !strings.Contains(out, "UTC") {
		t.Errorf("what was written before: %q", out)
	}
	if after := n.sh(t, pids); after != before {
		t.Errorf("kubelet and containerd were stopped for /data: %s, %s", before, after)
	}
	n.expect(t, "systemctl show -p FragmentPath,ActiveState,NeedDaemonReload data.mount", "ActiveState=active")
	if err := n.Cluster.DeletePod(within(t, 3*time.Minute), "writer"); err != nil {
		t.Error(err)
	}
	n.write(t, "writer-2")
}

func (n *losses) loseRuntime(t *testing.T) {
	web, err := n.RunWeb(within(t, 5*time.Minute), "web", n.c.Name())
	if err != nil {
		t.Fatal(err)
	}
	// Whoever fences is killed again and again.
	n.sh(t, "systemd-run -q sh -c 'for i in 1 2 3 4; do systemctl kill -s KILL tkenode-agent; sleep 4; done'")
	n.tearOut(t, runtimeDisk)
	n.cordoned(t, true)
	n.condition(t, node.IOError, node.True, "DiskGone")
	n.expect(t, `for i in $(seq 120); do out=$(tkenode disks 2>&1); case $out in *"pods are stopped"*) break;; esac; sleep 1; done; echo "$out"`, runtimeDisk.Disk, "Gone", "kubelet, containerd and the pods are stopped")
	if out := n.sh(t, "systemctl is-active kubelet containerd; grep populated /sys/fs/cgroup/kubepods.slice/cgroup.events; findmnt /var/lib/containerd; true"); strings.Contains(out, "\nactive") || strings.HasPrefix(out, "active") || !strings.Contains(out, "populated 0") || strings.Contains(out, "/dev/") {
		t.Errorf("after the fence: %s", out)
	}
	n.plug(runtimeDisk)
	began := time.Now()
	n.cordoned(t, false)
	ready(t, n.Lab, n.c, 8*time.Minute)
	converged(t, n.Lab, n.c)
	ctx := within(t, 8*time.Minute)
	for {
		p, err := n.Cluster.WaitPodRunning(ctx, "web")
		if err != nil {
			t.Fatalf("%v\n%s", err, n.sh(t, "journalctl -b -u kubelet -n 40 --no-pager -o cat; crictl pods 2>/dev/null || true; journalctl -b -u containerd -n 40 --no-pager -o cat"))
		}
		if web.IP = p.Status.PodIP; n.fetch(ctx, web.IP) == nil {
			break
		}
		time.Sleep(time.Second)
	}
	t.Logf("its pod answers %s after the disk is back", time.Since(began).Round(time.Second))
}
