// Package unit keeps containerd and kubelet, and where the node runs them
// kube-proxy and CoreDNS, running as systemd units: the files that they read,
// their start and restart, whether they answer, and the images that containerd
// must hold from the start.
//
// systemd is the supervisor: it restarts what exits, and keeps them running
// while the agent does not. This package never stops a unit, and restarts one
// only because what it reads has changed, or because what it has made in the
// kernel was taken away and it does not notice.
package unit

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	systemDir    = "/etc/systemd/system"
	probeTimeout = 10 * time.Second       // slow is not dead: a starved node answers late
	probeEvery   = 10 * time.Second       // while it answers
	probeSoon    = 250 * time.Millisecond // while it starts
	startGrace   = time.Minute            // how long it may run before it answers
	holdPoll     = 100 * time.Millisecond // while it is not to be started
)

// Unit is one systemd unit with the files that it reads at its start. It
// satisfies reconcile.Module.
type Unit struct {
	want
	cond  node.ConditionType
	needs []node.ConditionType
	probe func(context.Context) error
	bus   Bus
	seed  *seed  // of containerd only
	root  string // prefix of every path: "" but in tests
	// hold reports whether the unit is not to be started yet; nil: it may.
	hold func() bool
	// made reports whether what the daemon makes in the kernel is there; nil: nothing.
	made func() (bool, error)

	mu   sync.Mutex   // held by Apply
	seen atomic.Int64 // when the process was started of which made was last true
}

// Containerd returns the module of containerd.service. It keeps those of files
// that the unit reads, and those that no unit reads at its start: containerd's
// registries, which are read at each pull. A root that containerd has not used yet
// is filled from seedFile, if there is one.
func Containerd(files []node.File, bus Bus, rt *Runtime, seedFile string) *Unit {
	u := &Unit{
		want: wanted(node.ContainerdUnit, files), cond: node.RuntimeReady,
		needs: []node.ConditionType{node.DisksReady}, probe: rt.probe, bus: bus,
		seed: &seed{file: seedFile, root: node.ContainerdRoot},
	}
	for _, f := range files {
		if len(f.Units) == 0 {
			u.files = append(u.files, f)
		}
	}
	return u
}

// Kubelet returns the module of kubelet.service. It does not wait for the baked
// images, which are imported while kubelet starts, only for containerd.
func Kubelet(files []node.File, bus Bus) *Unit {
	u := &Unit{
		want: wanted(node.KubeletUnit, files), cond: node.KubeletReady,
		needs: []node.ConditionType{node.DisksReady, node.NodeJoined}, probe: healthy(kubeletHealth), bus: bus,
	}
	u.after = node.ContainerdUnit
	return u
}

// KubeProxy returns the module of kube-proxy.service. It comes after kubelet, which
// registers the Node that kube-proxy looks for, and not after NodeReady: what makes
// the node Ready may be a pod that needs a Service. hold is asked until it is started.
func KubeProxy(files []node.File, bus Bus, hold func() bool) *Unit {
	return &Unit{
		want: wanted(node.KubeProxyUnit, files), cond: node.ServicesReady,
		needs: []node.ConditionType{node.KubeletReady}, probe: healthy(kubeProxyHealth), bus: bus, hold: hold, made: proxyTable,
	}
}

// CoreDNS returns the module of coredns.service, which answers at addrs for the
// names below domain. Like kube-proxy it comes after kubelet.
func CoreDNS(files []node.File, bus Bus, addrs []netip.Addr, domain string, hold func() bool) *Unit {
	u := &Unit{
		want: wanted(node.CoreDNSUnit, files), cond: node.DNSReady,
		needs: []node.ConditionType{node.KubeletReady}, probe: resolves(addrs, domain), bus: bus, hold: hold,
	}
	u.addrs = addrs
	return u
}

// wanted returns the unit with the files that it reads, and a drop-in that puts
// their digest into the environment of the unit's processes. So the process
// itself tells what it has read at its start, whoever started it, and the agent
// may die between any two steps.
func wanted(unit string, files []node.File) want {
	w := want{unit: unit}
	for _, f := range files {
		if slices.Contains(f.Units, unit) {
			w.files = append(w.files, f)
		}
	}
	w.digest = digest(w.files)
	w.files = append(w.files, node.File{
		Path: filepath.Join(systemDir, unit+".d", "10-tkenode.conf"),
		Mode: 0o644,
		Data: fmt.Appendf(nil, "[Service]\nEnvironment=%s=%s\n", digestVariable, w.digest),
		// Not in the digest, which it holds.
		Units: []string{unit},
	})
	return w
}

// digestVariable is the name of the environment variable.
const digestVariable = "TKENODE_FILES"

