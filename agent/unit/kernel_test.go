//go:build kernel

package unit

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/images"
)

// startContainerd runs the node's containerd with this root until the test ends.
func startContainerd(t *testing.T, root string) *Runtime {
	t.Helper()
	cache, err := images.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(cache, "components", "bin", "containerd")
	if _, err := os.Stat(binary); err != nil {
		t.Fatalf("%v; run: make test-kernel, which builds it", err)
	}
	dir := t.TempDir()
	socket, config := filepath.Join(dir, "c.sock"), filepath.Join(dir, "config.toml")
	// Everything below the test's own directory.
	text := fmt.Sprintf("version = 4\nroot = %q\nstate = %q\ndisabled_plugins = ['io.containerd.nri.v1.nri']\n"+
		"[plugins.'io.containerd.server.v1.grpc']\naddress = %q\n[plugins.'io.containerd.server.v1.ttrpc']\naddress = %q\n"+
		"[plugins.'io.containerd.internal.v1.opt']\npath = %q\n[plugins.'io.containerd.cri.v1.runtime'.cni]\nconf_dir = %q\n",
		root, filepath.Join(dir, "state"), socket, socket+".ttrpc", filepath.Join(dir, "opt"), filepath.Join(dir, "cni"))
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(binary, "--config", config)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	rt, err := dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		rt.Close()
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-exited:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-exited
		}
		if t.Failed() {
			t.Logf("containerd:\n%s", log.String())
		}
	})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		err := rt.probe(ctx)
		cancel()
		if err == nil {
			return rt
		}
		select {
		case <-exited:
			t.Fatal("containerd has ended")
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// holds describes all that containerd's API tells of images, contents and
// snapshots but times.
func holds(t *testing.T, rt *Runtime) string {
	t.Helper()
	ctx := namespaces.WithNamespace(t.Context(), node.CRINamespace)
	// A garbage collection that is waited for.
	lease, err := rt.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := rt.client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	var lines []string
	line := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	labels := func(m map[string]string) string {
		var b strings.Builder
		for _, k := range slices.Sorted(maps.Keys(m)) {
			fmt.Fprintf(&b, " %s=%s", k, m[k])
		}
		return b.String()
	}
	list, err := rt.client.ImageService().List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range list {
		line("image %s %v%s", i.Name, i.Target, labels(i.Labels))
	}
	err = rt.client.ContentStore().Walk(ctx, func(i content.Info) error {
		line("content %s %d%s", i.Digest, i.Size, labels(i.Labels))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sn := rt.client.SnapshotService("overlayfs")
	err = sn.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		u, err := sn.Usage(ctx, i.Name)
		line("snapshot %s of %q %s, %d files%s", i.Name, i.Parent, i.Kind, u.Inodes, labels(i.Labels))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	spaces, err := rt.client.NamespaceService().List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	line("namespaces %v", spaces)
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// onDisk describes contents and snapshots on the disk, each snapshot by what is in
// it: their numbers are those of their order.
func onDisk(t *testing.T, root string) string {
	t.Helper()
	var lines []string
	for _, top := range node.SeedDirs[:2] {
		err := filepath.WalkDir(filepath.Join(root, top), func(name string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			st, err := d.Info()
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(root, name)
			to, _ := os.Readlink(name)
			stat := st.Sys().(*syscall.Stat_t)
			line := fmt.Sprintf("%s %v %d:%d %s", rel, st.Mode(), stat.Uid, stat.Gid, to)
			if !d.IsDir() && filepath.Ext(rel) != ".db" {
				line += fmt.Sprint(" ", st.Size())
			}
			if _, inside, ok := strings.Cut(rel, "/fs/"); ok && inside != "" {
				line += fmt.Sprint(" ", st.ModTime().Unix())
			}
			lines = append(lines, line)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return strings.Join(lines, "\n")
}

// TestKernelSeedIsAnImport starts the node's containerd on a root that was seeded,
// and again on one into which the images are imported: the two are the same.
func TestKernelSeedIsAnImport(t *testing.T) {
	cache, err := images.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	baked := t.TempDir()
	var from []string
	for _, name := range []string{"pause.tar", "web.tar"} { // in this order their snapshots are numbered
		data, err := os.ReadFile(filepath.Join(cache, "images", "oci", name))
		if err != nil {
			t.Fatalf("%v; run: make test-kernel, which builds it", err)
		}
		from = append(from, filepath.Join(baked, name))
		if err := os.WriteFile(filepath.Join(baked, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m := newMachine(t)
	m.seed = filepath.Join(t.TempDir(), "seed.tar")
	if err := images.WriteSeed(t.Context(), m.seed, from...); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	converge(t, containerdOn(m, ""))
	t.Logf("sown in %s", time.Since(began))
	rt := startContainerd(t, rootOf(m))
	again := func(rt *Runtime) string {
		t.Helper()
		p, err := NewImages(baked, m, rt).Plan(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return p.String()
	}
	if p := again(rt); p != "" {
		t.Errorf("to be imported although it was sown:\n%s", p)
	}
	// What kubelet sees. Of the answer only the strings are looked at.
	var answer emptypb.Empty
	if err := rt.conn.Invoke(t.Context(), "/runtime.v1.ImageService/ListImages", &emptypb.Empty{}, &answer); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{node.PauseImage, images.Web} {
		if !bytes.Contains(answer.ProtoReflect().GetUnknown(), []byte(name)) {
			t.Errorf("the CRI does not list %s", name)
		}
	}
	seeded := holds(t, rt)
	if p := again(rt); p != "" {
		t.Errorf("to be imported after a garbage collection:\n%s", p)
	}

	other := t.TempDir()
	rt2 := startContainerd(t, other)
	if p := again(rt2); strings.Count(p, "import") != 2 {
		t.Errorf("plan of an empty root:\n%s", p)
	}
	began = time.Now()
	for _, path := range from {
		if err := rt2.load(t.Context(), path); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("imported in %s", time.Since(began))
	if imported := holds(t, rt2); imported != seeded {
		t.Errorf("seeded:\n%s\nimported:\n%s", seeded, imported)
	}
	if a, b := onDisk(t, rootOf(m)), onDisk(t, other); a != b {
		t.Errorf("seeded:\n%s\nimported:\n%s", a, b)
	}
}
