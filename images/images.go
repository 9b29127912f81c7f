// Package images builds what a CVM boots and what its pods run: the pinned
// components (kubelet, containerd, the control plane), the container images, and
// the node image, a bootable disk with all of them in it.
//
// Everything is made on this machine, from Go modules that components/go.sum
// checks and from Debian packages of the host's own apt sources; no root is
// needed. Every artifact is kept in the cache under a key of all that went into
// it, so that a second build does nothing and a changed agent costs seconds.
//
// It does not run anything it has built, and knows neither the lab nor the agent.
package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sync/errgroup"
)

// Options say what to build from, and where to.
type Options struct {
	Source string   // the repository
	Cache  string   // as CacheDir says
	Debs   []string // our own packages, installed into the node image
	// Package makes Debs, while no other build uses the cache; nil: they are there.
	Package  func(ctx context.Context) error
	Progress Progress
}

// Artifacts are the results of Build.
type Artifacts struct {
	Bin  string // directory of the components, each by its own name
	OCI  string // directory of the container images, as OCI archives
	Disk string // the node image, qcow2; its file never changes once it is there
}

// Progress is told how a build goes. A step may begin without ending only if
// the process dies. Steps run beside each other, so calls come from many goroutines.
type Progress interface {
	Begin(step string)
	// Update says how far the step is, 0 to 1 or negative where nobody knows, and
	// what is being done.
	Update(step string, fraction float64, note string)
	// End ends the step; a step found in the cache begins and ends at once.
	End(step string, err error)
}

// CacheDir is where artifacts are kept: $TKENODE_CACHE, or ~/.cache/tkenode.
func CacheDir() (string, error) {
	if dir := os.Getenv("TKENODE_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find cache directory: %w", err)
	}
	return filepath.Join(dir, "tkenode"), nil
}

// Build makes what is not in the cache yet. Cut off at any point it leaves
// nothing behind that a later build takes for finished.
func Build(ctx context.Context, o Options) (*Artifacts, error) {
	b := &builder{Options: o, keys: map[string]string{}}
	for _, dir := range []*string{&b.Source, &b.Cache} { // commands run in directories of their own
		var err error
		if *dir, err = filepath.Abs(*dir); err != nil {
			return nil, err
		}
	}
	unlock, err := b.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := b.check(ctx); err != nil {
		return nil, err
	}
	if o.Package != nil {
		if err := o.Package(ctx); err != nil {
			return nil, err
		}
	}
	// Debian comes over the network and from one thread while compilers have the
	// processors. An error of either ends both.
	var base string
	both, bctx := errgroup.WithContext(ctx)
	both.Go(func() error { return b.components(bctx) })
	both.Go(func() (err error) {
		base, err = b.base(bctx)
		return err
	})
	if err := both.Wait(); err != nil {
		return nil, err
	}
	if err := b.containerImages(ctx, base); err != nil {
		return nil, err
	}
	if err := b.seed(ctx); err != nil {
		return nil, err
	}
	disk, err := b.disk(ctx, base)
	if err != nil {
		return nil, err
	}
	return &Artifacts{Bin: b.binDir(), OCI: b.ociDir(), Disk: disk}, nil
}

// builder is one build.
type builder struct {
	Options
	mu   sync.Mutex        // guards keys
	keys map[string]string // of what was built, by the name of its step
}

func (b *builder) key(step string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.keys[step]
}

func (b *builder) setKey(step, key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.keys[step] = key
}

func (b *builder) binDir() string { return filepath.Join(b.Cache, "components", "bin") }
func (b *builder) ociDir() string { return filepath.Join(b.Cache, "images", "oci") }

// step runs f as one step of the build and keeps the key of its result, which is
// in file: f is only called where file was not made with this very key. f writes
// to the path it is given.
func (b *builder) step(name, file, key string, f func(tmp string) error) (err error) {
	b.Progress.Begin(name)
	defer func() { b.Progress.End(name, err) }()
	b.setKey(name, key)
	if stamped(file, key) {
		return nil
	}
	tmp, err := os.MkdirTemp(filepath.Join(b.Cache, "images"), ".new-")
	if err != nil {
		return fmt.Errorf("make temporary directory: %w", err)
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, filepath.Base(file))
	if err := f(out); err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	return commit(out, file, key)
}
