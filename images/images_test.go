package images

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, data := range files {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func mustTreeKey(t *testing.T, dir string) string {
	t.Helper()
	key, err := treeKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestKeyOfIsUnambiguous(t *testing.T) {
	if keyOf("ab", "c") == keyOf("a", "bc") || keyOf("a") == keyOf("a", "") {
		t.Error("different inputs, same key")
	}
}

func TestTreeKey(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{"a": "1", "d/b": "2"})
	key := mustTreeKey(t, dir)

	// What git does not keep, the key does not see.
	if err := os.Chmod(filepath.Join(dir, "a"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(dir, "a"), time.Time{}, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if mustTreeKey(t, dir) != key {
		t.Error("key depends on times or on permission bits other than the executable one")
	}
	changes := []struct {
		what string
		do   func() error
	}{
		{"content", func() error { return os.WriteFile(filepath.Join(dir, "a"), []byte("3"), 0o644) }},
		{"executable", func() error { return os.Chmod(filepath.Join(dir, "a"), 0o755) }},
		{"new file", func() error { return os.WriteFile(filepath.Join(dir, "c"), nil, 0o644) }},
		{"link", func() error { return os.Symlink("a", filepath.Join(dir, "l")) }},
		{"link target", func() error {
			return errors.Join(os.Remove(filepath.Join(dir, "l")), os.Symlink("c", filepath.Join(dir, "l")))
		}},
		{"name", func() error { return os.Rename(filepath.Join(dir, "c"), filepath.Join(dir, "e")) }},
	}
	for _, c := range changes {
		if err := c.do(); err != nil {
			t.Fatal(err)
		}
		next := mustTreeKey(t, dir)
		if next == key {
			t.Errorf("%s changed, key did not", c.what)
		}
		key = next
	}
}

// quiet is a Progress that keeps the names of the steps.
type quiet struct{ steps []string }

func (q *quiet) Begin(step string)              { q.steps = append(q.steps, step) }
func (q *quiet) Update(string, float64, string) {}
func (q *quiet) End(string, error)              {}

func newBuilder(t *testing.T) *builder {
	b := &builder{Options: Options{Cache: t.TempDir(), Progress: &quiet{}}, keys: map[string]string{}}
	unlock, err := b.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(unlock)
	return b
}

func TestStepIsDoneOnceForAKey(t *testing.T) {
	b := newBuilder(t)
	file := filepath.Join(b.Cache, "images", "x")
	made := 0
	step := func(key, content string) error {
		return b.step("x", file, key, func(tmp string) error {
			made++
			return os.WriteFile(tmp, []byte(content), 0o644)
		})
	}
	for i, s := range []struct {
		key  string
		made int
	}{{"1", 1}, {"1", 1}, {"2", 2}, {"1", 3}} {
		if err := step(s.key, s.key); err != nil {
			t.Fatal(err)
		}
		got, _ := os.ReadFile(file)
		if string(got) != s.key || made != s.made {
			t.Errorf("step %d: content %q made %d times, want %q, %d", i, got, made, s.key, s.made)
		}
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := step("1", "1"); err != nil || made != 4 {
		t.Errorf("file is gone, stamp is there: made %d times, %v", made, err)
	}
}

func TestFailedStepKeepsTheOldResult(t *testing.T) {
	b := newBuilder(t)
	file := filepath.Join(b.Cache, "images", "x")
	if err := b.step("x", file, "1", func(tmp string) error { return os.WriteFile(tmp, []byte("old"), 0o644) }); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	err := b.step("x", file, "2", func(tmp string) error {
		return errors.Join(os.WriteFile(tmp, []byte("half"), 0o644), boom)
	})
	if !errors.Is(err, boom) {
		t.Errorf("error %v, want %v", err, boom)
	}
	if got, _ := os.ReadFile(file); string(got) != "old" || !stamped(file, "1") {
		t.Errorf("content %q, stamped %v", got, stamped(file, "1"))
	}
	left, _ := filepath.Glob(filepath.Join(b.Cache, "images", ".new-*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// A killed build can have done any prefix of commit's steps.
func TestCommitCutOffIsNeverTakenForDone(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "x")
	write(t, dir, map[string]string{"new1": "1"})
	if err := commit(filepath.Join(dir, "new1"), file, "1"); err != nil {
		t.Fatal(err)
	}
	// Cut off after the rename: the content is new, the stamp is not there.
	write(t, dir, map[string]string{"new2": "2"})
	if err := os.Remove(stampOf(file)); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "new2"), file); err != nil {
		t.Fatal(err)
	}
	if stamped(file, "1") || stamped(file, "2") {
		t.Error("half a commit counts as done")
	}
}

func TestLockWaitsAndCleans(t *testing.T) {
	b := newBuilder(t)
	left := filepath.Join(b.Cache, "images", ".new-1")
	write(t, left, map[string]string{"half": "x"})

	second := &builder{Options: Options{Cache: b.Cache, Progress: &quiet{}}}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := second.lock(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("lock of a locked cache: %v", err)
	}
	if _, err := os.Stat(left); err != nil {
		t.Error("a build that waits has removed what the running one makes")
	}
	third := &builder{Options: Options{Cache: t.TempDir(), Progress: &quiet{}}}
	write(t, third.Cache, map[string]string{"images/.new-2/half": "x"})
	unlock, err := third.lock(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if _, err := os.Stat(filepath.Join(third.Cache, "images", ".new-2")); !os.IsNotExist(err) {
		t.Error("what a killed build left is still there")
	}
}

func TestRun(t *testing.T) {
	var lines []string
	if err := run(t.Context(), exec.Command("sh", "-c", "echo a; echo b >&2"), func(l string) { lines = append(lines, l) }); err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	if !slices.Equal(lines, []string{"a", "b"}) {
		t.Errorf("lines %q", lines)
	}
	err := run(t.Context(), exec.Command("sh", "-c", "echo why; exit 3"), nil)
	if err == nil || !strings.Contains(err.Error(), "why") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("error %v, want the status and the output", err)
	}
}

func TestRunKillsTheWholeGroup(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	pid := filepath.Join(t.TempDir(), "pid")
	started := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		// The grandchild ignores everything that can be ignored and holds the pipe.
		done <- run(ctx, exec.Command("sh", "-c", `sh -c 'trap "" INT TERM HUP; echo $$ >`+pid+`; echo up; sleep 60' & wait`),
			func(string) { close(started) })
	}()
	<-started
	cancel()
	select {
	case err := <-done:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("run does not return")
	}
	data, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	for range 500 { // being killed takes the kernel a moment
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(data)) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") { // a zombie waits for its new parent
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("grandchild still runs")
}

func TestOutputName(t *testing.T) {
	for pkg, want := range map[string]string{
		"go.etcd.io/etcd/server/v3":         "server",
		"k8s.io/kubernetes/cmd/kubelet":     "kubelet",
		"github.com/opencontainers/runc":    "runc",
		"github.com/x/containerd/v2/cmd/ct": "ct",
	} {
		if got := outputName(pkg); got != want {
			t.Errorf("outputName(%s) = %s, want %s", pkg, got, want)
		}
	}
}

func TestVersionsOfGoMod(t *testing.T) {
	v, err := versions(t.Context(), "components")
	if err != nil {
		t.Fatal(err)
	}
	flags := ldflags(v)
	for _, want := range []string{
		"-X k8s.io/component-base/version.gitVersion=" + v["k8s.io/kubernetes"],
		"-X github.com/containerd/containerd/v2/version.Version=" + v["github.com/containerd/containerd/v2"],
		"-X github.com/prometheus/common/version.Version=" + prometheusRelease(v["github.com/prometheus/prometheus"]),
	} {
		if !strings.Contains(flags, want) {
			t.Errorf("no %s in %s", want, flags)
		}
	}
	if got := prometheusRelease("v0.316.2"); got != "3.16.2" {
		t.Errorf("release of v0.316.2 is %s", got)
	}
}

// TestCoreDNSHasItsPlugins: one that the Corefile of a node names, and CoreDNS was
// built without, keeps it from starting.
func TestCoreDNSHasItsPlugins(t *testing.T) {
	main, err := os.ReadFile("components/coredns/main.go")
	if err != nil {
		t.Fatal(err)
	}
	corefile, err := os.ReadFile("../bootstrap/templates/Corefile")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`(?m)^ {4}([a-z]+)`).FindAllSubmatch(corefile, -1)
	if len(named) == 0 {
		t.Error("the Corefile names no plugin")
	}
	for _, m := range named {
		plugin := string(m[1])
		if plugin == "prometheus" { // the package's name differs
			plugin = "metrics"
		}
		if !strings.Contains(string(main), `_ "github.com/coredns/coredns/plugin/`+plugin+`"`) {
			t.Errorf("coredns is built without %s", plugin)
		}
	}
}

// untar reads a tar into memory and checks what must hold for every one we write.
func untar(t *testing.T, data []byte) map[string]string {
	t.Helper()
	out := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(epoch) || h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%s: time %v, owner %d:%d %s", h.Name, h.ModTime, h.Uid, h.Gid, h.Uname)
		}
		if _, ok := out[h.Name]; ok {
			t.Errorf("%s twice", h.Name)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out[h.Name] = string(content) + h.Linkname
	}
}

func TestOCIArchive(t *testing.T) {
	files := []ociFile{
		{path: "usr/bin/b", data: []byte("bb")},
		{path: "a", data: []byte("a"), mode: 0o644},
		{path: "bin", link: "usr/bin"},
	}
	build := func(files []ociFile) []byte {
		var b bytes.Buffer
		if err := writeOCI(&b, "example.com/x:1", files, ociConfig{Entrypoint: []string{"/a"}}); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	archive := build(files)
	slices.Reverse(files)
	if !bytes.Equal(archive, build(files)) {
		t.Error("the same files give another archive")
	}

	blobs := untar(t, archive)
	get := func(d descriptor, v any) string {
		data, ok := blobs["blobs/sha256/"+strings.TrimPrefix(d.Digest, "sha256:")]
		sum := sha256.Sum256([]byte(data))
		if !ok || d.Size != len(data) || d.Digest != "sha256:"+hex.EncodeToString(sum[:]) {
			t.Errorf("blob %+v is not what it says", d)
		}
		if v != nil {
			if err := json.Unmarshal([]byte(data), v); err != nil {
				t.Error(err)
			}
		}
		return data
	}
	var index struct{ Manifests []descriptor }
	if err := json.Unmarshal([]byte(blobs["index.json"]), &index); err != nil || len(index.Manifests) != 1 {
		t.Fatalf("index %s: %v", blobs["index.json"], err)
	}
	if got := index.Manifests[0].Annotations["io.containerd.image.name"]; got != "example.com/x:1" {
		t.Errorf("name %q", got)
	}
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	get(index.Manifests[0], &manifest)
	var config struct {
		Config ociConfig
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	get(manifest.Config, &config)
	if len(manifest.Layers) != 1 || !slices.Equal(config.Rootfs.DiffIDs, []string{manifest.Layers[0].Digest}) {
		t.Errorf("layers %+v, diff ids %v", manifest.Layers, config.Rootfs.DiffIDs)
	}
	layer := untar(t, []byte(get(manifest.Layers[0], nil)))
	for name, want := range map[string]string{"a": "a", "bin": "usr/bin", "usr/": "", "usr/bin/": "", "usr/bin/b": "bb"} {
		if got, ok := layer[name]; !ok || got != want {
			t.Errorf("layer: %s is %q, %v; want %q", name, got, ok, want)
		}
	}
}

func TestWriteTarRefusesBadPaths(t *testing.T) {
	for _, files := range [][]ociFile{
		{{path: "/a"}}, {{path: "a/../b"}}, {{path: "a"}, {path: "a"}},
	} {
		if err := writeTar(io.Discard, files); err == nil {
			t.Errorf("%v: no error", files)
		}
	}
}

func TestContainerImagesAreComplete(t *testing.T) {
	archives := map[string]bool{}
	for ref, image := range containerImages {
		if archives[image.file] {
			t.Errorf("%s: %s is another image's archive", ref, image.file)
		}
		archives[image.file] = true
		if _, ok := components[image.component]; image.component != "" && !ok {
			t.Errorf("%s: no component %s", ref, image.component)
		}
	}
}

func loader() (boot, core []byte) {
	boot, core = make([]byte, sector), make([]byte, 100*sector)
	boot[0], core[sector] = 0xeb, 0xfa
	binary.LittleEndian.PutUint64(boot[0x5c:], 1)
	binary.LittleEndian.PutUint64(core[sector-12:], 2)
	return boot, core
}

func TestBootArea(t *testing.T) {
	boot, core := loader()
	head, err := bootArea(boot, core, [4]byte{1, 2, 3, 4})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(head[sector:], core) || head[0] != 0xeb || !bytes.Equal(head[0x1b8:0x1bc], []byte{1, 2, 3, 4}) {
		t.Error("boot loader or signature is not where it must be")
	}
	entry := head[0x1be:]
	start, length := binary.LittleEndian.Uint32(entry[8:]), binary.LittleEndian.Uint32(entry[12:])
	if entry[0] != 0x80 || entry[4] != 0x83 || start != 2048 || (uint64(start)+uint64(length))*sector != diskSize {
		t.Errorf("partition %x", entry[:16])
	}
	if !bytes.Equal(entry[16:64], make([]byte, 48)) || head[510] != 0x55 || head[511] != 0xaa {
		t.Error("partition table is not closed")
	}
}

func TestBootAreaRefusesAForeignLoader(t *testing.T) {
	boot, core := loader()
	other := slices.Clone(core)
	other[sector-12] = 3
	for what, c := range map[string][2][]byte{
		"long boot sector": {append(slices.Clone(boot), 0), core},
		"elsewhere":        {boot, other},
		"too large":        {boot, append(slices.Clone(core), make([]byte, rootStart)...)},
		"empty":            {boot, nil},
	} {
		if _, err := bootArea(c[0], c[1], [4]byte{}); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

func TestDropOldKeepsCurrentAndLast(t *testing.T) {
	b := newBuilder(t)
	dir := filepath.Join(b.Cache, "images")
	name := func(n string) string { return filepath.Join(dir, "node-"+n+".qcow2") }
	for i, n := range []string{"a", "b", "c", "d"} {
		write(t, dir, map[string]string{"node-" + n + ".qcow2": n, ".key-node-" + n + ".qcow2": n})
		if err := os.Chtimes(name(n), time.Time{}, time.Unix(int64(i), 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.dropOld(name("b")); err != nil { // an old image can be the wanted one again
		t.Fatal(err)
	}
	left, _ := filepath.Glob(filepath.Join(dir, "node-*"))
	if !slices.Equal(left, []string{name("b"), name("d")}) {
		t.Errorf("left: %v", left)
	}

	// A lab's image stays; one that lost its stamp, or half of a removal, goes.
	write(t, dir, map[string]string{"node-a.qcow2": "a", "node-c.qcow2": "c"})
	for i, n := range []string{"a", "c"} {
		if err := os.Chtimes(name(n), time.Time{}, time.Unix(int64(-i), 0)); err != nil {
			t.Fatal(err)
		}
	}
	held, err := Hold(name("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := b.dropOld(name("b")); err != nil {
		t.Fatal(err)
	}
	left, _ = filepath.Glob(filepath.Join(dir, "node-*"))
	if !slices.Equal(left, []string{name("a"), name("b"), name("d")}) {
		t.Errorf("left while a lab holds a: %v", left)
	}
}
