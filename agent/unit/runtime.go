package unit

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	containerdSocket = "/run/containerd/containerd.sock"
	imagesAgain      = time.Minute // containerd does not tell that an image was removed
)

// Runtime is a connection to containerd, made when it is first used.
type Runtime struct {
	client *containerd.Client
	conn   grpc.ClientConnInterface // the client's own, on which the CRI is served, too
}

// NewRuntime returns the connection to the node's containerd.
func NewRuntime() (*Runtime, error) { return dial(containerdSocket) }

func dial(socket string) (*Runtime, error) {
	c, err := containerd.New(socket, containerd.WithTimeout(probeTimeout))
	if err != nil {
		return nil, fmt.Errorf("connect to containerd: %w", err)
	}
	conn, ok := c.Conn().(grpc.ClientConnInterface)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("connect to containerd: its client has a %T for a connection", c.Conn())
	}
	return &Runtime{c, conn}, nil
}

// Close ends the connection.
func (r *Runtime) Close() error { return r.client.Close() }

// probe asks the CRI plug-in for its version. Both messages are passed as empty
// ones: the request is, and of the answer only its coming matters.
func (r *Runtime) probe(ctx context.Context) error {
	if err := r.conn.Invoke(ctx, "/runtime.v1.RuntimeService/Version", &emptypb.Empty{}, &emptypb.Empty{}); err != nil {
		return fmt.Errorf("ask containerd's CRI for its version: %w", err)
	}
	return nil
}

// Sandboxes returns the ids of every pod sandbox and container that containerd
// has, with the CRI plug-in answering. A sandbox is in the store before its network
// is made, and until after that is taken away.
// Source: containerd internal/cri/server/sandbox_run.go, sandbox_remove.go
func (r *Runtime) Sandboxes(ctx context.Context) (map[string]bool, error) {
	if err := r.probe(ctx); err != nil {
		return nil, err
	}
	ctx = namespaces.WithNamespace(ctx, node.CRINamespace)
	sandboxes, err := r.client.SandboxStore().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containerd's sandboxes: %w", err)
	}
	containers, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list containerd's containers: %w", err)
	}
	known := map[string]bool{}
	for _, s := range sandboxes {
		known[s.ID] = true
	}
	for _, c := range containers {
		known[c.ID] = true
	}
	return known, nil
}

// Images keeps the images of the node image's OCI archives in containerd. It
// satisfies reconcile.Module.
type Images struct {
	dir string
	bus Bus
	rt  *Runtime

	mu sync.Mutex // held by Apply
}

// NewImages returns the module for the archives (*.tar) in dir.
func NewImages(dir string, bus Bus, rt *Runtime) *Images {
	return &Images{dir: dir, bus: bus, rt: rt}
}

// Name returns "unit/images".
func (m *Images) Name() string { return "unit/images" }

// Condition returns the condition that the images serve.
func (m *Images) Condition() node.ConditionType { return node.RuntimeReady }

// Needs returns what has to be so before the images are looked at.
func (m *Images) Needs() []node.ConditionType { return []node.ConditionType{node.DisksReady} }

// Watch wakes when containerd comes up.
func (m *Images) Watch(ctx context.Context, wake func()) error {
	return m.bus.Watch(ctx, []string{node.ContainerdUnit}, wake)
}

// Plan lists the archives to be imported.
func (m *Images) Plan(ctx context.Context) (node.Plan, error) {
	var p node.Plan
	s, err := m.bus.Unit(ctx, node.ContainerdUnit)
	if err != nil {
		return p, err
	}
	if !s.running() {
		return p, node.Waiting("Starting", "the baked images wait for %s, which is %s", node.ContainerdUnit, s.Active)
	}
	baked, err := archives(m.dir)
	if err != nil {
		return p, err
	}
	have, err := m.rt.images(ctx, baked)
	if err != nil {
		return p, err
	}
	for _, path := range missing(baked, have) {
		p.Add(func(ctx context.Context) error { return m.rt.load(ctx, path) }, "%s", importText(path, baked))
	}
	p.Again = imagesAgain
	return p, nil
}

// Apply carries p out.
func (m *Images) Apply(ctx context.Context, p node.Plan) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return p.Apply(ctx)
}

// images returns which of the baked images containerd has.
func (r *Runtime) images(ctx context.Context, baked []archive) (map[string]image, error) {
	ctx = namespaces.WithNamespace(ctx, node.CRINamespace)
	have := map[string]image{}
	for _, a := range baked {
		i, err := r.client.GetImage(ctx, a.Name)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("ask containerd for image %s: %w", a.Name, err)
		}
		unpacked, err := i.IsUnpacked(ctx, "")
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("ask containerd for image %s: %w", a.Name, err)
		}
		have[a.Name] = image{
			Digest: i.Target().Digest.String(), Unpacked: unpacked,
			Pinned: i.Labels()["io.cri-containerd.pinned"] == node.ImageLabels["io.cri-containerd.pinned"],
		}
	}
	return have, nil
}

// load imports one archive and unpacks its images.
func (r *Runtime) load(ctx context.Context, path string) error {
	ctx = namespaces.WithNamespace(ctx, node.CRINamespace)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	imported, err := r.client.Import(ctx, f, containerd.WithImageLabels(node.ImageLabels))
	if err != nil {
		return err
	}
	for _, i := range imported {
		if err := containerd.NewImage(r.client, i).Unpack(ctx, ""); err != nil {
			return fmt.Errorf("unpack %s: %w", i.Name, err)
		}
	}
	return nil
}

// archives lists the images in the archives of dir, smallest archive first: no
// pod starts without the sandbox image, and there is none smaller.
func archives(dir string) ([]archive, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "[^.]*.tar")) // sorted
	if err != nil {
		return nil, err
	}
	var all []archive
	for _, path := range paths {
		in, err := readArchive(path)
		if err != nil {
			return nil, fmt.Errorf("read image archive %s: %w", path, err)
		}
		all = append(all, in...)
	}
	slices.SortStableFunc(all, func(a, b archive) int { return cmp.Compare(a.Size, b.Size) })
	return all, nil
}

// readArchive reads the index of an OCI archive.
// Source: https://github.com/opencontainers/image-spec/blob/main/image-layout.md
func readArchive(path string) ([]archive, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	for t := tar.NewReader(f); ; {
		h, err := t.Next()
		if err == io.EOF {
			return nil, errors.New("it has no index.json")
		}
		if err != nil {
			return nil, err
		}
		if filepath.Clean(h.Name) != ocispec.ImageIndexFile {
			continue
		}
		var index ocispec.Index
		if err := json.NewDecoder(io.LimitReader(t, 1<<20)).Decode(&index); err != nil {
			return nil, fmt.Errorf("decode index.json: %w", err)
		}
		var all []archive
		for _, m := range index.Manifests {
			name := m.Annotations[images.AnnotationImageName]
			if name == "" {
				name = m.Annotations[ocispec.AnnotationRefName]
			}
			if name == "" {
				return nil, fmt.Errorf("manifest %s has no name", m.Digest)
			}
			all = append(all, archive{Path: path, Size: st.Size(), Name: name, Digest: m.Digest.String()})
		}
		return all, nil
	}
}
