package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// TestDiagnose compares what is said of each look at a disk with the golden text.
func TestDiagnose(t *testing.T) {
	at := time.Date(2026, 11, 28, 7, 0, 0, 0, time.UTC)
	fine := vitals{
		Disk: "disk-abc12345", Device: "vdb", MountPoint: "/data", Mounted: true, FSType: "ext4",
		Ext4: &ext4Errors{}, Probe: &probeResult{Serial: "disk-abc12345"},
	}
	with := func(change func(*vitals)) vitals {
		v := fine
		change(&v)
		return v
	}
	var b strings.Builder
	for _, c := range []struct {
		name string
		vitals
	}{
		{"fine", fine},
		{"not probed yet", with(func(v *vitals) { v.Probe = nil })},
		{"read-only", with(func(v *vitals) { v.ReadOnly = true })},
		{"ext4 error", with(func(v *vitals) {
			v.ReadOnly = true
			v.Ext4 = &ext4Errors{2, ext4Error{at, "ext4_lookup", "1855", "12", "0"}, ext4Error{at.Add(time.Hour), "ext4_validate_block_bitmap", "390", "0", "33"}}
		})},
		{"ext4 has stopped itself", with(func(v *vitals) {
			v.Ext4 = &ext4Errors{1, ext4Error{At: at}, ext4Error{At: at}}
			v.Probe = &probeResult{Serial: v.Disk, Errors: []string{stepWrite + ": open /data: read-only file system"}}
		})},
		{"xfs has shut down", with(func(v *vitals) {
			v.FSType, v.Ext4 = "xfs", nil
			v.Probe = &probeResult{Serial: v.Disk, Errors: []string{stepStat + ": stat /data: input/output error"}}
		})},
		{"busy", with(func(v *vitals) { v.Stalled = stall{12, stallPatience - time.Second} })},
		{"stalled", with(func(v *vitals) { v.Stalled = stall{12, stallPatience} })},
		{"hung probe", with(func(v *vitals) { v.Probe = &probeResult{Hangs: stepRead, Late: 90 * time.Second} })},
		{"no helper", with(func(v *vitals) {
			v.Probe = &probeResult{Failed: "start helper: fork/exec /usr/lib/tkenode/bin/tke-disk: no such file or directory; if it is not there, install the package tkenode anew"}
		})},
		{"gone", vitals{Disk: "disk-abc12345", MountPoint: "/data", Gone: "its block device 253:16 is not in /sys/dev/block any more", GoneFor: "2026-11-28 07:00:00Z"}},
	} {
		fmt.Fprintf(&b, "%s\n", c.name)
		for _, k := range diagnose(c.vitals) {
			fmt.Fprintf(&b, "  %s %s %s", k.Type, k.Status, k.Reason)
			if k.Message != "" {
				fmt.Fprintf(&b, ": %s", k.Message)
			}
			b.WriteByte('\n')
		}
	}
	path := filepath.Join("testdata", "health.txt")
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || b.String() != string(want) {
		t.Errorf("got:\n%s\nwant (%v):\n%s", &b, err, want)
	}
}

// TestMerge: of all disks the node says what is bad, and that nothing is only if that
// is known of each.
func TestMerge(t *testing.T) {
	at := time.Date(2026, 11, 28, 7, 0, 0, 0, time.UTC)
	health := func(s node.Status, message string, since time.Time) Health {
		return Health{{Type: node.IOError, Status: s, Reason: "r", Message: message, Since: since}}
	}
	fine, bad := health(node.False, "", at), health(node.True, "a", at.Add(time.Hour))
	for name, c := range map[string]struct {
		all     []Health
		want    node.Status
		message string
	}{
		"one is fine":             {[]Health{fine}, node.False, ""},
		"one is bad":              {[]Health{fine, bad, fine}, node.True, "a"},
		"two are bad":             {[]Health{bad, health(node.True, "b", at)}, node.True, "a; b"},
		"one is not known":        {[]Health{fine, nil}, node.Unknown, ""},
		"not known, and one bad":  {[]Health{nil, bad}, node.True, "a"},
		"bad, and one is unknown": {[]Health{bad, nil}, node.True, "a"},
	} {
		got := Health(Merge(c.all)).of(node.IOError)
		if got.Status != c.want || got.Message != c.message {
			t.Errorf("%s: %+v", name, got)
		}
		if name == "two are bad" && !got.Since.Equal(at) {
			t.Errorf("since %s, not since the first", got.Since)
		}
	}
	if got := Merge(nil); got != nil {
		t.Errorf("a node without disks says %+v", got)
	}
}

// TestSince moves only with the status.
func TestSince(t *testing.T) {
	at := time.Date(2026, 11, 28, 7, 0, 0, 0, time.UTC)
	now := func(minutes int) time.Time { return at.Add(time.Duration(minutes) * time.Minute) }
	hung := func(reason string) Health { return Health{{Type: node.IOError, Status: node.True, Reason: reason}} }
	h := hung("DiskHung").since(nil, now(0))
	h = hung("DiskIOError").since(h, now(1))
	if got := h.of(node.IOError).Since; !got.Equal(now(0)) {
		t.Errorf("another reason moved it to %s", got)
	}
	if h = (Health{{Type: node.IOError, Status: node.False}}).since(h, now(2)); !h.of(node.IOError).Since.Equal(now(2)) {
		t.Errorf("a transition did not: %+v", h)
	}
}

// TestProgressing: a disk that is busy is not one that hangs.
func TestProgressing(t *testing.T) {
	at := time.Date(2026, 11, 28, 7, 0, 0, 0, time.UTC)
	var p progressing
	for _, c := range []struct {
		after    time.Duration
		inFlight int
		ended    string
		want     time.Duration
	}{
		{0, 4, "7", 0}, {time.Minute, 4, "8", 0}, {2 * time.Minute, 4, "8", time.Minute}, {3 * time.Minute, 5, "8", 2 * time.Minute},
		{4 * time.Minute, 0, "8", 0}, {5 * time.Minute, 1, "8", 0}, {6 * time.Minute, 1, "9", 0},
	} {
		if got := p.look(c.inFlight, c.ended, at.Add(c.after)); got.For != c.want {
			t.Errorf("after %s: %s, want %s", c.after, got.For, c.want)
		}
	}
}
