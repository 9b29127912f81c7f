package tkenode

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// goFiles calls f with every Go file of the module's own packages.
func goFiles(t *testing.T, f func(path string)) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." {
			// A directory with its own go.mod is another module.
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil || strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" {
				return filepath.SkipDir
			}
		}
		if strings.HasSuffix(path, ".go") {
			f(path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEveryPackageHasOneDoc(t *testing.T) {
	docs := map[string][]string{}
	goFiles(t, func(path string) {
		if strings.HasSuffix(path, "_test.go") {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		dir := filepath.Dir(path)
		if docs[dir] == nil {
			docs[dir] = []string{}
		}
		if file.Doc != nil {
			docs[dir] = append(docs[dir], path)
		}
	})
	for dir, in := range docs {
		if len(in) != 1 {
			t.Errorf("%s: package documentation in %d files %v, want exactly one", dir, len(in), in)
		}
	}
}

// Who may import whom. A package that is not named may import any of ours.
var mayImport = map[string][]string{
	"agent/node":      {},
	"agent/reconcile": {"agent/node"},
	"agent/eni":       {"agent/node", "agent/tencent", "agent/eni/cni"},
	"agent/eni/cni":   {},
	"agent/disk":      {"agent/node", "agent/tencent"},
	"agent/unit":      {"agent/node"},
	"agent/kube":      {"agent/node"},
	"agent/metrics":   {"agent/node"},
	"agent/tencent":   {"agent/node"},
	"agent/api":       {"agent/node", "agent/reconcile", "agent/disk", "agent/eni", "agent/kube"},
	"bootstrap":       {"agent/node", "bootstrap/nodeconfig"},
	"cmd/tke-eni":     {"agent/eni/cni"},
	"lab/vpc":         {},
	"lab/proc":        {},
	"lab/cvm":         {"lab/proc"},
	"lab/kube":        {"agent/node", "lab/proc"},
}

func TestImports(t *testing.T) {
	const module = "github.com/tkenode/tkenode/"
	goFiles(t, func(path string) {
		if strings.HasSuffix(path, "_test.go") {
			return
		}
		dir := filepath.ToSlash(filepath.Dir(path))
		allowed, named := mayImport[dir]
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			ours, ok := strings.CutPrefix(imported, module)
			if !ok {
				continue
			}
			if strings.HasPrefix(ours, "lab") && (strings.HasPrefix(dir, "agent") || strings.HasPrefix(dir, "bootstrap")) {
				t.Errorf("%s imports %s: what runs on a node knows nothing of the lab", path, imported)
			}
			if named && !contains(allowed, ours) {
				t.Errorf("%s imports %s; %s may import only %v", path, imported, dir, allowed)
			}
		}
	})
}

func contains(list []string, s string) bool {
	for _, x := range list {
		if x == s {
			return true
		}
	}
	return false
}

func TestRunbookHasASectionPerCondition(t *testing.T) {
	text, err := os.ReadFile("RUNBOOK.md")
	if err != nil {
		t.Fatal(err)
	}
	warnings := []node.ConditionType{node.PoolExhausted, node.RepairsUndone, node.DiskNotGrown, node.VolumeMismatch}
	for _, c := range slices.Concat(node.ConditionTypes[:], warnings, node.DiskConditionTypes[:]) {
		if !strings.Contains(string(text), "\n## "+string(c)+"\n") {
			t.Errorf("RUNBOOK.md has no section ## %s", c)
		}
	}
}

func TestChangelogHasUnreleased(t *testing.T) {
	text, err := os.ReadFile("CHANGELOG.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "\n## Unreleased\n") {
		t.Error("CHANGELOG.md has no section ## Unreleased")
	}
}
