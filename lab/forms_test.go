//go:build node

package lab

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/lab/cloud"
)

// spares are disks that are alike, of which two are ours: the instance is to have as
// many as it can.
const spares = 16

// places are where the disks are to be, and what tells them apart.
var places = map[string]struct {
	sizeGiB int
	fs      string
}{
	"/var/lib/containerd": {20, "ext4"}, "/data": {30, "xfs"}, "/var/lib/kubelet": {40, "ext4"},
	"/spare/3": {10, "ext4"}, "/spare/16": {10, "ext4"}, "/archive": {12, "ext4"},
}

// formsConfig is the lab's NodeConfig with TKE's forms in place of its disks.
func formsConfig(t *testing.T, l *Lab, archive string) []byte {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "disks:\n  - {diskID: %s, attach: true, mountPoint: /archive}\ndataDisks:\n", archive)
	for _, dir := range []string{"/var/lib/kubelet", "/var/lib/containerd", "/data"} {
		fmt.Fprintf(&b, "  - {DiskType: CLOUD_PREMIUM, FileSystem: %s, DiskSize: %d, AutoFormatAndMount: true, MountTarget: %s}\n", places[dir].fs, places[dir].sizeGiB, dir)
	}
	for i := range spares {
		if dir := fmt.Sprintf("/spare/%d", i+1); places[dir].fs != "" {
			fmt.Fprintf(&b, "  - {DiskType: CLOUD_PREMIUM, FileSystem: ext4, DiskSize: 10, AutoFormatAndMount: true, MountTarget: %s}\n", dir)
		} else {
			b.WriteString("  - {DiskType: CLOUD_PREMIUM, DiskSize: 10, AutoFormatAndMount: false}\n")
		}
	}
	return userData(t, l, labDisks, b.String())
}

// found returns what is mounted at each place: the disk's own serial, its size and
// its file system's type and UUID.
func found(t *testing.T, l *Lab, c *CVM) map[string]string {
	t.Helper()
	out := l.mustRun(t, c, `for dir in /var/lib/containerd /data /var/lib/kubelet /spare/3 /spare/16 /archive; do
		dev=$(findmnt -no SOURCE $dir) || continue
		echo "$dir $(cat /sys/block/$(basename $dev)/serial) $(( $(cat /sys/block/$(basename $dev)/size) / 2097152 )) $(findmnt -no FSTYPE,UUID $dir | tr -s ' ')"; done`)
	all := map[string]string{}
	for line := range strings.Lines(out) {
		dir, what, _ := strings.Cut(strings.TrimSpace(line), " ")
		all[dir] = what
	}
	return all
}

// TestCampaignDiskForms: a node with 20 disks, of which the NodeConfig says only what a
// TKE nodepool does, has each at its place, and has it there again although the
// machine starts with its devices the other way round.
func TestCampaignDiskForms(t *testing.T) {
	l := startLab(t)
	archive := l.Region.CreateDisk("", cloud.DiskSpec{SizeGiB: places["/archive"].sizeGiB}).ID
	sizes := append([]int{40, 20, 30}, slices.Repeat([]int{10}, spares)...)
	c, err := l.Launch(t.Context(), LaunchSpec{DataDisks: sizes, UserData: formsConfig(t, l, archive)})
	if err != nil {
		t.Fatal(err)
	}
	ready(t, l, c, 15*time.Minute)
	converged(t, l, c)
	t.Logf("%s", l.mustRun(t, c, "tkenode disks; tkenode explain disk "+archive+"; tkenode explain disk disk/var/lib/kubelet || true; cat /var/lib/tkenode/disk/bindings; lsblk -o NAME,SERIAL,SIZE,MOUNTPOINT"))
	before := found(t, l, c)
	for dir, p := range places {
		if f := strings.Fields(before[dir]); len(f) != 4 || f[1] != fmt.Sprint(p.sizeGiB) || f[2] != p.fs {
			t.Errorf("at %s is %q, want %d GiB with %s", dir, before[dir], p.sizeGiB, p.fs)
		}
	}
	if !strings.HasPrefix(before["/archive"], archive+" ") {
		t.Errorf("at /archive is %q, want %s", before["/archive"], archive)
	}
	var state []cloud.Disk
	for _, d := range l.Region.Snapshot().Disks {
		if d.Instance == c.ID && !d.System {
			state = append(state, d)
		}
	}
	if len(state) != len(sizes)+1 {
		t.Errorf("the instance has %d disks, want %d", len(state), len(sizes)+1)
	}

	t.Run("other order", func(t *testing.T) {
		devices := func() string {
			return l.mustRun(t, c, "grep -H . /sys/block/vd*/serial | sed 's,/sys/block/,,; s,/serial,,'")
		}
		was := devices()
		slices.SortFunc(state, func(a, b cloud.Disk) int { return b.Attached.Compare(a.Attached) })
		restart(t, l, c, state)
		converged(t, l, c)
		if now := devices(); now == was {
			t.Errorf("the devices have the names that they had:\n%s", now)
		} else {
			t.Logf("devices before:\n%s\nand after:\n%s", was, now)
		}
		after := found(t, l, c)
		for dir, what := range before {
			if after[dir] != what {
				t.Errorf("at %s was %q and is %q", dir, what, after[dir])
			}
		}
	})
	t.Run("taken out", func(t *testing.T) { testTakenOut(t, l, c, archive) })
}

