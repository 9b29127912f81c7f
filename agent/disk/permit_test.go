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

// destructive are the programs that overwrite a disk, as a word of any string.
var destructive = regexp.MustCompile(`(^|[^a-zA-Z0-9_-])(mkfs(\.\w+)?|mke2fs|mkswap|wipefs|blkdiscard|pvcreate|vgcreate|lvcreate|mdadm|sgdisk|sfdisk|parted|shred|cryptsetup)($|[^a-zA-Z0-9_-])|^dd($| )`)

// programs are the functions that may name a program, and what else of it they say.
// What makes an array or a header is said in one place each, by a method of permit or
// under one.
var programs = map[string]*regexp.Regexp{
	"mkfs":       regexp.MustCompile(`^mkfs\.(ext4|xfs)$`),
	"makeArray":  regexp.MustCompile(`^mdadm$`),
	"makeCrypt":  regexp.MustCompile(`^cryptsetup$`),
	"openCrypt":  regexp.MustCompile(`^cryptsetup$`),
	"closeCrypt": regexp.MustCompile(`^cryptsetup$`),
}

// writing are the words that make a program of several uses overwrite a disk, and where
// they may stand, once.
var writing = regexp.MustCompile(`^(--(create|build|assemble|grow|manage|zero-superblock|add|re-add)|-[CAGB]|luks(Format|Erase|AddKey|RemoveKey|ChangeKey|KillSlot|HeaderRestore)|erase|reencrypt|convert)$`)

var writes = map[string]string{"makeArray": "--create", "makeCrypt": "luksFormat"}

// forbidden are the requests to the kernel that do the same.
var forbidden = []string{"BLKDISCARD", "BLKSECDISCARD", "BLKZEROOUT", "BLKPG", "BLKROSET"}

// TestOneWayToFormat walks the syntax tree of everything that ends up on a node.
func TestOneWayToFormat(t *testing.T) {
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	var permits, files int
	sites := map[string]int{}
	said := map[string]int{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if e.IsDir() {
			if rel == "lab" || rel == "images" || rel == "packaging" || e.Name() == "testdata" || len(rel) > 1 && strings.HasPrefix(e.Name(), ".") {
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
		here := filepath.Dir(rel) == filepath.Join("agent", "disk")
		for _, decl := range file.Decls {
			fn, _ := decl.(*ast.FuncDecl)
			in := func(name string) bool { return here && fn != nil && fn.Name.Name == name }
			name := ""
			if here && fn != nil {
				name = fn.Name.Name
			}
			ast.Inspect(decl, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.BasicLit:
					text := strings.Trim(n.Value, "`\"")
					if allowed := programs[name]; n.Kind == token.STRING && destructive.MatchString(text) && (allowed == nil || !allowed.MatchString(text)) {
						t.Errorf("%s: %s names a program that overwrites disks", set.Position(n.Pos()), n.Value)
					}
					if here && n.Kind == token.STRING && writing.MatchString(text) {
						if said[text]++; writes[name] != text {
							t.Errorf("%s: %s has a program overwrite a disk", set.Position(n.Pos()), n.Value)
						}
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
					if id, ok := n.Fun.(*ast.Ident); ok && here && id.Name == "program" && programs[name] == nil && !in("load") {
						t.Errorf("%s: runs a program", set.Position(n.Pos()))
					}
					s, ok := n.Fun.(*ast.SelectorExpr)
					if !ok {
						return true
					}
					if _, ok := programs[s.Sel.Name]; ok {
						if sites[s.Sel.Name]++; s.Sel.Name != "openCrypt" && s.Sel.Name != "closeCrypt" && !in("format") {
							t.Errorf("%s: formats without a permit", set.Position(n.Pos()))
						}
					}
					if x, ok := s.X.(*ast.Ident); ok && x.Name == "exec" && here && !in("program") {
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
	if files < 20 || permits != 1 || sites["mkfs"] != 1 || sites["makeArray"] != 1 || sites["makeCrypt"] != 1 {
		t.Errorf("%d files hold %d permits and calls of %v; want one of each that writes", files, permits, sites)
	}
	if len(said) != 2 || said["--create"] != 1 || said["luksFormat"] != 1 {
		t.Errorf("programs are told to overwrite disks by %v; want each once", said)
	}
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
