package images

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	ns "github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/tkenode/tkenode/agent/node"
)

// twoArchives writes two small images that share no layer.
func twoArchives(t *testing.T) (archives, refs []string) {
	t.Helper()
	refs = []string{"localhost/tkenode/pause:v1", "localhost/tkenode/web:1.0"}
	for i, files := range [][]ociFile{
		{{path: "pause", data: []byte("#!pause")}},
		{{path: "usr/bin/sh", data: bytes.Repeat([]byte("sh"), 50000)}, {path: "bin", link: "usr/bin"}, {path: "tmp/.keep", mode: 0o644}},
	} {
		var b bytes.Buffer
		if err := writeOCI(&b, refs[i], files, ociConfig{Entrypoint: []string{"/" + files[0].path}}); err != nil {
			t.Fatal(err)
		}
		archives = append(archives, filepath.Join(t.TempDir(), "a.tar"))
		if err := os.WriteFile(archives[i], b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return archives, refs
}

// extract unpacks a seed as tar(1) would, without the owners.
func extract(t *testing.T, seed, to string) node.SeedContents {
	t.Helper()
	data, err := os.ReadFile(seed)
	if err != nil {
		t.Fatal(err)
	}
	var index, got node.SeedContents
	for tr := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == node.SeedIndex {
			if err := json.NewDecoder(tr).Decode(&index); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got.Files++
		got.Bytes += h.Size
		at := filepath.Join(to, h.Name)
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.Mkdir(at, 0o700)
		case tar.TypeSymlink:
			err = os.Symlink(h.Linkname, at)
		default:
			var data []byte
			if data, err = io.ReadAll(tr); err == nil {
				err = os.WriteFile(at, data, 0o600)
			}
		}
		if err == nil && h.Typeflag != tar.TypeSymlink {
			err = os.Chmod(at, h.FileInfo().Mode())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if index.Files != got.Files || index.Bytes != got.Bytes {
		t.Errorf("the index says %+v, there are %+v", index, got)
	}
	return index
}

// TestSeedIsAnImport opens a seed as containerd does and looks at everything that
// an import leaves.
func TestSeedIsAnImport(t *testing.T) {
	// The modes of what containerd keeps must not be those of whoever builds.
	defer syscall.Umask(syscall.Umask(0o077))
	archives, refs := twoArchives(t)
	out, root := filepath.Join(t.TempDir(), "seed.tar"), t.TempDir()
	if err := WriteSeed(t.Context(), out, archives...); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(out), ".root-*")); err != nil || len(left) > 0 {
		t.Errorf("left beside it: %q, %v", left, err)
	}
	if index := extract(t, out, root); !slices.Equal(index.Images, refs) {
		t.Errorf("images %q", index.Images)
	}
	snaps := filepath.Join(root, "io.containerd.snapshotter.v1.overlayfs")
	for name, mode := range map[string]os.FileMode{
		root + "/io.containerd.content.v1.content/blobs/sha256": 0o755,
		root + "/io.containerd.metadata.v1.bolt":                0o711,
		root + "/io.containerd.metadata.v1.bolt/meta.db":        0o644,
		snaps + "/metadata.db":                                  0o600,
		snaps + "/snapshots/2":                                  0o700,
		snaps + "/snapshots/2/fs":                               0o755,
		snaps + "/snapshots/2/fs/tmp":                           0o1777,
		snaps + "/snapshots/2/fs/usr/bin/sh":                    0o755,
		snaps + "/snapshots/2/work":                             0o711,
	} {
		st, err := os.Stat(name)
		if err != nil {
			t.Error(err)
		} else if got := st.Mode().Perm() | st.Mode()&os.ModeSticky>>11; got != mode {
			t.Errorf("%s has mode %o, want %o", name, got, mode)
		}
	}

	blobs, err := local.NewStore(filepath.Join(root, "io.containerd.content.v1.content"))
	if err != nil {
		t.Fatal(err)
	}
	sn, err := overlay.NewSnapshotter(snaps)
	if err != nil {
		t.Fatal(err)
	}
	defer sn.Close()
	bdb, err := bolt.Open(filepath.Join(root, "io.containerd.metadata.v1.bolt", "meta.db"), 0o644, nil)
	if err != nil {
		t.Fatal(err)
	}
	db := metadata.NewDB(bdb, blobs, map[string]snapshots.Snapshotter{"overlayfs": sn})
	defer db.Close()
	if err := db.Init(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx := ns.WithNamespace(t.Context(), "k8s.io")
	known := map[digest.Digest]bool{}
	look := func(archives []string) {
		t.Helper()
		images, err := metadata.NewImageStore(db).List(ctx)
		if err != nil || len(images) != len(refs) {
			t.Fatalf("images %v, %v", images, err)
		}
		labels := func(d digest.Digest) map[string]string {
			t.Helper()
			known[d] = true
			info, err := db.ContentStore().Info(ctx, d)
			if err != nil {
				t.Fatal(err)
			}
			return info.Labels
		}
		for i, image := range images {
			_, index := contents(t, archives[i])
			if image.Name != refs[i] || image.Target.Digest != index.Manifests[0].Digest {
				t.Errorf("image %s of %s, the archive has %s of %s", image.Name, image.Target.Digest, refs[i], index.Manifests[0].Digest)
			}
			if want := map[string]string{"io.cri-containerd.image": "managed", "io.cri-containerd.pinned": "pinned"}; !reflect.DeepEqual(image.Labels, want) {
				t.Errorf("%s has labels %v", image.Name, image.Labels)
			}
			data, err := content.ReadBlob(ctx, db.ContentStore(), image.Target)
			if err != nil {
				t.Fatal(err)
			}
			var m ocispec.Manifest
			if err := json.Unmarshal(data, &m); err != nil {
				t.Fatal(err)
			}
			layer := m.Layers[0].Digest // not compressed, so it is its own diff
			chain := identity.ChainID([]digest.Digest{layer}).String()
			for d, want := range map[digest.Digest]map[string]string{
				image.Target.Digest: {"containerd.io/gc.ref.content.config": m.Config.Digest.String(), "containerd.io/gc.ref.content.l.0": layer.String()},
				m.Config.Digest:     {"containerd.io/gc.ref.snapshot.overlayfs": chain},
				layer:               {"containerd.io/uncompressed": layer.String()},
			} {
				if got := labels(d); !reflect.DeepEqual(got, want) {
					t.Errorf("%s: content %s has labels %v, want %v", image.Name, d, got, want)
				}
			}
			info, err := db.Snapshotter("overlayfs").Stat(ctx, chain)
			if err != nil || info.Kind != snapshots.KindCommitted || info.Parent != "" {
				t.Errorf("%s: snapshot %+v, %v", image.Name, info, err)
			}
			usage, err := db.Snapshotter("overlayfs").Usage(ctx, chain)
			if err != nil || usage.Size < m.Layers[0].Size/2 {
				t.Errorf("%s: usage %+v, %v", image.Name, usage, err)
			}
		}
	}
	look(archives)
	err = db.ContentStore().Walk(ctx, func(info content.Info) error {
		data, err := content.ReadBlob(ctx, db.ContentStore(), ocispec.Descriptor{Digest: info.Digest, Size: info.Size})
		if err != nil || digest.FromBytes(data) != info.Digest || !known[info.Digest] {
			t.Errorf("content %s: %d bytes, of an image: %v, %v", info.Digest, len(data), known[info.Digest], err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	leases, err := metadata.NewLeaseManager(db).List(ctx)
	if err != nil || len(leases) > 0 {
		t.Errorf("leases %v, %v", leases, err)
	}
	// Neither what nothing refers to nor what the databases do not know.
	onDisk := func() []string {
		t.Helper()
		var names []string
		for _, pattern := range []string{"io.containerd.content.v1.content/*/*/*", "io.containerd.content.v1.content/ingest/*", "io.containerd.snapshotter.v1.overlayfs/snapshots/*"} {
			found, err := filepath.Glob(filepath.Join(root, pattern))
			if err != nil {
				t.Fatal(err)
			}
			names = append(names, found...)
		}
		return names
	}
	before := onDisk()
	if len(before) != len(known)+len(refs) {
		t.Errorf("%d contents are known and %d snapshots, on disk are %q", len(known), len(refs), before)
	}
	if _, err := db.GarbageCollect(ctx); err != nil {
		t.Fatal(err)
	}
	if after := onDisk(); !slices.Equal(after, before) {
		t.Errorf("before the garbage collection %q, after it %q", before, after)
	}
	look(archives)
}

// contents returns the layers of an archive, and its index.
func contents(t *testing.T, archive string) (map[string][]byte, ocispec.Index) {
	t.Helper()
	data, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for tr := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
	var index ocispec.Index
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	return files, index
}

// TestSeedableLayers is about what the agent could not make on the node.
func TestSeedableLayers(t *testing.T) {
	dir := tar.Header{Name: "a/", Typeflag: tar.TypeDir, Mode: 0o755}
	reg := tar.Header{Name: "a/b", Typeflag: tar.TypeReg, Mode: 0o755}
	layer := func(entries ...tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range entries {
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	good := []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o555}, {Name: "./a/", Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 7}, reg,
		{Name: "a/c", Typeflag: tar.TypeLink, Linkname: "a/b"}, {Name: "a/d", Typeflag: tar.TypeSymlink, Linkname: "/e"},
	}
	if mode, err := checkLayer(layer(good...)); err != nil || mode != 0o555 {
		t.Errorf("mode %o, %v", mode, err)
	}
	for name, bad := range map[string][]tar.Header{
		"is of type":                  {{Name: "null", Typeflag: tar.TypeChar}},
		"is set-user-id":              {{Name: "su", Typeflag: tar.TypeReg, Mode: 0o4755}},
		"is a whiteout":               {{Name: ".wh.a", Typeflag: tar.TypeReg}},
		"has extended attributes":     {{Name: "ping", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x"}}},
		"is the root directory and":   {{Name: "./", Typeflag: tar.TypeDir, Uid: 1}},
		"is there twice":              {dir, reg, reg},
		"or without its directory":    {reg},
		"../a is there twice, or":     {{Name: "../a", Typeflag: tar.TypeReg}},
		"a/c is a link to a/d, which": {dir, {Name: "a/c", Typeflag: tar.TypeLink, Linkname: "a/d"}},
	} {
		if _, err := checkLayer(layer(bad...)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("want %q, got %v", name, err)
		}
	}
	if _, err := checkLayer([]byte(strings.Repeat("not a tar", 100))); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("no tar: %v", err)
	}
}

// TestSeedStep is about the cache: a seed is made again only for other images.
func TestSeedStep(t *testing.T) {
	b := newBuilder(t)
	b.Source = ".."
	archives, _ := twoArchives(t)
	i := 0
	for ref, image := range containerImages {
		if err := os.MkdirAll(b.ociDir(), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(archives[i%len(archives)], filepath.Join(b.ociDir(), image.file)); err != nil {
			t.Fatal(err)
		}
		b.setKey(containerStep(ref), "1")
		i++
	}
	made := func() int64 {
		t.Helper()
		if err := b.seed(t.Context()); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(b.seedFile())
		if err != nil {
			t.Fatal(err)
		}
		return st.ModTime().UnixNano()
	}
	first := made()
	if made() != first {
		t.Error("made again of the same images")
	}
	b.setKey(containerStep(Pause), "2")
	if made() == first {
		t.Error("another image, the same seed")
	}
}

// TestContainerdVersions: a seed is written by the containerd whose daemon opens it.
func TestContainerdVersions(t *testing.T) {
	const module = "github.com/containerd/containerd/v2"
	var found []string
	for _, dir := range []string{"..", "components"} {
		v, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(v)) {
			if f := strings.Fields(line); len(f) >= 2 && f[0] == module {
				found = append(found, f[1])
			}
		}
	}
	if len(found) != 2 || found[0] != found[1] {
		t.Errorf("versions of containerd here and in components/go.mod: %q", found)
	}
}
