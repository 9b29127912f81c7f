package images

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// component is a binary that is built from the module in components/.
type component struct {
	pkg    string // the main package; empty: components/<name>/<name>.c
	cgo    bool
	onNode bool // part of the node image; the others run in the lab or in containers
}

var components = map[string]component{
	"containerd":              {pkg: "github.com/containerd/containerd/v2/cmd/containerd", onNode: true},
	"containerd-shim-runc-v2": {pkg: "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2", onNode: true},
	"ctr":                     {pkg: "github.com/containerd/containerd/v2/cmd/ctr", onNode: true},
	"kubelet":                 {pkg: "k8s.io/kubernetes/cmd/kubelet", onNode: true},
	"kube-proxy":              {pkg: "k8s.io/kubernetes/cmd/kube-proxy", onNode: true},
	"coredns":                 {pkg: "github.com/tkenode/tkenode/images/components/coredns", onNode: true},
	// The plugins that are chained after ours; rootfs/opt/cni/bin leads to them.
	"bandwidth": {pkg: "github.com/containernetworking/plugins/plugins/meta/bandwidth", onNode: true},
	"portmap":   {pkg: "github.com/containernetworking/plugins/plugins/meta/portmap", onNode: true},
	// C enters the namespaces before the Go runtime has threads; libseccomp makes
	// the filter that RuntimeDefault asks for.
	"runc": {pkg: "github.com/opencontainers/runc", cgo: true, onNode: true},

	"pause": {},

	"etcd":                    {pkg: "go.etcd.io/etcd/server/v3"},
	"kube-apiserver":          {pkg: "k8s.io/kubernetes/cmd/kube-apiserver"},
	"kube-controller-manager": {pkg: "k8s.io/kubernetes/cmd/kube-controller-manager"},
	"kube-scheduler":          {pkg: "k8s.io/kubernetes/cmd/kube-scheduler"},
	"kubectl":                 {pkg: "k8s.io/kubernetes/cmd/kubectl"},
	"prometheus":              {pkg: "github.com/prometheus/prometheus/cmd/prometheus"},
}

// Build tags; each component ignores those of the others.
const (
	// containerd: snapshotters that no node uses. Prometheus: service discoveries
	// other than files, which carry the client libraries of a dozen clouds; its web
	// page's assets need a tag to be in, so they are out.
	tags    = "no_btrfs,no_devmapper,no_zfs,remove_all_sd"
	cgoTags = "seccomp,netgo,osusergo"
)

