//go:build kernel

package disk

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// plugs is a hypervisor that does with disks what a test says.
type plugs struct {
	idle
	plug, unplug func(id string)
}

func (p *plugs) PlugDisk(_ context.Context, _ string, v cloud.Volume) error {
	if p.plug != nil {
		p.plug(v.Disk)
	}
	return nil
}

func (p *plugs) UnplugDisk(_ context.Context, _, id string) error {
	if p.unplug != nil {
		p.unplug(id)
	}
	return nil
}

// labCloud is a region with one instance, and the API as that sees it.
type labCloud struct {
	*cloud.Region
	*plugs
	instance cloud.Instance
	client   *tencent.Client
	sealed   node.Sealed
}

func newLabCloud(t *testing.T, delays cloud.Delays, disks ...cloud.DiskSpec) *labCloud {
	t.Helper()
	l := &labCloud{plugs: &plugs{}}
	config := cloud.Default()
	config.Delays, config.Log = delays, slog.New(slog.DiscardHandler)
	var err error
	if l.Region, err = cloud.New(config, l.plugs, idle{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Region.Close)
	if l.instance, err = l.Launch(t.Context(), cloud.InstanceSpec{DataDisks: disks}); err != nil {
		t.Fatal(err)
	}
	metadata := tencent.NewMetadata("")
	metadata.HTTP.Transport = direct{l.Region.Metadata(), l.instance.PrivateIP.String()}
	if l.client, err = tencent.NewClient(node.CloudConfig{APIDomain: config.Domain}, config.Region, metadata); err != nil {
		t.Fatal(err)
	}
	l.client.HTTP.Transport = direct{l.Region.API(), l.instance.PrivateIP.String()}
	l.sealed.Generation = 1
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) { // until it is known
		if l.sealed.Facts, err = metadata.Facts(t.Context()); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	return l
}

// disk returns what the region has of a disk.
func (l *labCloud) disk(t *testing.T, id string) cloud.Disk {
	t.Helper()
	for _, d := range l.Snapshot().Disks {
		if d.ID == id {
			return d
		}
	}
	t.Fatalf("the region has no %s", id)
	return cloud.Disk{}
}

// bench makes a bench a disk of the instance, of the configuration so far.
func (l *labCloud) bench(t *testing.T, sizeGiB int64, want node.DiskConfig) *bench {
	t.Helper()
	b := newBench(t, node.Ext4, func(f string) { truncate(t, f, sizeGiB<<30) })
	want.FileSystem, want.MountPoint = node.Ext4, b.want.MountPoint
	b.want, b.cloud, b.firstBoot = want, l.client, true
	l.sealed.Config.Disks = append(l.sealed.Config.Disks, want)
	return b
}

// until plans and applies, as the engine does, until nothing is left to do or an error
// is not one of waiting for what waits says.
func (b *bench) until(t *testing.T, waits string) error {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		p, err := b.plan(t)
		if err == nil && p.Empty() {
			return nil
		}
		if err == nil {
			err = b.Apply(t.Context(), p)
		}
		if reason := node.ReasonOf(err, ""); err != nil && reason != waits && reason != "Throttled" {
			return err
		}
		if err != nil {
			time.Sleep(100 * time.Millisecond)
		}
	}
	t.Fatal("no end")
	return nil
}

