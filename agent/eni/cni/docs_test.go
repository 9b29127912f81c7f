package cni

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strings"
	"testing"
)

// TestCodesAreDocumented holds the table of docs/cni.md against the constants.
func TestCodesAreDocumented(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "cni.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	codes := map[string]bool{} // how the rows begin
	ast.Inspect(file, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok && strings.HasPrefix(v.Names[0].Name, "Code") {
			codes[fmt.Sprintf("| %s | `%s` |", v.Values[0].(*ast.BasicLit).Value, v.Names[0].Name)] = true
		}
		return true
	})
	text, err := os.ReadFile("../../../docs/cni.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		for row := range codes {
			if strings.HasPrefix(line, row) {
				delete(codes, row)
			}
		}
		if cells := strings.Split(line, "|"); len(cells) > 3 && strings.HasPrefix(cells[2], " `Code") && !strings.Contains(read(t, "cni.go"), strings.Trim(cells[2], " `")+" ") {
			t.Errorf("docs/cni.md has a code that there is not: %s", line)
		}
	}
	if len(codes) > 0 {
		t.Errorf("docs/cni.md lacks rows: %v", codes)
	}
}

func read(t *testing.T, path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
