package disk

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// selectorCase is an instance in short: its disks are "disk-a CLOUD_SSD 100", those
// in DataDisks in the order of Launched.
type selectorCase struct {
	Disks    []node.DiskConfig `json:"disks"`
	Bound    []binding         `json:"bound,omitempty"`
	Attached []string          `json:"attached"` // type, size and what is odd of each
	Launched []string          `json:"launched"` // ids, with a snapshot after a slash
	Listed   []string          `json:"listed,omitempty"`
	Used     map[string]string `json:"used,omitempty"`
	Latest   string            `json:"latest,omitempty"`
}

const testInstance = "ins-11111111"

func (c selectorCase) inventory(t *testing.T) inventory {
	t.Helper()
	have := inventory{Listed: c.Listed, Used: c.Used, Instance: tencent.Instance{ID: testInstance, LatestOperation: c.Latest}}
	for _, text := range c.Attached {
		d := tencent.Disk{InstanceID: testInstance, State: tencent.DiskAttached, Usage: "DATA_DISK", Portable: true}
		if _, err := fmt.Sscan(text, &d.ID, &d.Type, &d.SizeGiB); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		for _, word := range strings.Fields(text)[3:] {
			switch word {
			case "system":
				d.Usage = tencent.DiskSystem
			case "shared":
				d.Shareable = true
			case "elsewhere":
				d.InstanceID = "ins-22222222"
			default:
				d.State = word
			}
		}
		have.Disks = append(have.Disks, d)
	}
	for _, l := range c.Launched {
		id, snapshot, _ := strings.Cut(l, "/")
		have.Instance.DataDisks = append(have.Instance.DataDisks, tencent.DataDisk{ID: id, SnapshotID: snapshot})
	}
	return have
}

