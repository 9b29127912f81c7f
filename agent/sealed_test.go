package agent

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// TestUnsealed: a bootstrap that is dead is told from one that is at work.
func TestUnsealed(t *testing.T) {
	dead := exec.CommandContext(t.Context(), "true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		report          node.Report
		reason, message string
	}{
		{node.Report{PID: os.Getpid(), Phase: "metadata"}, "BootstrapRunning", "bootstrap is at: metadata"},
		{node.Report{PID: os.Getpid(), Phase: "metadata", Class: "waiting", Reason: "MetadataSilent", Message: "no answer"}, "MetadataSilent", "no answer"},
		{node.Report{PID: dead.Process.Pid, Phase: "metadata"}, "BootstrapDied", "has ended at metadata without a result"},
		{node.Report{PID: dead.Process.Pid, Phase: "metadata", Class: "waiting", Reason: "MetadataSilent", Message: "no answer"}, "BootstrapDied", "tkenode-bootstrap. no answer"},
		{node.Report{PID: dead.Process.Pid, Phase: "user-data", Class: "terminal", Reason: "NodeConfigInvalid", Message: "line 3"}, "NodeConfigInvalid", "line 3"},
	} {
		b, err := json.Marshal(c.report)
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "bootstrap.json")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if reason, message := unsealed(path); reason != c.reason || !strings.Contains(message, c.message) {
			t.Errorf("%+v: %s: %s", c.report, reason, message)
		}
	}
}

// TestSealedNow: only the boot that sealed it counts, and only as long as it tells.
func TestSealedNow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bootstrap.json")
	sealed := node.Sealed{Digest: "sha256:1"}
	if sealedNow(sealed, path) {
		t.Error("without a report")
	}
	for text, want := range map[string]bool{
		`{"digest": "sha256:1", "steps": [{"name": "sealed"}, {"name": "seal"}]}`: true,
		`{"digest": "sha256:2", "steps": [{"name": "seal"}]}`:                     false,
		`{"digest": "sha256:1", "steps": [{"name": "sealed"}]}`:                   false,
		`{"digest": "sha256:1", "steps": [{"name": "seal"}`:                       false,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := sealedNow(sealed, path); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}
