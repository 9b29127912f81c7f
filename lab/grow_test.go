//go:build node

package lab

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/lab/cloud"
)

const (
	growRuntime = "disk-grow0001" // ext4, of containerd
	growData    = "disk-grow0002" // xfs
	growSecret  = "disk-grow0003" // ext4, encrypted
)

// TestCampaignDiskGrow resizes disks under a node: while they are mounted, while the agent
// is killed, and while the machine is off; and attaches others, which are not ours.
func TestCampaignDiskGrow(t *testing.T) {
	l := startLab(t)
	if err := l.FromSnapshot(within(t, 8*time.Minute), 2); err != nil {
		t.Fatal(err)
	}
	disks := fmt.Sprintf("disks:\n  - {diskID: %s, fileSystem: ext4, mountPoint: /var/lib/containerd}\n  - {diskID: %s, fileSystem: xfs, mountPoint: /data/xfs}\n"+
		"  - {diskID: %s, fileSystem: ext4, mountPoint: /data/secret}\n", growRuntime, growData, growSecret)
	c, err := l.Launch(t.Context(), LaunchSpec{UserData: userData(t, l, labDisks, disks), Disks: []cloud.DiskSpec{
		{ID: growRuntime, SizeGiB: 20}, {ID: growData, SizeGiB: 20}, {ID: growSecret, SizeGiB: 20, Encrypted: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	ready(t, l, c, 12*time.Minute)
	t.Logf("at first:\n%s", l.mustRun(t, c, "tkenode disks; cat /sys/block/vd*/queue/discard_max_bytes"))

	t.Run("mounted", func(t *testing.T) { testGrowMounted(t, l, c) })
	t.Run("others", func(t *testing.T) { testOthers(t, l, c) })
	t.Run("killed", func(t *testing.T) { testGrowKilled(t, l, c) })
	t.Run("encrypted", func(t *testing.T) { testGrowEncrypted(t, l, c) })
	t.Run("off", func(t *testing.T) {
		if err := l.PowerOff(within(t, 3*time.Minute), c); err != nil {
			t.Fatal(err)
		}
		l.resize(t, growRuntime, 300)
		l.resize(t, growData, 60)
		if err := l.PowerOn(within(t, time.Minute), c); err != nil {
			t.Fatal(err)
		}
		l.grown(t, c, "/var/lib/containerd", 280)
		l.grown(t, c, "/data/xfs", 55)
		converged(t, l, c)
	})
	t.Run("trim", func(t *testing.T) {
		// Its time, which the ids decide, comes between half a week and a week later than
		// that after it was formatted. It passes, and something makes the agent look.
		l.mustRun(t, c, `timedatectl set-ntp false; date -s "+11 days"`)
		l.resize(t, growData, 80)
		l.mustRun(t, c, `timeout 120 sh -c 'until journalctl -b -u tkenode-agent | grep -q "msg=trimmed.*`+growData+`"; do sleep 1; done'`)
		t.Logf("%s", l.mustRun(t, c, "journalctl -b -o cat -u tkenode-agent | grep -i trim; tkenode explain disk "+growData))
	})
}

// resize makes a disk larger, and waits until the cloud has.
func (l *Lab) resize(t *testing.T, id string, gib int) {
	t.Helper()
	l.act(t, "cbs:ResizeDisk", map[string]any{"DiskId": id, "DiskSize": gib})
	l.awaitDisk(t, id, func(d cloud.Disk) bool { return d.SizeGiB == gib && d.State != "EXPANDING" })
}

func (l *Lab) act(t *testing.T, action string, in any) {
	t.Helper()
	if err := l.Region.Act(action, in); err != nil {
		t.Fatal(err)
	}
}

func (l *Lab) awaitDisk(t *testing.T, id string, is func(cloud.Disk) bool) {
	t.Helper()
	for ctx := within(t, time.Minute); ; time.Sleep(100 * time.Millisecond) {
		disks := l.Region.Snapshot().Disks
		if i := slices.IndexFunc(disks, func(d cloud.Disk) bool { return d.ID == id }); i >= 0 && is(disks[i]) {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("%s: %+v", id, disks)
		}
	}
}

// grown waits until what is mounted has more than so many GiB.
func (l *Lab) grown(t *testing.T, c *CVM, target string, gib int) {
	t.Helper()
	out := l.mustRun(t, c, fmt.Sprintf(`timeout 180 sh -c 'until [ "$(findmnt -bno SIZE %s || echo 0)" -gt %d ]; do sleep 0.2; done' || { tkenode disks; tkenode plan; journalctl -b -o cat -u tkenode-agent | tail -30; }`, target, gib<<30))
	if out != "" {
		t.Fatalf("%s has not grown to %d GiB:\n%s", target, gib, out)
	}
}

func testGrowMounted(t *testing.T, l *Lab, c *CVM) {
	l.mustRun(t, c, `head -c 64M /dev/urandom >/data/xfs/before; sha256sum /data/xfs/before >/root/sum; nohup sh -c 'while :; do date +%s.%N >>/data/xfs/log; sync /data/xfs/log; sleep 0.05; done' >/dev/null 2>&1 &`)
	l.resize(t, growRuntime, 40)
	l.resize(t, growData, 40)
	l.grown(t, c, "/var/lib/containerd", 36)
	l.grown(t, c, "/data/xfs", 36)
	converged(t, l, c)
	out := l.mustRun(t, c, `sha256sum -c /root/sum; journalctl -b -o cat -u tkenode-agent | grep -E 'grow|DisksReady'; grep sizeBytes /var/lib/tkenode/disk/*.json; findmnt -no SOURCE,SIZE /data/xfs; tkenode disks; uname -r`)
	t.Logf("%s", out)
	for _, want := range []string{"grow ext4 on " + growRuntime + " from 20 GiB to 40 GiB", "grow xfs on " + growData + " from 20 GiB to 40 GiB", "/data/xfs/before: OK", fmt.Sprint(40 << 30)} {
		if !strings.Contains(out, want) {
			t.Errorf("there is no %q", want)
		}
	}
	if strings.Contains(out, "DisksReady is False") || strings.Contains(out, "DisksReady is Unknown") {
		t.Error("growing took DisksReady away")
	}
}

// testGrowKilled kills the agent, and now and then what it runs as well, while a large
// growth is under way: the next agent finds one that the kernel goes on with.
func testGrowKilled(t *testing.T, l *Lab, c *CVM) {
	l.act(t, "cbs:ResizeDisk", map[string]any{"DiskId": growRuntime, "DiskSize": 200})
	l.mustRun(t, c, `for whom in main all main main all main; do sleep 3; systemctl kill -s KILL --kill-whom=$whom tkenode-agent; done; true`)
	l.grown(t, c, "/var/lib/containerd", 180)
	converged(t, l, c)
	t.Logf("%s", l.mustRun(t, c, `journalctl -b -o cat -u tkenode-agent | grep -E 'grow|grown'; dmesg | grep -iE 'ext4|vd[b-e]' | tail -20`))
	if out := l.mustRun(t, c, `dmesg | grep -E 'EXT4-fs (error|warning)' || true`); out != "" {
		t.Error(out)
	}
}

// testGrowEncrypted: what the guest cannot see is said, and seen after a reattach.
func testGrowEncrypted(t *testing.T, l *Lab, c *CVM) {
	l.resize(t, growSecret, 40)
	l.mustRun(t, c, "systemctl restart tkenode-agent") // it asks the cloud soon after its start
	ctx := within(t, 3*time.Minute)
	for {
		s, err := l.status(t, c)
		if err == nil && slices.ContainsFunc(s.Warnings, func(w node.Condition) bool {
			return w.Type == node.DiskNotGrown && w.Reason == disk.ReasonNeedsReattach && strings.Contains(w.Message, growSecret+" has 40 GiB")
		}) {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("warnings %+v, %v\n%s", s.Warnings, err, l.mustRun(t, c, "journalctl -b -o cat -u tkenode-agent | tail -20"))
		}
		time.Sleep(time.Second)
	}
	converged(t, l, c)
	t.Logf("%s", l.mustRun(t, c, "tkenode status | head -20; tkenode disks; tkenode explain disk "+growSecret))
	l.mustRun(t, c, "systemctl stop tkenode-agent && umount /data/secret")
	l.act(t, "cbs:DetachDisks", map[string]any{"DiskIds": []string{growSecret}, "InstanceId": c.ID})
	l.awaitDisk(t, growSecret, func(d cloud.Disk) bool { return d.State == "UNATTACHED" })
	l.act(t, "cbs:AttachDisks", map[string]any{"DiskIds": []string{growSecret}, "InstanceId": c.ID})
	l.awaitDisk(t, growSecret, func(d cloud.Disk) bool { return d.State == "ATTACHED" })
	l.mustRun(t, c, "systemctl start tkenode-agent")
	l.grown(t, c, "/data/secret", 36)
	converged(t, l, c)
	if s, err := l.status(t, c); err != nil || len(s.Warnings) > 0 {
		t.Errorf("warnings %+v, %v", s.Warnings, err)
	}
}

// testOthers plays the CBS CSI driver: its disks are seen and left alone, and its
// count of volumes is lowered by the disks that are not its own.
func testOthers(t *testing.T, l *Lab, c *CVM) {
	kubectl := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(within(t, time.Minute), filepath.Join(l.options.Bin, "kubectl"), args...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+l.Cluster.Kubeconfig())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("kubectl %v: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	kubectl("patch", "csinode", c.Name(), "--type=merge", "-p", fmt.Sprintf(`{"spec":{"drivers":[{"name":%q,"nodeID":%q,"topologyKeys":null,"allocatable":{"count":18}}]}}`, disk.CSIDriver, c.ID))
	known := l.diskIDs()
	l.act(t, "cbs:CreateDisks", map[string]any{
		"Placement": map[string]string{"Zone": "ap-guangzhou-3"}, "DiskChargeType": "POSTPAID_BY_HOUR", "DiskType": "CLOUD_PREMIUM", "DiskSize": 10, "DiskCount": 3,
	})
	var made []string
	for ctx := within(t, time.Minute); len(made) < 3 && ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		made = slices.DeleteFunc(l.diskIDs(), func(id string) bool { return slices.Contains(known, id) })
	}
	right, wrong, hand := made[0], made[1], made[2]
	l.act(t, "cbs:AttachDisks", map[string]any{"DiskIds": made, "InstanceId": c.ID})
	for _, id := range made {
		l.awaitDisk(t, id, func(d cloud.Disk) bool { return d.State == "ATTACHED" })
	}
	// What kubelet and the driver make of a volume; the second one is what a stale
	// link leads to. mkfs is a human's here.
	l.mustRun(t, c, fmt.Sprintf(`set -e
		dev() { grep -lx "$1" /sys/block/vd*/serial | cut -d/ -f4; }
		stage() { # volume, disk
			dir=/var/lib/kubelet/plugins/kubernetes.io/csi/%[1]s/$(printf %%s "$1" | sha256sum | cut -d' ' -f1)
			mkdir -p $dir/globalmount
			printf '{"driverName":"%[1]s","volumeHandle":"%%s"}' "$1" >$dir/vol_data.json
			mkfs.ext4 -q /dev/$(dev "$2"); mount /dev/$(dev "$2") $dir/globalmount
		}
		for i in $(seq 100); do [ -n "$(dev %[2]s)" ] && [ -n "$(dev %[3]s)" ] && [ -n "$(dev %[4]s)" ] && break; sleep 0.1; done
		stage %[2]s %[2]s
		stage disk-another0 %[3]s
		mkfs.xfs -q /dev/$(dev %[4]s); mkdir -p /mnt/hand; mount /dev/$(dev %[4]s) /mnt/hand`, disk.CSIDriver, right, wrong, hand))
	l.mustRun(t, c, "systemctl restart tkenode-agent") // and the CSINode is looked at
	for _, id := range []string{right, hand} {
		l.resize(t, id, 20)
	}
	ctx := within(t, 3*time.Minute)
	for ; ; time.Sleep(time.Second) {
		// Three of the NodeConfig and one by hand; the driver's two are its own.
		count := kubectl("get", "csinode", c.Name(), "-o", "jsonpath={.spec.drivers[0].allocatable.count}")
		s, _ := l.status(t, c)
		warned := slices.ContainsFunc(s.Warnings, func(w node.Condition) bool {
			return w.Type == node.VolumeMismatch && strings.Contains(w.Message, wrong) && strings.Contains(w.Message, "disk-another0")
		})
		if count == "16" && warned {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("the CSINode has %s, warnings %+v\n%s", count, s.Warnings, l.mustRun(t, c, "tkenode disks; journalctl -b -o cat -u tkenode-agent | tail -20"))
		}
	}
	converged(t, l, c)
	t.Logf("%s", l.mustRun(t, c, "tkenode disks; tkenode status | head -12"))
	var notes map[string]string
	if err := json.Unmarshal([]byte(kubectl("get", "csinode", c.Name(), "-o", "jsonpath={.metadata.annotations}")), &notes); err != nil || notes["tkenode.io/cbs-count-published"] != "18" {
		t.Errorf("annotations %v, %v", notes, err)
	}
	sizes := l.mustRun(t, c, fmt.Sprintf("findmnt -bno SIZE /mnt/hand; findmnt -bno SIZE /var/lib/kubelet/plugins/kubernetes.io/csi/%s/$(printf %%s %s | sha256sum | cut -d' ' -f1)/globalmount; ls /var/lib/tkenode/disk", disk.CSIDriver, right))
	for _, text := range strings.Fields(sizes)[:2] {
		if size, err := strconv.ParseInt(text, 10, 64); err != nil || size > 12<<30 {
			t.Errorf("a disk that is not of the NodeConfig has grown: %s, %v", text, err)
		}
	}
	if strings.Contains(sizes, right) || strings.Contains(sizes, hand) {
		t.Errorf("the ledger knows disks that are not ours: %s", sizes)
	}
	l.mustRun(t, c, fmt.Sprintf("umount /mnt/hand /var/lib/kubelet/plugins/kubernetes.io/csi/%s/*/globalmount", disk.CSIDriver))
	l.act(t, "cbs:DetachDisks", map[string]any{"DiskIds": made, "InstanceId": c.ID})
	for _, id := range made {
		l.awaitDisk(t, id, func(d cloud.Disk) bool { return d.State == "UNATTACHED" })
	}
}

func (l *Lab) diskIDs() (ids []string) {
	for _, d := range l.Region.Snapshot().Disks {
		ids = append(ids, d.ID)
	}
	return ids
}
