package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	unpack "github.com/containerd/containerd/v2/pkg/archive"
	ns "github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/tkenode/tkenode/agent/node"
)

// The seed is what containerd's root holds once the images that the node image
// carries are imported and unpacked. A fresh root is filled from it before
// containerd starts, so that the first boot has nothing to import.
//
// It is made by the code that imports on the node, containerd's own client, with
// containerd's own stores behind it instead of the daemon. So no layout of a
// database is ours, and nothing has to be mounted, run or privileged.

const (
	seedStep    = "seed of containerd's root"
	snapshotter = "overlayfs"
)

func (b *builder) seedFile() string { return filepath.Join(b.Cache, "images", "seed.tar") }

// seed makes the seed of the images that the node image carries.
func (b *builder) seed(ctx context.Context) error {
	versions, err := versions(ctx, filepath.Join(b.Source, "images", "components"))
	if err != nil {
		return err
	}
	inputs := []string{recipe, versions["github.com/containerd/containerd/v2"], fmt.Sprint(node.ImageLabels, node.SeedDirs)}
	var archives []string
	for _, ref := range slices.Sorted(maps.Keys(containerImages)) {
		inputs = append(inputs, ref, b.key(containerStep(ref)))
		archives = append(archives, filepath.Join(b.ociDir(), containerImages[ref].file))
	}
	return b.step(seedStep, b.seedFile(), keyOf(inputs...), func(tmp string) error {
		return WriteSeed(ctx, tmp, archives...)
	})
}

