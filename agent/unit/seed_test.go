package unit

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// sown writes a seed of these entries, with an index that says so, and returns
// its file.
func sown(t *testing.T, entries ...tar.Header) string {
	t.Helper()
	contents := node.SeedContents{Images: []string{"pause:v1", "web:v1"}, Files: len(entries)}
	for _, h := range entries {
		contents.Bytes += h.Size
	}
	return sownAs(t, contents, entries...)
}

func sownAs(t *testing.T, contents node.SeedContents, entries ...tar.Header) string {
	t.Helper()
	index, err := json.Marshal(contents)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	put := func(h tar.Header, data []byte) {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	put(tar.Header{Name: node.SeedIndex, Mode: 0o644, Size: int64(len(index))}, index)
	for _, h := range entries {
		put(h, bytes.Repeat([]byte("x"), int(h.Size)))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "seed.tar")
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

func dir(name string) tar.Header {
	return tar.Header{Name: name + "/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(7, 0)}
}

func reg(name string, size int64) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o444, Size: size, ModTime: time.Unix(7, 0)}
}

func link(name, to string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to, Mode: 0o777, ModTime: time.Unix(7, 0)}
}

// usual are the entries of a small seed.
func usual() []tar.Header {
	const fs = "io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs"
	return []tar.Header{
		dir("io.containerd.content.v1.content"), reg("io.containerd.content.v1.content/blob", 70000),
		dir("io.containerd.metadata.v1.bolt"), reg("io.containerd.metadata.v1.bolt/meta.db", 4096),
		dir("io.containerd.snapshotter.v1.overlayfs"), dir("io.containerd.snapshotter.v1.overlayfs/snapshots"),
		dir("io.containerd.snapshotter.v1.overlayfs/snapshots/1"), dir(fs),
		{Name: fs + "/tmp/", Typeflag: tar.TypeDir, Mode: 0o1777, ModTime: time.Unix(8, 0)},
		reg(fs+"/sh", 10), link(fs+"/bash", "/etc/passwd"),
		{Name: fs + "/ash", Typeflag: tar.TypeLink, Linkname: fs + "/sh", Mode: 0o444},
	}
}

