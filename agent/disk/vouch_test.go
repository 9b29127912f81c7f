package disk

import (
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// TestVouch: everything that the cloud says has to speak for the disk.
func TestVouch(t *testing.T) {
	type world struct {
		dev   device
		facts node.Facts
		disk  tencent.Disk
		in    tencent.Instance
		now   time.Time
	}
	for name, change := range map[string]func(*world){
		"":                         func(*world) {},
		"last attached to nobody":  func(w *world) { w.disk.LastInstanceID = "" },
		"launched":                 func(w *world) { w.in.LatestOperation = "RunInstances" },
		"created later":            func(w *world) { w.disk.CreateTime = "2026-11-28 12:00:09" },
		"-created before":          func(w *world) { w.disk.CreateTime = "2026-11-28 11:59:59" },
		"-created in UTC":          func(w *world) { w.disk.CreateTime = "2026-11-28 04:00:00" },
		"-created to come":         func(w *world) { w.disk.CreateTime = "2026-11-28 13:00:00" },
		"-no time":                 func(w *world) { w.disk.CreateTime = "" },
		"-another form":            func(w *world) { w.disk.CreateTime = "2026-11-28T04:00:00Z" },
		"-instance without a time": func(w *world) { w.in.CreatedTime = "" },
		"-instance of another form": func(w *world) {
			w.in.CreatedTime = "2026-11-28 12:00:00"
		},
		"-old instance":       func(w *world) { w.now = w.now.Add(2 * time.Hour) },
		"-reinstalled":        func(w *world) { w.in.LatestOperation = "ResetInstance" },
		"-attaching":          func(w *world) { w.disk.State = "ATTACHING" },
		"-attached elsewhere": func(w *world) { w.disk.InstanceID = "ins-other000" },
		"-was elsewhere":      func(w *world) { w.disk.LastInstanceID = "ins-other000" },
		"-shared":             func(w *world) { w.disk.Shareable = true },
		"-shared by several":  func(w *world) { w.disk.InstanceIDs = []string{"ins-abc12345"} },
		"-rolled back":        func(w *world) { w.disk.Rollbacking = true },
		"-migrated":           func(w *world) { w.disk.Migrating = true },
		"-has snapshots":      func(w *world) { w.disk.Snapshots = 1 },
		"-of a snapshot":      func(w *world) { w.in.DataDisks[0].SnapshotID = "snap-abc12345" },
		"-not the instance's": func(w *world) { w.in.DataDisks = nil },
		"-not there at launch": func(w *world) {
			w.facts.DataDisks = []string{"disk-other000"}
		},
		"-of another size": func(w *world) { w.disk.SizeGiB = 30 },
		"-another disk":    func(w *world) { w.disk.ID = "disk-other000" },
		"-a system disk":   func(w *world) { w.disk.Usage = "SYSTEM_DISK" },
	} {
		w := world{
			dev:   device{Serial: "disk-abc12345", SizeBytes: 20 << 30},
			facts: node.Facts{InstanceID: "ins-abc12345", DataDisks: []string{"disk-abc12345"}},
			disk: tencent.Disk{ID: "disk-abc12345", Usage: "DATA_DISK", State: "ATTACHED", InstanceID: "ins-abc12345",
				LastInstanceID: "ins-abc12345", SizeGiB: 20, CreateTime: "2026-11-28 12:00:00"},
			in: tencent.Instance{ID: "ins-abc12345", CreatedTime: "2026-11-28T04:00:00Z",
				DataDisks: []tencent.DataDisk{{ID: "disk-abc12345"}}},
			now: time.Date(2026, 11, 28, 4, 1, 0, 0, time.UTC),
		}
		change(&w)
		bad, sound := unsound(judge(w.dev, w.facts, w.disk, w.in, w.now))
		if want := name == "" || name[0] != '-'; sound != want {
			t.Errorf("%q: vouched for: %v (%s %s)", name, sound, bad.Source, bad.Text)
		}
	}
}
