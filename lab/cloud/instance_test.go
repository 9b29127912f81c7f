package cloud_test

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

func TestLaunch(t *testing.T) {
	l := newLab(t, instant())
	m := l.machines.running[l.instance.ID]
	if m.CPUs != 2 || m.MemoryMiB != 4096 || m.Hostname != "10-0-0-30" || len(m.NICs) != 1 || len(m.Volumes) != 1 || m.Volumes[0].SizeGiB != 20 {
		t.Errorf("machine %+v", m)
	}
	second, err := l.Launch(t.Context(), cloud.InstanceSpec{Name: "second", Type: "S5.LARGE8", MemoryMiB: 2048})
	if err != nil || second.PrivateIP.String() != "10.0.0.31" || second.State != "RUNNING" {
		t.Errorf("second instance %+v, %v", second, err)
	}
	if m := l.machines.running[second.ID]; m.CPUs != 4 || m.MemoryMiB != 2048 || m.Hostname != "second" {
		t.Errorf("second machine %+v", m)
	}
	for what, spec := range map[string]cloud.InstanceSpec{
		"type":      {Type: "S1.HUGE"},
		"subnet":    {Subnet: "subnet-00000000"},
		"image":     {Image: "img-00000000"},
		"user-data": {UserData: make([]byte, 16<<10+1)},
		"disk":      {DataDisks: []cloud.DiskSpec{{}}},
		"disks":     {DataDisks: make([]cloud.DiskSpec, 21)},
	} {
		if _, err := l.Launch(t.Context(), spec); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("bad %s: %v", what, err)
		}
	}
}

// What a machine starts with that was there before it.
func TestLaunchWithWhatIsThere(t *testing.T) {
	l := newLab(t, instant())
	l.ImportImage("img-mine")
	eni, err := l.CreateENI("subnet-pods0001")
	if err != nil {
		t.Fatal(err)
	}
	spec := cloud.InstanceSpec{
		Image: "img-mine", PrivateIP: netip.MustParseAddr("10.0.0.200"), ENIs: []string{eni.ID},
		DataDisks: []cloud.DiskSpec{{SizeGiB: 10, Content: "content", DeleteWithInstance: true}},
	}
	in, err := l.Launch(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	m := l.machines.running[in.ID]
	if in.PrivateIP != spec.PrivateIP || m.Image != "img-mine" || len(m.NICs) != 2 || m.NICs[1].ENI != eni.ID || m.Volumes[0].Content != "content" {
		t.Errorf("instance %+v, machine %+v", in, m)
	}
	if got := l.machines.addrs(eni.ID); len(got) != 1 || got[0] != eni.IPs[0].Addr {
		t.Errorf("port of the secondary ENI has %v, want %v", got, eni.IPs)
	}
	for what, again := range map[string]cloud.InstanceSpec{
		"in use":      {PrivateIP: spec.PrivateIP},
		"attached to": {ENIs: spec.ENIs},
		"not found":   {ENIs: []string{"eni-00000000"}},
		"ENIs":        {ENIs: make([]string, 10)},
	} {
		if _, err := l.Launch(t.Context(), again); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// The ENI outlives the instance, and serves the next one.
	if err := l.Terminate(t.Context(), in.ID); err != nil {
		t.Fatal(err)
	}
	l.machines.fail = errors.New("no memory")
	if _, err := l.Launch(t.Context(), spec); err == nil || len(l.machines.addrs(eni.ID)) != 0 {
		t.Errorf("a machine that does not start: %v", err)
	}
	if _, err := l.Launch(t.Context(), spec); err != nil {
		t.Error(err)
	}
}

// TestLaunchFails: what was created for a machine that does not start is gone.
func TestLaunchFails(t *testing.T) {
	l := newLab(t, instant())
	before := l.Snapshot()
	l.machines.fail = errors.New("no memory")
	if _, err := l.Launch(t.Context(), cloud.InstanceSpec{DataDisks: []cloud.DiskSpec{{SizeGiB: 10}}}); err == nil || !strings.Contains(err.Error(), "no memory") {
		t.Errorf("launch: %v", err)
	}
	after := l.Snapshot()
	if len(after.Instances) != 1 || len(after.ENIs) != len(before.ENIs) || len(after.Disks) != len(before.Disks) || len(l.machines.ports) != 1 {
		t.Errorf("left behind: %+v, ports %v", after, l.machines.ports)
	}
	if in, err := l.Launch(t.Context(), cloud.InstanceSpec{}); err != nil || in.PrivateIP.String() != "10.0.0.31" {
		t.Errorf("the address is not free again: %s, %v", in.PrivateIP, err)
	}
}

func TestTerminate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, cloud.Default())
		eni := l.detached(t)
		if _, err := l.api.AttachENI(t.Context(), eni.ID, l.instance.ID, 0, "a"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		both, _, err := l.api.CreateENI(t.Context(), l.spec("c"))
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if err := l.Terminate(t.Context(), l.instance.ID); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d < 3500*time.Millisecond {
			t.Errorf("terminated after %s, in the middle of an attach", d)
		}
		s := l.Snapshot()
		if len(s.Instances) != 0 || len(s.ENIs) != 2 || l.now(eni.ID).Instance+l.now(both.ID).Instance != "" {
			t.Errorf("what is left: %+v", s)
		}
		if len(s.Disks) != 1 || s.Disks[0].System || s.Disks[0].State != "UNATTACHED" || s.Disks[0].LastInstance != l.instance.ID {
			t.Errorf("disks that are left: %+v", s.Disks)
		}
		if len(l.machines.running)+len(l.machines.ports)+len(l.machines.devices) != 0 {
			t.Errorf("left behind: %+v", l.machines)
		}
		if _, err := l.api.DescribeENIs(t.Context(), l.instance.ID); code(err) != "AuthFailure.SecretIdNotFound" {
			t.Errorf("credentials of an instance that is gone: %v", err)
		}
		if err := l.Terminate(t.Context(), l.instance.ID); err == nil {
			t.Error("terminated twice")
		}
	})
}