// tree describes everything below dir: types, modes, sizes, times, targets, and
// which names are one file.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == dir {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		to, _ := os.Readlink(name)
		size := st.Size()
		if d.IsDir() {
			size = 0
		}
		fmt.Fprintf(&b, "%s %v %d %s", rel, st.Mode(), size, to)
		if strings.Contains(rel, "/") || !d.IsDir() { // renaming a directory may change its time
			fmt.Fprintf(&b, " %d", st.ModTime().Unix())
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func rootOf(m *machine) string { return m.root + node.ContainerdRoot }

func TestSeed(t *testing.T) {
	m := newMachine(t)
	m.seed = sown(t, usual()...)
	if err := os.MkdirAll(filepath.Join(rootOf(m), "lost+found"), 0o700); err != nil {
		t.Fatal(err)
	}
	u := containerdOn(m, "")
	p, err := u.Plan(t.Context())
	want := "seed " + rootOf(m) + " with 2 baked images (72.4 KiB)\nstart containerd.service\n"
	if err != nil || !strings.HasSuffix(p.String(), want) {
		t.Fatalf("%v, plan:\n%swant at its end:\n%s", err, p, want)
	}
	if got := tree(t, rootOf(m)); strings.Count(got, "\n") != 1 {
		t.Errorf("a plan has changed something:\n%s", got)
	}
	converge(t, u)
	const wantTree = `io.containerd.content.v1.content drwxr-xr-x 0 
io.containerd.content.v1.content/blob -r--r--r-- 70000  7
io.containerd.metadata.v1.bolt drwxr-xr-x 0 
io.containerd.metadata.v1.bolt/meta.db -r--r--r-- 4096  7
io.containerd.snapshotter.v1.overlayfs drwxr-xr-x 0 
io.containerd.snapshotter.v1.overlayfs/snapshots drwxr-xr-x 0  7
io.containerd.snapshotter.v1.overlayfs/snapshots/1 drwxr-xr-x 0  7
io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs drwxr-xr-x 0  7
io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs/ash -r--r--r-- 10  7
io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs/bash Lrwxrwxrwx 11 /etc/passwd 7
io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs/sh -r--r--r-- 10  7
io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs/tmp dtrwxrwxrwx 0  8
lost+found drwx------ 0 
`
	if got := tree(t, rootOf(m)); got != wantTree {
		t.Errorf("got:\n%swant:\n%s", got, wantTree)
	}
	// Neither a restart of containerd nor another seed touches it again.
	if err := os.Remove(m.seed); err != nil {
		t.Fatal(err)
	}
	m.seed = sown(t, append(usual(), dir("io.containerd.content.v1.content/more"))...)
	m.units[node.ContainerdUnit].Active = "failed"
	converge(t, containerdOn(m, ""))
	if got := tree(t, rootOf(m)); got != wantTree {
		t.Errorf("sown again:\n%s", got)
	}
}

// mortal is a context that ends after it has been asked so many times: whatever
// asks it between any two steps is killed between any two of them.
type mortal struct {
	context.Context
	left *int
}

func (m mortal) Err() error {
	if *m.left--; *m.left < 0 {
		return context.Canceled
	}
	return nil
}

// TestSeedKilledBetweenAnyTwoSteps is law 10.
func TestSeedKilledBetweenAnyTwoSteps(t *testing.T) {
	entries := usual()
	reference := newMachine(t)
	reference.seed = sown(t, entries...)
	converge(t, containerdOn(reference, ""))
	want := tree(t, rootOf(reference))
	seen := map[string]bool{}
	for n := range 100 {
		m := newMachine(t)
		m.seed = reference.seed
		left := n
		err := containerdOn(m, "").seed.sow(mortal{t.Context(), &left})
		if err == nil {
			if n < len(entries) || len(seen) < 5 {
				t.Errorf("after only %d steps, with states %v", n, slices.Collect(maps.Keys(seen)))
			}
			return
		}
		// What is there when it is killed, as far as the next one can see.
		names, _ := filepath.Glob(filepath.Join(rootOf(m), "*"))
		seen[strings.ReplaceAll(strings.Join(names, " "), rootOf(m), "")] = true
		converge(t, containerdOn(m, ""))
		if got := tree(t, rootOf(m)); got != want {
			t.Errorf("killed after step %d, got:\n%swant:\n%s", n, got, want)
		}
	}
	t.Error("it has more steps than were tried")
}

func TestSeedRefuses(t *testing.T) {
	const content = "io.containerd.content.v1.content"
	for name, bad := range map[string][]tar.Header{
		"parent":             {dir(content), reg(content+"/../../evil", 1)},
		"parent of the root": {reg("../evil", 1)},
		"absolute":           {reg("/evil", 1)},
		"not clean":          {dir(content), reg(content+"//evil", 1)},
		"elsewhere":          {dir("evil")},
		"own names":          {dir(seedReady)},
		"file for directory": {reg(content, 1)},
		"link for directory": {link(content, "/etc")},
		"no directory":       {dir(content), reg(content+"/a/evil", 1)},
		"through a link":     {dir(content), link(content+"/a", "/tmp"), reg(content+"/a/evil", 1)},
		"over a link":        {dir(content), link(content+"/a", "/tmp/evil"), reg(content+"/a", 1)},
		"twice":              {dir(content), reg(content+"/a", 1), reg(content+"/a", 1)},
		"device":             {dir(content), {Name: content + "/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}},
		"pipe":               {dir(content), {Name: content + "/pipe", Typeflag: tar.TypeFifo, Mode: 0o666}},
		"set-user-id":        {dir(content), {Name: content + "/su", Typeflag: tar.TypeReg, Mode: 0o4755}},
		"hard link outside":  {dir(content), {Name: content + "/a", Typeflag: tar.TypeLink, Linkname: "../../etc/passwd"}},
		"hard link to link":  {dir(content), link(content+"/a", "/etc/passwd"), {Name: content + "/b", Typeflag: tar.TypeLink, Linkname: content + "/a"}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.seed = sown(t, bad...)
			refused(t, m)
		})
	}
	for name, contents := range map[string]node.SeedContents{
		"more bytes":  {Images: []string{"a"}, Files: 12, Bytes: 74105},
		"fewer bytes": {Images: []string{"a"}, Files: 12, Bytes: 74107},
		"more files":  {Images: []string{"a"}, Files: 11, Bytes: 74106},
		"fewer files": {Images: []string{"a"}, Files: 13, Bytes: 74106},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.seed = sownAs(t, contents, usual()...)
			refused(t, m)
		})
	}
}

// refused expects an error, and then a containerd that starts without a seed.
func refused(t *testing.T, m *machine) {
	t.Helper()
	u := containerdOn(m, "")
	p, err := u.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = u.Apply(t.Context(), p)
	if err == nil || node.ClassOf(err) != node.ClassTransient || !strings.HasSuffix(err.Error(), "the images will be imported") {
		t.Fatalf("refused with %v", err)
	}
	t.Log(err)
	if got := m.take(); got != "" {
		t.Errorf("after the error: %s", got)
	}
	converge(t, u)
	if got := m.take(); got != "start containerd.service" {
		t.Errorf("next: %s", got)
	}
	if got := tree(t, rootOf(m)); got != "" {
		t.Errorf("left:\n%s", got)
	}
	if _, err := os.Lstat(filepath.Join(filepath.Dir(rootOf(m)), "evil")); err == nil {
		t.Error("written outside")
	}
}