// restart turns a machine off and on again, with its disks in this order.
func restart(t *testing.T, l *Lab, c *CVM, disks []cloud.Disk) {
	t.Helper()
	m, err := l.host.machine(c.ID)
	if err == nil {
		err = m.Stop(within(t, 5*time.Minute))
	}
	if err != nil {
		t.Fatal(err)
	}
	m.follow()
	<-m.done
	var again cloud.Machine
	all := l.Region.Snapshot()
	for _, in := range all.Instances {
		if in.ID == c.ID {
			again = cloud.Machine{Instance: in.ID, UUID: in.UUID, Hostname: in.Name, Image: in.Image, CPUs: 2, MemoryMiB: 4 << 10}
		}
	}
	for _, e := range all.ENIs {
		mac, err := net.ParseMAC(e.MAC)
		if err != nil {
			t.Fatal(err)
		}
		switch nic := (cloud.NIC{ENI: e.ID, MAC: mac}); {
		case e.Instance != c.ID:
		case e.Primary:
			again.NICs = append([]cloud.NIC{nic}, again.NICs...)
		default:
			again.NICs = append(again.NICs, nic)
		}
	}
	for _, d := range disks {
		again.Volumes = append(again.Volumes, cloud.Volume{Disk: d.ID, SizeGiB: d.SizeGiB})
	}
	if err := l.host.Run(within(t, time.Minute), again); err != nil {
		t.Fatal(err)
	}
	ctx := within(t, 12*time.Minute)
	for {
		if _, err := l.SSH(ctx, c.IP, "true"); err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("the machine did not come back\nconsole:\n%s", Tail(c.Console(), 40))
		}
		time.Sleep(time.Second)
	}
}

// testTakenOut seals a generation without the disk that the agent has attached: it is
// unmounted and detached once nobody uses it, and the node goes on meanwhile.
func testTakenOut(t *testing.T, l *Lab, c *CVM, archive string) {
	l.mustRun(t, c, without(t, l, c, archive)+`
		systemd-run -q --unit=holds-archive --working-directory=/archive sleep infinity
		systemctl restart tkenode-bootstrap tkenode-agent`)
	l.mustRun(t, c, `timeout 120 sh -c 'until tkenode status -o json | grep -q "is still used on /archive by sleep (pid"; do sleep 1; done'`)
	ready(t, l, c, time.Minute)
	l.mustRun(t, c, "systemctl stop holds-archive")
	givenBack(t, l, c, archive)
	converged(t, l, c)
	if out := l.mustRun(t, c, "findmnt -n /archive; ls /var/lib/tkenode/disk; journalctl -b -o cat -u tkenode-agent | grep -E 'unmounted|detach'"); strings.Contains(out, ".attached") {
		t.Errorf("the note is still there:\n%s", out)
	} else {
		t.Logf("%s", out)
	}
}

// without returns the commands that seal a generation without the entry that names a
// disk.
func without(t *testing.T, l *Lab, c *CVM, id string) string {
	t.Helper()
	var s node.Sealed
	if err := json.Unmarshal([]byte(l.mustRun(t, c, "tkenode config show")), &s); err != nil {
		t.Fatal(err)
	}
	s.Config.Disks = slices.DeleteFunc(s.Config.Disks, func(d node.DiskConfig) bool { return slices.Contains(d.IDs(), id) })
	next, err := node.Seal(s.Generation+1, s.Config, s.Facts, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	next.Machine = s.Machine
	b, err := next.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("cd %s && echo %s | base64 -d > %d.json && chmod 600 %d.json && ln -sfn %d.json current",
		node.ConfigDir, base64.StdEncoding.EncodeToString(b), next.Generation, next.Generation, next.Generation)
}

// givenBack waits until the cloud says of disks that nobody has them.
func givenBack(t *testing.T, l *Lab, c *CVM, ids ...string) {
	t.Helper()
	ctx := within(t, 2*time.Minute)
	for {
		free := 0
		for _, d := range l.Region.Snapshot().Disks {
			if slices.Contains(ids, d.ID) && d.State == "UNATTACHED" && d.Instance == "" {
				free++
			}
		}
		if free == len(ids) {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("of %d disks %d are detached:\n%s", len(ids), free, l.mustRun(t, c, "tkenode status || true; journalctl -b -o cat -u tkenode-agent | tail -40"))
		}
		time.Sleep(time.Second)
	}
}