func TestSnapshotHasNoSecrets(t *testing.T) {
	l := newLab(t, instant())
	c, err := l.metadata.Credentials(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(l.Snapshot())
	if err != nil {
		t.Fatal(err)
	}
	for what, secret := range map[string]string{"key": c.SecretKey.Reveal(), "token": c.Token.Reveal(), "user-data": "NodeConfig"} {
		if strings.Contains(string(b), secret) {
			t.Errorf("snapshot holds the %s", what)
		}
	}
	if !strings.Contains(string(b), l.instance.ID) {
		t.Errorf("snapshot %s lacks the instance", b)
	}
}

// TestDataDiskOfALaunch: what the API says of a disk that came with its instance,
// and of one that was made from a snapshot.
func TestDataDiskOfALaunch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, instant())
		made, err := l.Launch(t.Context(), cloud.InstanceSpec{DataDisks: []cloud.DiskSpec{{SizeGiB: 10, Content: "content"}}})
		if err != nil {
			t.Fatal(err)
		}
		for id, snapshot := range map[string]bool{l.instance.ID: false, made.ID: true} {
			in, err := l.api.DescribeInstance(t.Context(), id)
			if err != nil || len(in.DataDisks) != 1 || (in.DataDisks[0].SnapshotID != "") != snapshot || in.LatestOperation != "" {
				t.Fatalf("%+v, %v", in, err)
			}
			d, err := l.api.DescribeDisk(t.Context(), in.DataDisks[0].ID)
			if err != nil {
				t.Fatal(err)
			}
			if d.State != tencent.DiskAttached || d.InstanceID != id || d.LastInstanceID != id || d.Usage != "DATA_DISK" ||
				len(d.InstanceIDs) != 0 || d.Shareable || d.Rollbacking || d.Migrating || d.Snapshots != 0 {
				t.Errorf("%+v", d)
			}
			began, err1 := in.Created()
			created, err2 := d.Created()
			if now := time.Now().Truncate(time.Second); err1 != nil || err2 != nil || !created.Equal(began) || !created.Equal(now) {
				t.Errorf("instance of %v (%v), disk of %v (%v), now %v", began, err1, created, err2, now)
			}
		}
		if d, err := l.api.DescribeDisk(t.Context(), "disk-none0000"); err == nil {
			t.Errorf("a disk that is not there: %+v", d)
		}
		if in, err := l.api.DescribeInstance(t.Context(), "ins-none0000"); err == nil {
			t.Errorf("an instance that is not there: %+v", in)
		}
	})
}