func TestDamagedSeed(t *testing.T) {
	whole, err := os.ReadFile(sown(t, usual()...))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"empty": nil, "not a tar": []byte("hello"), "cut off in the index": whole[:600],
		"no index":  tarball(t, "a", "b"),
		"no images": tarball(t, node.SeedIndex, `{"files":1}`),
		"a bomb":    tarball(t, node.SeedIndex, `{"images":["a"],"files":1,"bytes":1000000000000}`),
	} {
		m := newMachine(t)
		m.seed = filepath.Join(t.TempDir(), "seed.tar")
		if err := os.WriteFile(m.seed, data, 0o644); err != nil {
			t.Fatal(err)
		}
		u := containerdOn(m, "")
		if p, err := u.Plan(t.Context()); err == nil {
			t.Errorf("%s: %v", name, p)
		}
		converge(t, u)
	}
	m := newMachine(t)
	m.seed = filepath.Join(t.TempDir(), "seed.tar")
	if err := os.WriteFile(m.seed, whole[:60000], 0o644); err != nil {
		t.Fatal(err)
	}
	if p, err := containerdOn(m, "").Plan(t.Context()); err == nil {
		t.Errorf("cut off: %v", p)
	}
}

// TestSeedLeavesAlone is about roots that are not fresh.
func TestSeedLeavesAlone(t *testing.T) {
	const content, bolt = "io.containerd.content.v1.content", "io.containerd.metadata.v1.bolt"
	for name, c := range map[string]struct {
		there []string // directories
		left  bool     // something of ours is removed
	}{
		"a database":                             {[]string{bolt}, false},
		"contents":                               {[]string{content}, false},
		"somebody's":                             {[]string{"backup"}, false},
		"containerd began during the unpacking":  {[]string{seedNew + "/" + content, bolt}, true},
		"containerd began before the moves":      {[]string{seedReady + "/" + content, seedReady + "/" + bolt, bolt, content}, true},
		"containerd began between the moves":     {[]string{seedReady + "/" + bolt, bolt, content}, true},
		"moved, and something else is there":     {[]string{seedReady + "/" + bolt, content, "backup"}, true},
		"killed before the last step":            {[]string{seedReady, bolt, content, "io.containerd.snapshotter.v1.overlayfs"}, true},
		"a whole seed lacks something":           {[]string{seedReady + "/" + bolt}, true},
		"killed while removing, and the next is": {[]string{seedReady + "/" + bolt, seedNew + "/" + bolt, bolt}, true},
	} {
		m := newMachine(t)
		m.seed = sown(t, usual()...)
		var want []string
		for _, dir := range c.there {
			if err := os.MkdirAll(filepath.Join(rootOf(m), dir), 0o755); err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(dir, ".") {
				want = append(want, dir)
			}
		}
		u := containerdOn(m, "")
		p, err := u.Plan(t.Context())
		if err != nil || strings.Contains(p.String(), "baked images") || strings.Contains(p.String(), "remove what is left of a seed") != c.left {
			t.Errorf("%s: %v, plan:\n%s", name, err, p)
		}
		converge(t, u)
		entries, err := os.ReadDir(rootOf(m))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, e := range entries {
			got = append(got, e.Name())
		}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// FuzzSeed: whatever two entries in a seed are, nothing is written outside of the
// directory that they are for.
func FuzzSeed(f *testing.F) {
	const content = "io.containerd.content.v1.content"
	f.Add(content+"/a", byte(tar.TypeSymlink), "../..", content+"/a/b", byte(tar.TypeReg), "")
	f.Add(content+"/a/", byte(tar.TypeDir), "", content+"/a/../../../b", byte(tar.TypeReg), "")
	f.Add(content+"/a", byte(tar.TypeReg), "", content+"/b", byte(tar.TypeLink), content+"/a")
	f.Add("../a", byte(tar.TypeReg), "", content+"/b", byte(tar.TypeLink), "../outside")
	f.Fuzz(func(t *testing.T, name1 string, type1 byte, link1, name2 string, type2 byte, link2 string) {
		top := t.TempDir()
		u := unpacking{dir: filepath.Join(top, "in"), left: node.SeedContents{Files: 3, Bytes: 3}, seen: map[string]byte{}, buffer: make([]byte, 10)}
		outside := filepath.Join(top, "outside")
		if err := os.WriteFile(outside, []byte("safe"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(u.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		at := dir(content)
		for _, h := range []*tar.Header{&at, {Name: name1, Typeflag: type1, Linkname: link1}, {Name: name2, Typeflag: type2, Linkname: link2}} {
			data := ""
			if h.Typeflag == tar.TypeReg {
				h.Size, data = 1, "x"
			}
			_ = u.entry(h, strings.NewReader(data)) // most are refused
		}
		_ = u.times()
		entries, err := os.ReadDir(top)
		if err != nil || len(entries) != 2 {
			t.Errorf("beside the directory: %v, %v", entries, err)
		}
		st, err := os.Stat(outside)
		if err != nil || st.Size() != 4 || st.Mode().Perm() != 0o600 || st.Sys().(*syscall.Stat_t).Nlink != 1 {
			t.Errorf("outside: %v, %v", st, err)
		}
	})
}
