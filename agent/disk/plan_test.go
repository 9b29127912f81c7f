package disk

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/tkenode/tkenode/agent/node"
)

var update = flag.Bool("update", false, "write the golden plans anew")

// TestPlan compares what decide says of each machine in testdata with the golden
// text beside it.
func TestPlan(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no test cases: %v", err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(path)
			if err != nil || len(a.Files) != 2 {
				t.Fatalf("%d files, want case.json and plan: %v", len(a.Files), err)
			}
			var c struct {
				Want node.DiskConfig `json:"want"`
				Have observed        `json:"have"`
			}
			d := json.NewDecoder(bytes.NewReader(a.Files[0].Data))
			d.DisallowUnknownFields()
			if err := d.Decode(&c); err != nil {
				t.Fatal(err)
			}
			got := render(decide(c.Want, c.Have))
			if *update {
				a.Files[1].Data = []byte(got)
				if err := os.WriteFile(path, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want := string(a.Files[1].Data); got != want {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
		})
	}
}

// TestDamagedLedger: nothing is done without a ledger, but a disk that is mounted
// where it belongs needs none.
func TestDamagedLedger(t *testing.T) {
	damage := errors.New("damaged")
	want := node.DiskConfig{DiskID: "disk-abc12345", FileSystem: node.Ext4, MountPoint: "/data"}
	have := observed{
		Devices: []device{{Name: "vdb", Dev: "253:16", Serial: want.DiskID, SizeBytes: 20 << 30}},
		Content: content{Blank: true}, ledgerErr: damage,
	}
	if steps, err := decide(want, have); !errors.Is(err, damage) || len(steps) > 0 {
		t.Errorf("not mounted: %v, %v", steps, err)
	}
	have.Mounts = []mount{{Dev: "253:16", Target: "/data", FSType: "ext4"}}
	if steps, err := decide(want, have); err != nil || len(steps) > 0 {
		t.Errorf("mounted: %v, %v", steps, err)
	}
}

func TestLink(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err == nil {
		err = errors.Join(os.Mkdir(filepath.Join(dir, "real"), 0o755), os.Symlink("real", filepath.Join(dir, "ln")))
	}
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"real": "", "real/a/b": "", "none": "", "ln": "real", "ln/a/b": "real/a/b",
	} {
		if want != "" {
			want = filepath.Join(dir, want)
		}
		if got, err := link(filepath.Join(dir, path)); err != nil || got != want {
			t.Errorf("%s leads to %q, %v", path, got, err)
		}
	}
}

func render(steps []step, err error) string {
	var b strings.Builder
	for _, s := range steps {
		fmt.Fprintln(&b, s.text)
	}
	if err != nil {
		fmt.Fprintf(&b, "%s %s: %v\n", node.ClassOf(err), node.ReasonOf(err, "-"), err)
	}
	if b.Len() == 0 {
		return "nothing to do\n"
	}
	return b.String()
}

// TestOnlyBlankLeadsToFormat tries every combination of what a look can show and
// what the ledger can hold.
func TestOnlyBlankLeadsToFormat(t *testing.T) {
	const id, uuid = "disk-abc12345", "6c1f3ab8-0d0a-4bdc-8a3e-0123456789ab"
	want := node.DiskConfig{DiskID: id, FileSystem: node.Ext4, MountPoint: "/data"}
	formats := 0
	for bits := range 1 << 9 {
		on := func(i int) bool { return bits>>i&1 == 1 }
		dev := device{Name: "vdb", Dev: "253:16", Serial: id, SizeBytes: 20 << 30, ReadOnly: on(0)}
		var c content
		c.Blank, c.Busy = on(1), on(2)
		if on(3) {
			c.Unreadable = "input/output error"
		}
		if on(4) {
			c.Signatures, c.UUID = []string{"ext4"}, uuid
		}
		if on(5) {
			dev.Partitions = []part{{"vdb1", "253:17"}}
		}
		if on(6) {
			dev.Holders = []string{"md0"}
		}
		have := observed{Content: c}
		if on(7) {
			have.Ledger = map[string]entry{id: {DiskID: id, UUID: uuid, State: stateFormatted, MountPoint: "/data"}}
		}
		if on(8) {
			have.Swaps = []string{"vdb"}
		}
		have.Devices = []device{dev}
		steps, err := decide(want, have)
		if len(steps) > 0 && steps[0].verb == format {
			formats++
			if err != nil || bits != 1<<1 { // Blank, and nothing else is so
				t.Errorf("format with %+v of %+v (ledger %v, swaps %v)", c, dev, have.Ledger, have.Swaps)
			}
		}
	}
	if formats == 0 {
		t.Error("nothing was ever formatted")
	}
}