// WriteSeed makes the file out, the seed of the images in these OCI archives. An
// image that a seed cannot carry is an error: see checkLayer.
func WriteSeed(ctx context.Context, out string, archives ...string) error {
	root, err := os.MkdirTemp(filepath.Dir(out), ".root-")
	if err != nil {
		return fmt.Errorf("make seed: %w", err)
	}
	defer os.RemoveAll(root)
	s, err := openStore(root)
	if err != nil {
		return fmt.Errorf("make seed: %w", err)
	}
	names, err := s.fill(ctx, archives)
	if err := errors.Join(err, s.Close()); err != nil {
		return fmt.Errorf("make seed: %w", err)
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := s.write(f, names); err != nil {
		return fmt.Errorf("write seed: %w", err)
	}
	return f.Close()
}

// store is a containerd root without a containerd.
type store struct {
	root      string
	meta      *bolt.DB
	snapshots snapshots.Snapshotter
	db        *metadata.DB
	client    *containerd.Client
	unpacker  *unpacker
}

// openStore opens the stores below root as containerd's plug-ins do.
// Source: containerd plugins/metadata/plugin.go, plugins/content/local/plugin,
// plugins/snapshots/overlay/plugin
func openStore(root string) (*store, error) {
	// It warns of what this machine's file system cannot do, which is no news.
	if err := log.SetLevel("error"); err != nil {
		return nil, err
	}
	contents, snaps, meta := filepath.Join(root, node.SeedDirs[0]), filepath.Join(root, node.SeedDirs[1]), filepath.Join(root, node.SeedDirs[2])
	blobs, err := local.NewStore(contents)
	if err != nil {
		return nil, fmt.Errorf("open content store: %w", err)
	}
	if err := os.MkdirAll(meta, 0o711); err != nil {
		return nil, err
	}
	s := &store{root: root}
	if s.snapshots, err = overlay.NewSnapshotter(snaps); err != nil {
		return nil, fmt.Errorf("open snapshotter: %w", err)
	}
	options := *bolt.DefaultOptions
	options.NoFreelistSync = true
	if s.meta, err = bolt.Open(filepath.Join(meta, "meta.db"), 0o644, &options); err != nil {
		return nil, errors.Join(fmt.Errorf("open metadata: %w", err), s.snapshots.Close())
	}
	s.db = metadata.NewDB(s.meta, blobs, map[string]snapshots.Snapshotter{snapshotter: s.snapshots})
	if err := s.db.Init(context.Background()); err != nil {
		return nil, errors.Join(fmt.Errorf("open metadata: %w", err), s.Close())
	}
	s.unpacker = &unpacker{contents: s.db.ContentStore(), layers: map[string]layer{}}
	s.client, err = containerd.New("", containerd.WithServices(
		containerd.WithContentStore(s.db.ContentStore()),
		containerd.WithImageStore(metadata.NewImageStore(s.db)),
		containerd.WithSnapshotters(s.db.Snapshotters()),
		containerd.WithLeasesService(metadata.NewLeaseManager(s.db)),
		containerd.WithDiffService(s.unpacker),
	))
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close closes the databases.
func (s *store) Close() error { return errors.Join(s.db.Close(), s.snapshots.Close()) }

// fill imports and unpacks the archives, as module unit/images does, and returns
// the names of their images.
func (s *store) fill(ctx context.Context, archives []string) ([]string, error) {
	ctx = ns.WithNamespace(ctx, node.CRINamespace)
	var names []string
	for _, archive := range archives {
		f, err := os.Open(archive)
		if err != nil {
			return nil, err
		}
		imported, err := s.client.Import(ctx, f, containerd.WithImageLabels(node.ImageLabels))
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("import %s: %w", archive, err)
		}
		for _, i := range imported {
			if err := containerd.NewImage(s.client, i).Unpack(ctx, snapshotter); err != nil {
				return nil, fmt.Errorf("unpack %s: %w", i.Name, err)
			}
			names = append(names, i.Name)
		}
	}
	// An import leaves what nothing refers to, as the index of an archive.
	if _, err := s.db.GarbageCollect(ctx); err != nil {
		return nil, fmt.Errorf("collect garbage: %w", err)
	}
	return names, nil
}

// unpacker unpacks layers into the directories that the snapshotter would mount.
// That is the same while there is nothing to mount over: in the first layer of an
// image, which has to be its only one.
type unpacker struct {
	diff.Comparer // none: Unpack does not compare
	contents      content.Store
	layers        map[string]layer // by the directory each was unpacked into
}

type layer struct {
	digest digest.Digest
	mode   int64 // of its root directory
}

func (u *unpacker) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, _ ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	if len(mounts) != 1 || mounts[0].Type != "bind" {
		return ocispec.Descriptor{}, errors.New("it has more than one layer; a seed carries images of one")
	}
	data, err := content.ReadBlob(ctx, u.contents, desc)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	mode, err := checkLayer(data)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	// The owners are in the seed's tar; what is unpacked here is for its sizes, which
	// the snapshotter notes.
	if _, err := unpack.Apply(ctx, mounts[0].Source, bytes.NewReader(data), unpack.WithNoSameOwner()); err != nil {
		return ocispec.Descriptor{}, err
	}
	u.layers[mounts[0].Source] = layer{desc.Digest, mode}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}, nil
}

// checkLayer refuses a layer with what the agent does not or may not make when it
// fills a root: devices, set-id files (systemd's RestrictSUIDSGID), extended
// attributes, and whiteouts, which have nothing to hide in a first layer. It
// returns the mode of the layer's root directory.
func checkLayer(data []byte) (mode int64, err error) {
	mode = 0o755
	seen := map[string]byte{".": tar.TypeDir}
	for t := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := t.Next()
		if err == io.EOF {
			return mode, nil
		}
		if err != nil {
			return 0, fmt.Errorf("read layer: %w", err)
		}
		name := path.Clean(h.Name)
		if name == "." {
			mode = h.Mode
		}
		switch {
		case h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir && h.Typeflag != tar.TypeSymlink && h.Typeflag != tar.TypeLink:
			err = fmt.Errorf("is of type %q", h.Typeflag)
		case h.Mode&0o6000 != 0:
			err = errors.New("is set-user-id or set-group-id")
		case strings.HasPrefix(path.Base(name), ".wh."):
			err = errors.New("is a whiteout")
		case name == "." && (h.Uid != 0 || h.Gid != 0):
			err = errors.New("is the root directory and not root's")
		case !filepath.IsLocal(name) || name != "." && seen[name] != 0 || seen[path.Dir(name)] != tar.TypeDir:
			err = errors.New("is there twice, or without its directory")
		case h.Typeflag == tar.TypeLink && seen[path.Clean(h.Linkname)] != tar.TypeReg:
			err = fmt.Errorf("is a link to %s, which is no file before it", h.Linkname)
		}
		for key := range h.PAXRecords {
			if strings.HasPrefix(key, "SCHILY.xattr.") {
				err = errors.New("has extended attributes")
			}
		}
		if err != nil {
			return 0, fmt.Errorf("%s %w; a seed cannot carry it", name, err)
		}
		seen[name] = h.Typeflag
	}
}

