package disk

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// destructive are the programs that overwrite a disk, as a word of any string;
// mkfs is allowed in one function.
var destructive = regexp.MustCompile(`(^|[^a-zA-Z0-9_-])(mkfs(\.\w+)?|mke2fs|mkswap|wipefs|blkdiscard|pvcreate|vgcreate|lvcreate|mdadm|sgdisk|sfdisk|parted|shred|cryptsetup)($|[^a-zA-Z0-9_-])|^dd($| )`)

// forbidden are the requests to the kernel that do the same.
var forbidden = []string{"BLKDISCARD", "BLKSECDISCARD", "BLKZEROOUT", "BLKPG", "BLKROSET"}

// TestOneWayToFormat walks the syntax tree of everything that ends up on a node.
func TestOneWayToFormat(t *testing.T) {
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	var permits, sites, files int
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if e.IsDir() {
			if rel == "lab" || rel == "images" || e.Name() == "testdata" || len(rel) > 1 && strings.HasPrefix(e.Name(), ".") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		files++
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		here := rel == filepath.Join("agent", "disk", "format_linux.go")
		for _, decl := range file.Decls {
			fn, _ := decl.(*ast.FuncDecl)
			in := func(name string) bool { return here && fn != nil && fn.Name.Name == name }
			// These run a program on a file system that is mounted.
			mounted := fn != nil && (rel == filepath.Join("agent", "disk", "grow_linux.go") && fn.Name.Name == "growNow" ||
				rel == filepath.Join("agent", "disk", "trim_linux.go") && fn.Name.Name == "trim")
			ast.Inspect(decl, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.BasicLit:
					if n.Kind == token.STRING && destructive.MatchString(strings.Trim(n.Value, "`\"")) && !in("mkfs") {
						t.Errorf("%s: %s names a program that overwrites disks", set.Position(n.Pos()), n.Value)
					}
				case *ast.SelectorExpr:
					if slices.Contains(forbidden, n.Sel.Name) {
						t.Errorf("%s: %s overwrites disks", set.Position(n.Pos()), n.Sel.Name)
					}
				case *ast.CompositeLit:
					if id, ok := n.Type.(*ast.Ident); ok && filepath.Dir(rel) == filepath.Join("agent", "disk") && id.Name == "permit" {
						permits++
						if !in("prove") {
							t.Errorf("%s: a permit that was not proven", set.Position(n.Pos()))
						}
					}
				case *ast.CallExpr:
					s, ok := n.Fun.(*ast.SelectorExpr)
					if !ok {
						return true
					}
					if s.Sel.Name == "mkfs" {
						sites++
					}
					if x, ok := s.X.(*ast.Ident); ok && x.Name == "exec" && filepath.Dir(rel) == filepath.Join("agent", "disk") && !in("mkfs") && !mounted && !itself(rel, fn, n) {
						t.Errorf("%s: runs a program", set.Position(n.Pos()))
					}
				}
				return true
			})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files < 20 || permits != 1 || sites != 1 {
		t.Errorf("%d files hold %d permits and %d calls of mkfs; want one each", files, permits, sites)
	}
}

// itself reports whether a call starts this very program, as a helper that writes
// nothing.
func itself(file string, in *ast.FuncDecl, call *ast.CallExpr) bool {
	if file != filepath.Join("agent", "disk", "helper_linux.go") || in == nil || in.Name.Name != "start" || len(call.Args) != 2 {
		return false
	}
	program, ok := call.Args[0].(*ast.SelectorExpr)
	errand, ok2 := call.Args[1].(*ast.Ident)
	return ok && ok2 && program.Sel.Name == "self" && errand.Name == "HelperCommand"
}

func TestDestructiveWords(t *testing.T) {
	for _, bad := range []string{"mkfs.ext4", "/sbin/mkfs.xfs", "sh -c 'wipefs -a /dev/vdb'", "dd", "dd if=/dev/zero", "mkfs -t ext4"} {
		if !destructive.MatchString(bad) {
			t.Errorf("%q is not seen", bad)
		}
	}
	for _, good := range []string{"add", "format disk", "cidd", "the mkfs-deadline"} {
		if destructive.MatchString(good) {
			t.Errorf("%q is seen", good)
		}
	}
}
