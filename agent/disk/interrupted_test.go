package disk

import (
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// TestInterrupted: whole as a file system of ours may look, what a boot before this one
// began to make may not all have reached the disk.
func TestInterrupted(t *testing.T) {
	const id, uuid = "disk-abc12345", "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ab"
	want := node.DiskConfig{DiskID: id, FileSystem: node.XFS, MountPoint: "/data"}
	for _, tt := range []struct{ state, began, reason string }{
		{stateFormatting, "this", ""},
		{stateFormatting, "another", "FormatInterrupted"},
		{stateFormatting, "", "FormatInterrupted"}, // of an agent that did not note it
		{stateFormatted, "", ""},
	} {
		have := observed{
			Boot: "this", Devices: []device{{Name: "vdb", Dev: "253:16", Serial: id, SizeBytes: 1 << 30}},
			Ledger:  map[string]entry{id: {DiskID: id, MountPoint: "/data", FileSystem: node.XFS, UUID: uuid, State: tt.state, Boot: tt.began}},
			Content: content{Signatures: []string{"xfs"}, UUID: uuid, Label: label(id)},
		}
		steps, err := decide(want, have)
		if node.ReasonOf(err, "") != tt.reason || (err == nil) != (len(steps) > 0) {
			t.Errorf("%s in boot %q: %v, %v", tt.state, tt.began, steps, err)
		}
		if err != nil && !strings.Contains(err.Error(), "tkenode disk adopt "+id) {
			t.Errorf("nobody is told how to go on: %v", err)
		}
	}
}