// TestKernelSelectors: two disks find their places by what the cloud says of them,
// once, and keep them whatever it says afterwards.
func TestKernelSelectors(t *testing.T) {
	l := newLabCloud(t, cloud.Delays{}, cloud.DiskSpec{SizeGiB: 20}, cloud.DiskSpec{SizeGiB: 30})
	small := l.bench(t, 20, node.DiskConfig{Selector: node.DiskSelector{SizeGiB: 20}})
	large := l.bench(t, 30, node.DiskConfig{Selector: node.DiskSelector{Type: "CLOUD_PREMIUM", Order: 2}})
	large.ledger = small.ledger
	ids := map[string]string{}
	for _, d := range l.Snapshot().Disks {
		ids[map[int]string{20: "small", 30: "large"}[d.SizeGiB]] = d.ID
	}
	for name, b := range map[string]*bench{"small": small, "large": large} {
		b.sealed = l.sealed
		b.setSerial(t, ids[name])
	}
	p, err := large.plan(t)
	if err != nil || len(p.Changes) != 1 || !strings.HasPrefix(p.String(), "bind "+large.want.MountPoint+" to "+ids["large"]) {
		t.Fatalf("first plan: %v%v", p, err)
	}
	if _, err := os.Stat(filepath.Join(string(small.ledger), bindingsFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a plan has written: %v", err)
	}
	if err := large.until(t, ""); err != nil {
		t.Fatal(err)
	}
	if kept, err := small.ledger.bindings(); err != nil || len(kept) != 2 {
		t.Errorf("kept: %+v, %v", kept, err)
	}
	// Bound by the other's step, it does not ask the cloud of bindings again.
	calls := l.Snapshot().Calls["cvm:DescribeInstances"]
	if p, err := small.plan(t); err != nil || !strings.HasPrefix(p.String(), "format "+ids["small"]) {
		t.Fatalf("the other's plan: %v%v", p, err)
	}
	if now := l.Snapshot().Calls["cvm:DescribeInstances"]; now != calls {
		t.Errorf("%d calls, were %d", now, calls)
	}
	if err := small.until(t, ""); err != nil {
		t.Fatal(err)
	}
	if st := small.State(); st.State != Mounted || st.DiskID != ids["small"] || st.BoundBy != "selector" || !strings.Contains(st.Binding, "kept for ever") {
		t.Errorf("state %+v", st)
	}
	// The cloud is silent, and an agent that starts knows nothing but the file.
	small.cloud, large.cloud = nil, nil
	for _, b := range []*bench{small, large} {
		if p, err := b.plan(t); err != nil || !p.Empty() {
			t.Errorf("without the cloud: %v%v", p, err)
		}
	}
	// A torn file stops everything, and says what to do.
	path := filepath.Join(string(small.ledger), bindingsFile)
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, b[:len(b)/2], 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if p, err := small.plan(t); node.ReasonOf(err, "") != "BindingDamaged" || !p.Empty() {
		t.Errorf("with a torn file: %v%v", p, err)
	}
}

// TestKernelSelectorsAmbiguous: nothing is written, and no disk touched, where they
// cannot be told apart.
func TestKernelSelectorsAmbiguous(t *testing.T) {
	l := newLabCloud(t, cloud.Delays{}, cloud.DiskSpec{SizeGiB: 20}, cloud.DiskSpec{SizeGiB: 20})
	b := l.bench(t, 20, node.DiskConfig{Selector: node.DiskSelector{SizeGiB: 20}})
	b.sealed = l.sealed
	b.setSerial(t, l.sealed.Facts.DataDisks[0])
	p, err := b.plan(t)
	if node.ReasonOf(err, "") != "Ambiguous" || !p.Empty() || !strings.Contains(err.Error(), l.sealed.Facts.DataDisks[1]) {
		t.Errorf("%v%v", p, err)
	}
	if _, err := os.Stat(string(b.ledger)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a ledger was written: %v", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(b.file, &st); err != nil || st.Blocks != 0 {
		t.Errorf("the disk was written to: %d blocks, %v", st.Blocks, err)
	}
}

// TestKernelAttachAndDetach: a disk that the NodeConfig lists is attached, formatted
// and mounted; one that it no longer lists is unmounted and detached, once nobody
// uses it.
func TestKernelAttachAndDetach(t *testing.T) {
	l := newLabCloud(t, cloud.Delays{Attach: 300 * time.Millisecond, Visible: 700 * time.Millisecond})
	id := l.CreateDisk("", cloud.DiskSpec{SizeGiB: 20}).ID
	b := l.bench(t, 20, node.DiskConfig{DiskID: id, Attach: true})
	b.sealed = l.sealed
	b.setSerial(t, "")
	l.plug = func(id string) { b.setSerial(t, id) }
	l.unplug = func(string) { b.setSerial(t, "") }

	p, err := b.plan(t)
	for deadline := time.Now().Add(time.Minute); err != nil && strings.Contains(err.Error(), "or not yet") && time.Now().Before(deadline); p, err = b.plan(t) {
		time.Sleep(100 * time.Millisecond) // what was made just now is not described yet
	}
	if err != nil || p.String() != "attach "+id+" to "+l.instance.ID+" for "+b.want.MountPoint+"\n" {
		t.Fatalf("first plan: %v%v", p, err)
	}
	b.patience = 0
	if err := b.until(t, "Attaching"); node.ReasonOf(err, "") != "Proving" { // it did not come with the instance
		t.Fatal(err)
	}
	if _, err := b.settle(t); err != nil {
		t.Fatal(err)
	}
	if d := l.disk(t, id); d.Instance != l.instance.ID || l.Snapshot().Calls["cbs:AttachDisks"] != 1 {
		t.Errorf("disk %+v, %d calls", d, l.Snapshot().Calls["cbs:AttachDisks"])
	}
	o := Options{Sealed: l.sealed, Cloud: l.client, Ledger: string(b.ledger), Run: b.run, Log: slog.New(slog.DiscardHandler)}
	if all := Detached(o); len(all) != 0 {
		t.Fatalf("to be detached although it is listed: %v", all)
	}

	o.Sealed.Config.Disks = nil
	all := Detached(o)
	if len(all) != 1 {
		t.Fatalf("%d disks to be detached", len(all))
	}
	d := all[0]
	d.sys = b.sys
	user, err := os.Create(filepath.Join(b.want.MountPoint, "open"))
	if err != nil {
		t.Fatal(err)
	}
	p, err = d.Plan(t.Context())
	if err != nil || len(p.Changes) != 1 || !p.Serving {
		t.Fatalf("plan of detaching: %v%v", p, err)
	}
	if err := d.Apply(t.Context(), p); node.ReasonOf(err, "") != "InUse" || node.ClassOf(err) != node.ClassWaiting || !strings.Contains(err.Error(), "(pid ") {
		t.Errorf("while it is used: %v", err)
	}
	user.Close()
	for range 500 {
		if p, err = d.Plan(t.Context()); err != nil || p.Empty() {
			break
		}
		if err = d.Apply(t.Context(), p); err != nil && node.ReasonOf(err, "") != "Detaching" {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil || !p.Empty() {
		t.Fatalf("%v%v", p, err)
	}
	if now := l.disk(t, id); now.Instance != "" || now.State != "UNATTACHED" {
		t.Errorf("disk %+v", now)
	}
	if err := unix.Unmount(b.want.MountPoint, 0); err == nil {
		t.Error("it was still mounted")
	}
	if n := l.Snapshot().Calls["cbs:DetachDisks"]; n != 1 {
		t.Errorf("the cloud was asked to detach it %d times", n)
	}
	if again := Detached(o); len(again) != 0 {
		t.Errorf("to be detached again: %v", again)
	}
}

// TestKernelAttachRefused: a disk is taken from nobody, and what the cloud refuses is
// said in its class; what was refused is not ours to detach.
func TestKernelAttachRefused(t *testing.T) {
	l := newLabCloud(t, cloud.Delays{})
	id := l.CreateDisk("", cloud.DiskSpec{SizeGiB: 20}).ID
	b := l.bench(t, 20, node.DiskConfig{DiskID: id, Attach: true})
	b.sealed = l.sealed
	b.setSerial(t, "")
	for _, c := range []struct {
		code   string
		class  node.Class
		reason string
	}{
		{"ResourceBusy", node.ClassWaiting, "DiskBusy"},
		{"InvalidDisk.Busy", node.ClassWaiting, "DiskBusy"},
		{"ResourceInUse.DiskMigrating", node.ClassWaiting, "DiskBusy"},
		{"ResourceInUse.DiskRollbacking", node.ClassWaiting, "DiskBusy"},
		{"ResourceUnavailable.SnapshotCreating", node.ClassWaiting, "DiskBusy"},
		{"LimitExceeded.InstanceAttachedDisk", node.ClassTerminal, "TooManyDisks"},
		{"ResourceUnavailable.ZoneNotMatch", node.ClassTerminal, "DiskZoneMismatch"},
		{"InvalidDisk.NotPortable", node.ClassTerminal, "DiskNotPortable"},
		{"InvalidDisk.Expire", node.ClassTerminal, "DiskExpired"},
		{"ResourceUnavailable.TypeError", node.ClassTerminal, "NotADataDisk"},
		{"InvalidDiskId.NotFound", node.ClassTerminal, "DiskUnknown"},
		{"UnauthorizedOperation", node.ClassTerminal, "Unauthorized"},
		{"InvalidAccount.InsufficientBalance", node.ClassTerminal, "InvalidAccount"},
	} {
		l.Inject(cloud.Fault{Action: "cbs:AttachDisks", Code: c.code, Message: "on request"})
		err := b.until(t, "")
		if node.ClassOf(err) != c.class || node.ReasonOf(err, "") != c.reason {
			t.Errorf("%s: %v %s: %v", c.code, node.ClassOf(err), node.ReasonOf(err, ""), err)
		}
		if _, err := b.ledger.attached(id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: it counts as attached by us: %v", c.code, err)
		}
	}
	other, err := l.Launch(t.Context(), cloud.InstanceSpec{})
	if err == nil {
		err = l.client.AttachDisk(t.Context(), other.ID, id)
	}
	for err == nil && l.disk(t, id).State != "ATTACHED" {
		time.Sleep(time.Millisecond)
	}
	if err != nil {
		t.Fatal(err)
	}
	calls := l.Snapshot().Calls["cbs:AttachDisks"]
	if err := b.until(t, ""); node.ReasonOf(err, "") != "AttachedElsewhere" || node.ClassOf(err) != node.ClassTerminal || !strings.Contains(err.Error(), other.ID) {
		t.Errorf("attached elsewhere: %v", err)
	}
	if now := l.Snapshot().Calls["cbs:AttachDisks"]; now != calls {
		t.Errorf("the cloud was asked to attach it %d times more", now-calls)
	}
}

// TestKernelExt3: ext3 is mounted where it is found, and never made.
func TestKernelExt3(t *testing.T) {
	b := newBench(t, node.Ext3, nil)
	b.want.WhenNotBlank = node.MountFound
	if _, err := b.plan(t); node.ReasonOf(err, "") != "Ext3NotMade" {
		t.Errorf("blank: %v", err)
	}
	run(t, "mkfs.ext3", "-q", "/dev/"+b.loop)
	if err := b.until(t, ""); err != nil {
		t.Fatal(err)
	}
	all, err := mounts()
	if m, ok := (observed{Mounts: all}).at(b.want.MountPoint); err != nil || !ok || m.FSType != "ext3" && m.FSType != "ext4" {
		t.Errorf("mounted: %+v, %v", m, err)
	}
	if p, err := b.plan(t); err != nil || !p.Empty() {
		t.Errorf("left: %v%v", p, err)
	}
}
