package unit

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/tkenode/tkenode/agent/node"
)

var update = flag.Bool("update", false, "write the golden plans anew")

// TestPlan compares what decide says of each state in testdata with the golden
// text beside it.
func TestPlan(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no test cases: %v", err)
	}
	for _, path := range paths {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(path)
			if err != nil || len(a.Files) != 2 {
				t.Fatalf("%d files, want case.json and plan: %v", len(a.Files), err)
			}
			var c struct {
				Want struct {
					Unit, Digest, After string
					Files               map[string]string
					Addrs               []netip.Addr
				}
				Have observed
			}
			d := json.NewDecoder(bytes.NewReader(a.Files[0].Data))
			d.DisallowUnknownFields()
			if err := d.Decode(&c); err != nil {
				t.Fatal(err)
			}
			w := want{unit: c.Want.Unit, digest: c.Want.Digest, after: c.Want.After, addrs: c.Want.Addrs}
			for _, p := range slices.Sorted(maps.Keys(c.Want.Files)) {
				w.files = append(w.files, node.File{Path: p, Mode: 0o644, Data: []byte(c.Want.Files[p])})
			}
			got := render(decide(w, c.Have))
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

func render(v verdict) string {
	var b strings.Builder
	for _, s := range v.steps {
		fmt.Fprintln(&b, s.text)
	}
	if v.err != nil {
		fmt.Fprintf(&b, "%s %s: %v\n", node.ClassOf(v.err), node.ReasonOf(v.err, "-"), v.err)
	}
	if b.Len() == 0 {
		b.WriteString("nothing to do\n")
	}
	if v.again > 0 {
		fmt.Fprintf(&b, "look again after %s\n", v.again)
	}
	return b.String()
}

func TestMissingImages(t *testing.T) {
	baked := []archive{
		{"/img/dns.tar", 1 << 20, "coredns:v1", "sha256:d"},
		{"/img/pause.tar", 700 << 10, "pause:v1", "sha256:p"},
		{"/img/two.tar", 5, "one:v1", "sha256:1"},
		{"/img/two.tar", 5, "two:v1", "sha256:2"},
	}
	good := map[string]image{
		"coredns:v1": {"sha256:d", true, true}, "pause:v1": {"sha256:p", true, true},
		"one:v1": {"sha256:1", true, true}, "two:v1": {"sha256:2", true, true},
	}
	if got := missing(baked, good); len(got) != 0 {
		t.Errorf("all there, yet missing: %v", got)
	}
	if got := missing(baked, nil); !slices.Equal(got, []string{"/img/dns.tar", "/img/pause.tar", "/img/two.tar"}) {
		t.Errorf("nothing there, missing: %v", got)
	}
	for name, bad := range map[string]image{
		"other digest": {"sha256:x", true, true}, "not pinned": {"sha256:p", false, true}, "not unpacked": {"sha256:p", true, false},
	} {
		have := maps.Clone(good)
		have["pause:v1"] = bad
		if got := missing(baked, have); !slices.Equal(got, []string{"/img/pause.tar"}) {
			t.Errorf("pause %s, missing: %v", name, got)
		}
	}
	if got := importText("/img/two.tar", baked); got != "import one:v1, two:v1 from two.tar (5 bytes)" {
		t.Error(got)
	}
}
