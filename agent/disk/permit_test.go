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

// runners are the functions that may name such a program, and run one. What makes an
// array or a header is said in one place each, by a method of permit or under one.
var runners = map[string]*regexp.Regexp{
	"mkfs":      regexp.MustCompile(`^mkfs\.(ext4|xfs)$`),
	"makeArray": regexp.MustCompile(`^mdadm$`),
	"makeCrypt": regexp.MustCompile(`^cryptsetup$`),
	"openCrypt": regexp.MustCompile(`^cryptsetup$`),
	"widen":     regexp.MustCompile(`^cryptsetup$`),
	"lower":     regexp.MustCompile(`^cryptsetup$`),
}

// harmless are those of them that make nothing, and need no permit.
var harmless = []string{"openCrypt", "widen", "lower"}

// writing are the words that make a program of several uses overwrite a disk, and where
// they may stand, once.
var writing = regexp.MustCompile(`^(--(create|build|assemble|grow|manage|zero-superblock|add|re-add)|-[CAGB]|luks(Format|Erase|AddKey|RemoveKey|ChangeKey|KillSlot|HeaderRestore)|erase|reencrypt|convert)$`)

var writes = map[string]string{"makeArray": "--create", "makeCrypt": "luksFormat"}

// forbidden are the requests to the kernel that do the same.
var forbidden = []string{"BLKDISCARD", "BLKSECDISCARD", "BLKZEROOUT", "BLKPG", "BLKROSET"}

// law is what is counted of everything that ends up on a node.
type law struct {
	*testing.T
	files, permits int
	sites          map[string]int // calls of runners
	said           map[string]int // words of writing
}

// TestOneWayToFormat walks the syntax tree of everything that ends up on a node.
func TestOneWayToFormat(t *testing.T) {
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatal(err)
	}
	l := &law{T: t, sites: map[string]int{}, said: map[string]int{}}
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
		l.files++
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			fn, _ := decl.(*ast.FuncDecl)
			l.look(set, rel, fn, decl)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if l.files < 20 || l.permits != 1 || l.sites["mkfs"] != 1 || l.sites["makeArray"] != 1 || l.sites["makeCrypt"] != 1 {
		t.Errorf("%d files hold %d permits and calls of %v; want one of each that writes", l.files, l.permits, l.sites)
	}
	if len(l.said) != 3 || l.said["wipe"] != 1 || l.said["--create"] != 1 || l.said["luksFormat"] != 1 {
		t.Errorf("programs are told to overwrite disks by %v; want each once", l.said)
	}
}

// look holds a declaration, which is a function or not, against the law.
func (l *law) look(set *token.FileSet, file string, fn *ast.FuncDecl, decl ast.Decl) {
	here, name := filepath.Dir(file) == filepath.Join("agent", "disk"), ""
	if here && fn != nil {
		name = fn.Name.Name
	}
	// These run a program on a file system that is mounted.
	mounted := file == filepath.Join("agent", "disk", "grow_linux.go") && name == "growNow" ||
		file == filepath.Join("agent", "disk", "trim_linux.go") && name == "trim"
	ast.Inspect(decl, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.BasicLit:
			text := strings.Trim(n.Value, "`\"")
			if allowed := runners[name]; n.Kind == token.STRING && destructive.MatchString(text) && (allowed == nil || !allowed.MatchString(text)) {
				l.Errorf("%s: %s names a program that overwrites disks", set.Position(n.Pos()), n.Value)
			}
			if here && n.Kind == token.STRING && writing.MatchString(text) {
				if l.said[text]++; writes[name] != text {
					l.Errorf("%s: %s has a program overwrite a disk", set.Position(n.Pos()), n.Value)
				}
			}
		case *ast.Ident:
			if here && n.Name == "toWipe" && name != "wipe" && file != filepath.Join("agent", "disk", "errand_linux.go") {
				l.Errorf("%s: has a disk wiped", set.Position(n.Pos()))
			}
			if n.Name == "toWipe" && name == "wipe" {
				l.said["wipe"]++
			}
		case *ast.SelectorExpr:
			if slices.Contains(forbidden, n.Sel.Name) {
				l.Errorf("%s: %s overwrites disks", set.Position(n.Pos()), n.Sel.Name)
			}
		case *ast.CompositeLit:
			if id, ok := n.Type.(*ast.Ident); ok && here && id.Name == "permit" {
				if l.permits++; name != "prove" {
					l.Errorf("%s: a permit that was not proven", set.Position(n.Pos()))
				}
			}
		case *ast.CallExpr:
			if id, ok := n.Fun.(*ast.Ident); ok && here && id.Name == "program" && runners[name] == nil && name != "load" {
				l.Errorf("%s: runs a program", set.Position(n.Pos()))
			}
			s, ok := n.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if _, ok := runners[s.Sel.Name]; ok {
				if l.sites[s.Sel.Name]++; !slices.Contains(harmless, s.Sel.Name) && name != "format" {
					l.Errorf("%s: formats without a permit", set.Position(n.Pos()))
				}
			}
			if x, ok := s.X.(*ast.Ident); ok && x.Name == "exec" && here && name != "program" && !mounted && !helps(file, fn, n) {
				l.Errorf("%s: runs a program", set.Position(n.Pos()))
			}
		}
		return true
	})
}

// helps reports whether a call starts a helper, which writes nothing.
func helps(file string, in *ast.FuncDecl, call *ast.CallExpr) bool {
	if file != filepath.Join("agent", "disk", "helper_linux.go") || in == nil || in.Name.Name != "start" || len(call.Args) != 2 {
		return false
	}
	first, ok := call.Args[0].(*ast.IndexExpr)
	if !ok {
		return false
	}
	program, ok := first.X.(*ast.SelectorExpr)
	return ok && program.Sel.Name == "program"
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