// write writes the tar of a closed store.
func (s *store) write(w io.Writer, names []string) error {
	contents := node.SeedContents{Images: names}
	// The index comes first and knows all that follows, so that is gone through twice.
	if err := s.tar(tar.NewWriter(io.Discard), &contents); err != nil {
		return err
	}
	index, err := json.Marshal(contents)
	if err != nil {
		return err
	}
	t := tar.NewWriter(w)
	if err := t.WriteHeader(&tar.Header{Name: node.SeedIndex, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(index)), ModTime: epoch, Format: tar.FormatPAX}); err != nil {
		return err
	}
	if _, err := t.Write(index); err != nil {
		return err
	}
	return s.tar(t, &node.SeedContents{})
}

// tar writes everything below the root and counts it.
func (s *store) tar(t *tar.Writer, count *node.SeedContents) error {
	add := func(h *tar.Header, data io.Reader) error {
		count.Files++
		count.Bytes += h.Size
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if data == nil {
			return nil
		}
		_, err := io.Copy(t, data)
		return err
	}
	err := filepath.WalkDir(s.root, func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == s.root {
			return err
		}
		rel, err := filepath.Rel(s.root, name)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		h := &tar.Header{Name: rel, Mode: modeIn(rel, d.IsDir()), ModTime: epoch, Format: tar.FormatPAX}
		layer, unpacked := s.unpacker.layers[name]
		switch {
		case unpacked:
			h.Typeflag, h.Name, h.Mode = tar.TypeDir, rel+"/", layer.mode
			if err := add(h, nil); err != nil {
				return err
			}
			blob := filepath.Join(s.root, node.SeedDirs[0], "blobs", "sha256", layer.digest.Encoded())
			if err := copyLayer(blob, rel, add); err != nil {
				return fmt.Errorf("copy layer %s: %w", layer.digest, err)
			}
			return fs.SkipDir
		case d.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, rel+"/"
			return add(h, nil)
		case !d.Type().IsRegular():
			return fmt.Errorf("%s is no file", rel)
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		h.Typeflag, h.Size = tar.TypeReg, info.Size()
		return add(h, f)
	})
	return errors.Join(err, t.Close())
}

// modeIn is the mode that containerd gives to what is at rel below its root, where
// the umask is 0022: that of whoever builds the image does not matter.
func modeIn(rel string, dir bool) int64 {
	in := func(i int) bool { return rel == node.SeedDirs[i] || strings.HasPrefix(rel, node.SeedDirs[i]+"/") }
	switch {
	case in(0) && dir:
		return 0o755
	case in(0):
		return 0o444
	case in(2) && dir:
		return 0o711
	case in(2):
		return 0o644
	case path.Base(rel) == "work":
		return 0o711
	case dir:
		return 0o700
	default:
		return 0o600
	}
}

// copyLayer copies the entries of a layer below dir, with owners and times.
func copyLayer(blob, dir string, add func(*tar.Header, io.Reader) error) error {
	f, err := os.Open(blob)
	if err != nil {
		return err
	}
	defer f.Close()
	for t := tar.NewReader(f); ; {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Clean("/" + h.Name)
		if name == "/" {
			continue
		}
		to := &tar.Header{Name: dir + name, Typeflag: h.Typeflag, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, Format: tar.FormatPAX}
		switch h.Typeflag {
		case tar.TypeReg:
			to.Size = h.Size
		case tar.TypeDir:
			to.Name += "/"
		case tar.TypeSymlink:
			to.Linkname = h.Linkname
		case tar.TypeLink:
			to.Linkname = dir + path.Clean("/"+h.Linkname)
		}
		if err := add(to, t); err != nil {
			return err
		}
	}
}