// TestSelectors compares what resolve says of each instance in testdata with the
// golden text beside it, whatever the order in which the cloud describes its disks.
func TestSelectors(t *testing.T) {
	files, err := filepath.Glob("testdata/selectors/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no test cases: %v", err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(path)
			if err != nil || len(a.Files) != 2 {
				t.Fatalf("%d files, want case.json and bindings: %v", len(a.Files), err)
			}
			var c selectorCase
			d := json.NewDecoder(bytes.NewReader(a.Files[0].Data))
			d.DisallowUnknownFields()
			if err := d.Decode(&c); err != nil {
				t.Fatal(err)
			}
			have := c.inventory(t)
			got := renderBindings(resolve(c.Disks, c.Bound, have))
			for range have.Disks {
				have.Disks = append(have.Disks[1:], have.Disks[0])
				slices.Reverse(have.Listed)
				if again := renderBindings(resolve(c.Disks, c.Bound, have)); again != got {
					t.Errorf("in another order:\n%snot:\n%s", again, got)
				}
			}
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

func renderBindings(all []binding, err error) string {
	if err != nil {
		return fmt.Sprintf("%s %s: %v\n", node.ClassOf(err), node.ReasonOf(err, "-"), err)
	}
	var b strings.Builder
	for _, x := range all {
		fmt.Fprintf(&b, "%s is %s: %s\n", x.MountPoint, x.DiskID, x.Source)
	}
	if b.Len() == 0 {
		return "nothing to bind\n"
	}
	return b.String()
}

// TestSelectorsNeverShareADisk tries every pair and triple of selectors over small
// instances: an answer gives every entry a disk of its own that fits, and is the only
// one there is.
func TestSelectorsNeverShareADisk(t *testing.T) {
	types, sizes := []string{"CLOUD_SSD", "CLOUD_HSSD"}, []int{100, 200}
	var selectors []node.DiskSelector
	for _, kind := range append([]string{""}, types...) {
		for _, size := range append([]int{0}, sizes...) {
			for order := range 3 {
				if s := (node.DiskSelector{Type: kind, SizeGiB: size, Order: order}); s != (node.DiskSelector{}) {
					selectors = append(selectors, s)
				}
			}
		}
	}
	answered := 0
	for bits := range 1 << 6 { // three disks of one of four kinds each
		var c selectorCase
		for i := range 3 {
			id := fmt.Sprintf("disk-%c", 'a'+i)
			c.Attached = append(c.Attached, fmt.Sprintf("%s %s %d", id, types[bits>>(2*i)&1], sizes[bits>>(2*i+1)&1]))
			c.Launched = append(c.Launched, id)
		}
		have := c.inventory(t)
		for _, a := range selectors {
			for _, b := range selectors {
				all := []node.DiskConfig{{Selector: a, MountPoint: "/a"}, {Selector: b, MountPoint: "/b"}}
				got, err := resolve(all, nil, have)
				if err != nil {
					continue
				}
				answered++
				if len(got) != 2 || got[0].DiskID == got[1].DiskID {
					t.Fatalf("%v: %+v", c.Attached, got)
				}
				if a.Order == 0 && b.Order == 0 && assignments(have, a, b) != 1 {
					t.Fatalf("%v: %+v and %+v are guessed to be %+v", c.Attached, a, b, got)
				}
				for i, x := range got {
					d := have.Disks[slices.IndexFunc(have.Disks, func(d tencent.Disk) bool { return d.ID == x.DiskID })]
					if c := (candidate{kind: d.Type, sizeGiB: d.SizeGiB}); !c.fits(all[i].Selector) {
						t.Fatalf("%v: %+v does not fit %+v", c, d, all[i].Selector)
					}
				}
			}
		}
	}
	if answered == 0 {
		t.Error("nothing was ever answered")
	}
}

// assignments counts in how many ways two selectors can have a disk each.
func assignments(have inventory, a, b node.DiskSelector) (n int) {
	for i, x := range have.Disks {
		for j, y := range have.Disks {
			if i != j && (candidate{kind: x.Type, sizeGiB: x.SizeGiB}).fits(a) && (candidate{kind: y.Type, sizeGiB: y.SizeGiB}).fits(b) {
				n++
			}
		}
	}
	return n
}

// TestBindingsAreWholeOrDamaged: of a file that was cut off anywhere, or of which any
// byte is another, nothing is read.
func TestBindingsAreWholeOrDamaged(t *testing.T) {
	l := ledger(filepath.Join(t.TempDir(), "disk"))
	if all, err := l.bindings(); err != nil || len(all) != 0 {
		t.Fatalf("without a file: %v, %v", all, err)
	}
	want := []binding{{MountPoint: "/data", Selector: node.DiskSelector{SizeGiB: 100}, DiskID: "disk-abc12345", Source: "x"}}
	digest, err := digestOf(want)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.store(bindingsFile, bindings{want, digest}); err != nil {
		t.Fatal(err)
	}
	if all, err := l.bindings(); err != nil || !slices.Equal(all, want) {
		t.Fatalf("read back: %v, %v", all, err)
	}
	path := filepath.Join(string(l), bindingsFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole[:len(whole)-2] { // the last are the brace and the line's end
		for _, b := range [][]byte{whole[:n], flipped(whole, n)} {
			if bytes.Equal(bytes.TrimSpace(b), bytes.TrimSpace(whole)) {
				continue
			}
			if all, err := decodeBindings(b); err == nil && !slices.Equal(all, want) {
				t.Fatalf("%s is read as %+v", b, all)
			}
		}
	}
	if err := os.WriteFile(path, whole[:len(whole)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.bindings(); node.ReasonOf(err, "") != "BindingDamaged" || node.ClassOf(err) != node.ClassTerminal {
		t.Errorf("torn: %v", err)
	}
}

// TestSelectorChanged: what a mount point was bound to is not given up for another
// selector.
func TestSelectorChanged(t *testing.T) {
	d := New(Options{
		Want: node.DiskConfig{Selector: node.DiskSelector{SizeGiB: 200}, MountPoint: "/data"}, Ledger: filepath.Join(t.TempDir(), "disk"),
	})
	kept := []binding{{MountPoint: "/data", Selector: node.DiskSelector{SizeGiB: 100}, DiskID: "disk-abc12345", Source: "x", At: time.Unix(0, 0).UTC()}}
	digest, err := digestOf(kept)
	if err == nil {
		err = d.ledger.store(bindingsFile, bindings{kept, digest})
	}
	if err != nil {
		t.Fatal(err)
	}
	if b, _, err := d.bound(t.Context(), observed{}); b != nil || node.ReasonOf(err, "") != "SelectorChanged" || !strings.Contains(err.Error(), "disk-abc12345") {
		t.Errorf("bound to %+v, %v", b, err)
	}
	d.want.Selector.SizeGiB = 100
	if b, _, err := d.bound(t.Context(), observed{}); err != nil || b == nil || b.DiskID != "disk-abc12345" {
		t.Errorf("bound to %+v, %v", b, err)
	}
}

func flipped(b []byte, n int) []byte {
	out := slices.Clone(b)
	out[n] ^= 1
	return out
}