// components builds the binaries whose inputs have changed, in two runs of the go
// command, which shares the processors better than one run a binary does.
func (b *builder) components(ctx context.Context) error {
	dir := filepath.Join(b.Source, "images", "components")
	versions, err := versions(ctx, dir)
	if err != nil {
		return err
	}
	tree, err := treeKey(dir)
	if err != nil {
		return err
	}
	ld := ldflags(versions)
	var pure, cgo, c []string
	for _, name := range slices.Sorted(maps.Keys(components)) {
		what := components[name]
		key := keyOf(tree, fmt.Sprint(name, what), tags, cgoTags, ld, runtime.Version(), runtime.GOARCH)
		b.setKey(name, key)
		switch {
		case stamped(filepath.Join(b.binDir(), name), key):
		case what.pkg == "":
			c = append(c, name)
		case what.cgo:
			cgo = append(cgo, name)
		default:
			pure = append(pure, name)
		}
	}
	if err := b.compile(ctx, "components", dir, pure, []string{"CGO_ENABLED=0"},
		"-tags", tags, "-ldflags", ld); err != nil {
		return err
	}
	if err := b.compile(ctx, "components with C", dir, cgo, []string{"CGO_ENABLED=1"},
		"-tags", cgoTags, "-ldflags", ld+" -linkmode external -extldflags -static"); err != nil {
		return err
	}
	for _, name := range c {
		src := filepath.Join(dir, name, name+".c")
		err := b.step(name, filepath.Join(b.binDir(), name), b.key(name), func(tmp string) error {
			cmd := exec.Command("gcc", "-Os", "-Wall", "-Werror", "-static", "-s", "-o", tmp, src)
			cmd.Env = append(os.Environ(), "TMPDIR="+filepath.Dir(tmp))
			return run(ctx, cmd, nil)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// compile builds these components as one step.
func (b *builder) compile(ctx context.Context, step, dir string, names, env []string, flags ...string) (err error) {
	b.Progress.Begin(step)
	defer func() { b.Progress.End(step, err) }()
	if len(names) == 0 {
		return nil
	}
	// Next to the place the binaries go to, so that they can be renamed.
	tmp, err := os.MkdirTemp(filepath.Join(b.Cache, "images"), ".new-")
	if err != nil {
		return fmt.Errorf("make temporary directory: %w", err)
	}
	defer os.RemoveAll(tmp)
	// A stamp of the repository is in no binary of others, and git need not be there.
	// Debug information that the linker drops costs a tenth of the build.
	flags = append(flags, "-trimpath", "-mod=readonly", "-buildvcs=false", "-gcflags=all=-dwarf=false")
	var pkgs []string
	for _, name := range names {
		pkgs = append(pkgs, components[name].pkg)
	}
	command := func(args ...string) *exec.Cmd {
		// In a process namespace of its own, as the compilers are grandchildren: they
		// end with it, and it with us. What they were making is in tmp.
		cmd := asRoot(os.Geteuid(), "go", append(args, pkgs...)...)
		cmd.Dir = dir
		cmd.Env = append(cmd.Env, append(env, "GOFLAGS=", "GOWORK=off", "GOTMPDIR="+tmp, "TMPDIR="+tmp)...)
		return cmd
	}
	b.Progress.Update(step, -1, "modules")
	stale := 0
	list := command(append([]string{"list", "-deps", "-f", "{{if .Stale}}{{.ImportPath}}{{end}}"}, flags...)...)
	err = run(ctx, list, func(line string) {
		if m, ok := strings.CutPrefix(line, "go: downloading "); ok {
			b.Progress.Update(step, -1, "download "+m)
		} else {
			stale++
		}
	})
	if err != nil {
		return fmt.Errorf("list packages: %w", err)
	}
	done := 0
	out := filepath.Join(tmp, "bin")
	build := command(append([]string{"build", "-v", "-o", out + "/"}, flags...)...)
	err = run(ctx, build, func(line string) {
		if strings.ContainsAny(line, " \t") { // a message, not the name of a package
			return
		}
		done = min(done+1, stale)
		b.Progress.Update(step, float64(done)/float64(max(stale, 1)), line)
	})
	if err != nil {
		return fmt.Errorf("build %s: %w", strings.Join(names, ", "), err)
	}
	for _, name := range names {
		if err := commit(filepath.Join(out, outputName(components[name].pkg)), filepath.Join(b.binDir(), name), b.key(name)); err != nil {
			return err
		}
	}
	return nil
}

var majorVersion = regexp.MustCompile(`/v[0-9]+$`)

// outputName is the name the go command gives the binary of a package.
func outputName(pkg string) string { return path.Base(majorVersion.ReplaceAllString(pkg, "")) }

// versions are the versions of the modules in the module at dir, as go.mod has them.
func versions(ctx context.Context, dir string) (map[string]string, error) {
	cmd := exec.CommandContext(ctx, "go", "mod", "edit", "-json")
	cmd.Dir = dir
	var messages strings.Builder // not JSON: a toolchain that is being fetched
	cmd.Stderr = &messages
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("read go.mod: %w: %s", err, messages.String())
	}
	var mod struct {
		Require []struct{ Path, Version string }
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		return nil, fmt.Errorf("read go.mod: %w", err)
	}
	v := map[string]string{}
	for _, m := range mod.Require {
		v[m.Path] = m.Version
	}
	for _, m := range []string{"k8s.io/kubernetes", "github.com/containerd/containerd/v2", "github.com/prometheus/prometheus"} {
		if v[m] == "" {
			return nil, errors.New("read go.mod: no version of " + m)
		}
	}
	return v, nil
}

// ldflags stamps the versions into the binaries, for those that do not have them
// in their source. A variable that a binary does not have is no error.
func ldflags(versions map[string]string) string {
	k8s := versions["k8s.io/kubernetes"]
	number := strings.Split(strings.TrimPrefix(k8s, "v"), ".")
	flags := []string{"-s", "-w"}
	set := func(variable, value string) { flags = append(flags, "-X", variable+"="+value) }
	for _, pkg := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
		set(pkg+".gitVersion", k8s)
		set(pkg+".gitMajor", number[0])
		set(pkg+".gitMinor", number[1])
		set(pkg+".gitTreeState", "clean")
	}
	set("github.com/containerd/containerd/v2/version.Version", versions["github.com/containerd/containerd/v2"])
	// Prometheus's modules are v0.<major*100+minor>: v0.316.0 is release 3.16.0.
	set("github.com/prometheus/common/version.Version", prometheusRelease(versions["github.com/prometheus/prometheus"]))
	return strings.Join(flags, " ")
}

func prometheusRelease(module string) string {
	var n, patch int
	if _, err := fmt.Sscanf(module, "v0.%d.%d", &n, &patch); err != nil {
		return module
	}
	return fmt.Sprintf("%d.%d.%d", n/100, n%100, patch)
}