func digest(files []node.File) string {
	files = slices.SortedFunc(slices.Values(files), func(a, b node.File) int { return strings.Compare(a.Path, b.Path) })
	h := sha256.New()
	for _, f := range files {
		fmt.Fprintf(h, "%q %v %d\n", f.Path, f.Mode, len(f.Data))
		h.Write(f.Data)
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Name returns "unit/containerd", "unit/kubelet", and so on.
func (u *Unit) Name() string { return "unit/" + strings.TrimSuffix(u.unit, ".service") }

// Condition returns the condition that the unit serves.
func (u *Unit) Condition() node.ConditionType { return u.cond }

// Needs returns what has to be so before the unit is looked at.
func (u *Unit) Needs() []node.ConditionType { return u.needs }

// Watch wakes the unit whenever systemd says that its state has changed.
func (u *Unit) Watch(ctx context.Context, wake func()) error {
	names := []string{u.unit}
	if u.after != "" {
		names = append(names, u.after)
	}
	return u.bus.Watch(ctx, names, wake)
}

// Plan compares files and unit with what is wanted.
func (u *Unit) Plan(ctx context.Context) (node.Plan, error) {
	have, err := u.observe(ctx)
	if err != nil {
		return node.Plan{}, err
	}
	v := decide(u.want, have)
	if u.hold != nil && v.starts() && u.hold() {
		return node.Plan{Again: holdPoll}, node.Waiting("NodeNotRegistered", "kubelet has not registered the Node yet; %s is started once it has, or after a while", u.unit)
	}
	p := node.Plan{Again: v.again}
	for _, s := range v.steps {
		p.Add(func(ctx context.Context) error { return u.do(ctx, s) }, "%s", s.text)
	}
	return p, v.err
}

// Apply carries p out.
func (u *Unit) Apply(ctx context.Context, p node.Plan) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	return p.Apply(ctx)
}

func (u *Unit) observe(ctx context.Context) (observed, error) {
	have := observed{Files: map[string]file{}}
	for _, f := range u.files {
		got, err := readFile(u.root+f.Path, len(f.Data))
		if err != nil {
			return have, err
		}
		have.Files[f.Path] = got
	}
	var err error
	if have.Unit, err = u.bus.Unit(ctx, u.unit); err != nil {
		return have, err
	}
	if u.after != "" {
		dep, err := u.bus.Unit(ctx, u.after)
		if err != nil {
			return have, err
		}
		have.After = dep.Active
	}
	if len(u.addrs) > 0 {
		if have.Addrs, err = loopbackAddrs(); err != nil {
			return have, err
		}
	}
	// While containerd runs, its root may be on a disk that hangs, and is containerd's.
	if u.seed != nil && !have.Unit.running() {
		if have.Root, err = u.seed.observe(); err != nil {
			return have, err
		}
	}
	switch {
	case have.Unit.running():
		ctx, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		if err := u.probe(ctx); err != nil {
			have.Probe = err.Error()
		}
		if have.Lost, err = u.lost(have.Unit.Started); err != nil {
			return have, err
		}
	case have.Unit.Result != "" && have.Unit.Result != "success":
		have.Unit.LastLog = u.bus.LastLog(ctx, u.unit)
	}
	return have, nil
}

// lost reports whether what the process that was started then has made is gone.
func (u *Unit) lost(started time.Time) (bool, error) {
	if u.made == nil {
		return false, nil
	}
	there, err := u.made()
	if there && err == nil {
		u.seen.Store(started.UnixNano())
	}
	return err == nil && !there && u.seen.Load() == started.UnixNano(), err
}

// do carries out one step. Writing what is there already, starting what runs and
// reloading twice are harmless, so each is done as it was planned.
func (u *Unit) do(ctx context.Context, s step) error {
	switch s.verb {
	case write:
		return writeFile(u.root, s.file)
	case reload:
		return u.bus.Reload(ctx)
	case sow:
		return u.sow(ctx)
	case tidy:
		return u.seed.clear()
	case address:
		return addLoopbackAddr(ctx, s.addr)
	case start:
		return u.explain(ctx, u.bus.Start(ctx, u.unit))
	default:
		return u.explain(ctx, u.bus.Restart(ctx, u.unit))
	}
}

// sow seeds containerd's root, unless somebody has started containerd meanwhile.
func (u *Unit) sow(ctx context.Context) error {
	s, err := u.bus.Unit(ctx, u.unit)
	if err != nil || s.Active != "inactive" && s.Active != "failed" {
		return err
	}
	return u.seed.sow(ctx)
}

// explain adds to a failed job what the unit's own state and journal say.
func (u *Unit) explain(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil || node.ClassOf(err) == node.ClassWaiting {
		return err
	}
	s, serr := u.bus.Unit(ctx, u.unit)
	if serr != nil {
		return err
	}
	s.LastLog = u.bus.LastLog(ctx, u.unit)
	return fmt.Errorf("%w: %s", err, s.failure())
}

// readFile reads a regular file, and no more of it than can be of interest.
func readFile(path string, size int) (file, error) {
	st, err := os.Lstat(path)
	switch {
	case os.IsNotExist(err):
		return file{}, nil
	case err != nil:
		return file{}, fmt.Errorf("read %s: %w", path, err)
	case !st.Mode().IsRegular(), st.Size() != int64(size):
		return file{Exists: true, Mode: st.Mode().Perm(), Changed: changed(st)}, nil
	}
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return file{}, fmt.Errorf("read %s: %w", path, err)
	}
	return file{Exists: err == nil, Mode: st.Mode().Perm(), Changed: changed(st), Data: string(b)}, nil
}

// changed returns when a file was last written, replaced or renamed, which nobody
// can set back.
func changed(st fs.FileInfo) time.Time {
	ctim := st.Sys().(*syscall.Stat_t).Ctim
	return time.Unix(ctim.Unix())
}

// writeFile replaces a file as a whole: whoever reads it finds the old or the new
// one. It is not synced: what a power cut makes of it is found by the next plan,
// before which nothing that reads it is started.
func writeFile(root string, f node.File) (err error) {
	path := root + f.Path
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// Always the same name, so that what a crash leaves is overwritten; begun anew,
	// so that it is no link and nobody has it open.
	name := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	tmp, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(name)
		}
	}()
	if _, err := tmp.Write(f.Data); err != nil {
		tmp.Close()
		return err
	}
	if err := firstError(tmp.Chmod(f.Mode&fs.ModePerm), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(name, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
