package unit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// machine is a systemd of a few lines: units that start, fail and run with the
// files that were there when they started.
type machine struct {
	root string
	seed string // file that containerd's root is filled from; may be empty

	mu    sync.Mutex // guards the rest
	units map[string]*State
	fail  map[string]string // unit -> result with which its jobs end
	log   []string          // jobs and reloads
}

func newMachine(t *testing.T) *machine {
	return &machine{root: t.TempDir(), units: map[string]*State{}, fail: map[string]string{}}
}

func (m *machine) unit(name string) *State {
	if m.units[name] == nil {
		m.units[name] = &State{Load: "not-found", Active: "inactive", Sub: "dead"}
	}
	return m.units[name]
}

func (m *machine) Unit(_ context.Context, name string) (State, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := *m.unit(name)
	if s.Load == "loaded" {
		now, _ := os.ReadFile(filepath.Join(m.root, systemDir, name))
		s.NeedReload = m.read(name)+string(now) != s.LastLog // LastLog keeps what was loaded
	}
	s.LastLog = ""
	return s, nil
}

func (m *machine) read(name string) string {
	b, _ := os.ReadFile(filepath.Join(m.root, systemDir, name+".d", "10-tkenode.conf"))
	return string(b)
}

func (m *machine) load(name string) {
	now, err := os.ReadFile(filepath.Join(m.root, systemDir, name))
	if err == nil {
		s := m.unit(name)
		s.Load, s.LastLog = "loaded", m.read(name)+string(now)
	}
}

func (m *machine) Start(ctx context.Context, name string) error { return m.job(name, "start ") }

func (m *machine) Restart(ctx context.Context, name string) error { return m.job(name, "restart ") }

func (m *machine) job(name, verb string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log = append(m.log, verb+name)
	s := m.unit(name)
	if s.Load == "not-found" {
		m.load(name)
	}
	if s.Load != "loaded" {
		return errors.New("no such unit")
	}
	if result := m.fail[name]; result != "" {
		s.Active, s.Sub, s.Result, s.ExitStatus = "failed", "failed", result, 1
		return fmt.Errorf("systemd's job ended with %q", "failed")
	}
	_, digest, _ := strings.Cut(strings.TrimSpace(s.LastLog), digestVariable+"=")
	s.Files, _, _ = strings.Cut(digest, "\n")
	s.Active, s.Sub, s.Result = "active", "running", "success"
	s.Started = s.Started.Add(1) // another process
	return nil
}

func (m *machine) Reload(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log = append(m.log, "reload")
	for name := range m.units {
		m.load(name)
	}
	return nil
}

func (m *machine) LastLog(context.Context, string) string { return "address already in use" }

func (m *machine) Watch(ctx context.Context, _ []string, changed func()) error {
	changed()
	<-ctx.Done()
	return ctx.Err()
}

func (m *machine) take() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := strings.Join(m.log, ", ")
	m.log = nil
	return s
}

func files(config string) []node.File {
	return []node.File{
		{Path: "/etc/containerd/config.toml", Mode: 0o644, Data: []byte(config), Units: []string{node.ContainerdUnit}},
		{Path: "/etc/systemd/system/containerd.service", Mode: 0o644, Data: []byte("[Service]\n"), Units: []string{node.ContainerdUnit}},
		{Path: "/etc/kubernetes/kubelet.yaml", Mode: 0o600, Data: []byte("kind: KubeletConfiguration\n"), Units: []string{node.KubeletUnit}},
		{Path: "/etc/systemd/system/kubelet.service", Mode: 0o644, Data: []byte("[Service]\n"), Units: []string{node.KubeletUnit}},
		{Path: "/etc/containerd/certs.d/docker.io/hosts.toml", Mode: 0o644, Data: []byte("server = 'of " + strings.TrimSpace(config) + "'\n")},
	}
}

// on places a unit on the machine; its daemon always answers.
func on(m *machine, u *Unit) *Unit {
	u.root, u.probe = m.root, func(context.Context) error { return nil }
	if u.seed != nil {
		u.seed.root = m.root + u.seed.root
	}
	return u
}

func containerdOn(m *machine, config string) *Unit {
	return on(m, Containerd(files(config), m, &Runtime{}, m.seed))
}

func converge(t *testing.T, u *Unit) {
	t.Helper()
	p, err := u.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := u.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if left, err := u.Plan(t.Context()); err != nil || !left.Empty() {
		t.Fatalf("left after apply: %v%v", left, err)
	}
}

func TestLifeOfAUnit(t *testing.T) {
	m := newMachine(t)
	converge(t, containerdOn(m, "version = 3\n"))
	if got := m.take(); got != "start containerd.service" {
		t.Errorf("first boot: %s", got)
	}
	b, err := os.ReadFile(filepath.Join(m.root, "/etc/containerd/config.toml"))
	if err != nil || string(b) != "version = 3\n" {
		t.Errorf("configuration: %q, %v", b, err)
	}
	if _, err := os.Stat(filepath.Join(m.root, "/etc/kubernetes/kubelet.yaml")); !os.IsNotExist(err) {
		t.Errorf("containerd's module wrote kubelet's file: %v", err)
	}
	converge(t, containerdOn(m, "version = 3\n")) // the agent was restarted
	if got := m.take(); got != "" {
		t.Errorf("nothing has changed: %s", got)
	}
	converge(t, containerdOn(m, "version = 3\nroot = '/data'\n"))
	if got := m.take(); got != "reload, restart containerd.service" {
		t.Errorf("new configuration: %s", got)
	}
	if err := os.WriteFile(filepath.Join(m.root, "/etc/containerd/config.toml"), []byte("edited"), 0o644); err != nil {
		t.Fatal(err)
	}
	converge(t, containerdOn(m, "version = 3\nroot = '/data'\n"))
	if got := m.take(); got != "" {
		t.Errorf("an edit that nothing has read: %s", got)
	}
	mirrors := "/etc/containerd/certs.d/docker.io/hosts.toml"
	if err := os.Remove(filepath.Join(m.root, mirrors)); err != nil {
		t.Fatal(err)
	}
	converge(t, containerdOn(m, "version = 3\nroot = '/data'\n"))
	if _, err := os.Stat(filepath.Join(m.root, mirrors)); err != nil || m.take() != "" {
		t.Errorf("a file that is read at each pull: %v", err)
	}
	entries, err := os.ReadDir(filepath.Join(m.root, "/etc/containerd"))
	if err != nil || len(entries) != 2 {
		t.Errorf("left beside the configuration: %v, %v", entries, err)
	}
}

// TestEditThatWasRead: a daemon that somebody has restarted after an edit runs with
// it, whatever its environment says.
func TestEditThatWasRead(t *testing.T) {
	m := newMachine(t)
	converge(t, containerdOn(m, "version = 3\n"))
	m.take()
	s := m.unit(node.ContainerdUnit)
	s.Started = time.Now().Add(-time.Hour)
	edit := func(path string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(m.root, path), []byte("edited"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	const config = "/etc/containerd/config.toml"
	edit(config)
	converge(t, containerdOn(m, "version = 3\n"))
	if got := m.take(); got != "" {
		t.Errorf("an edit after the start: %s", got)
	}
	edit("/etc/containerd/certs.d/docker.io/hosts.toml")
	s.Started = time.Now().Add(time.Minute)
	converge(t, containerdOn(m, "version = 3\n"))
	if got := m.take(); got != "" {
		t.Errorf("a file that is read at each pull: %s", got)
	}
	edit(config)
	p, err := containerdOn(m, "version = 3\n").Plan(t.Context())
	if want := "restart containerd.service: it was started after " + config + " had been changed\n"; err != nil || !strings.HasSuffix(p.String(), want) {
		t.Errorf("%v%v", p, err)
	}
	converge(t, containerdOn(m, "version = 3\n"))
	if got := m.take(); got != "restart containerd.service" {
		t.Errorf("an edit before the start: %s", got)
	}
}

func TestEnvironment(t *testing.T) {
	if _, err := environment(1<<30, digestVariable); node.ClassOf(err) != node.ClassWaiting {
		t.Errorf("of a process that has ended: %v", err)
	}
	if v, err := environment(uint32(os.Getpid()), "PATH"); err != nil || v == "" {
		t.Errorf("of this one: %q, %v", v, err)
	}
}

// TestKilledInAWrite is law 10 inside of a step: what a cut-off write leaves does
// not add up, and is in nobody's way.
func TestKilledInAWrite(t *testing.T) {
	m := newMachine(t)
	dir := filepath.Join(m.root, "/etc/containerd")
	left := filepath.Join(dir, ".config.toml.new")
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(left, []byte("versi"), 0o400)); err != nil {
		t.Fatal(err)
	}
	converge(t, containerdOn(m, "version = 3\n"))
	if _, err := os.Lstat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}

// TestKilledBetweenAnyTwoSteps is law 10.
func TestKilledBetweenAnyTwoSteps(t *testing.T) {
	for n := range 10 {
		m := newMachine(t)
		converge(t, containerdOn(m, "version = 3\n"))
		m.take()
		u := containerdOn(m, "version = 4\n")
		p, err := u.Plan(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if n > len(p.Changes) {
			return
		}
		p.Changes = p.Changes[:n]
		if err := u.Apply(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		converge(t, containerdOn(m, "version = 4\n"))
		if got := strings.Count(m.take(), "restart"); got != 1 {
			t.Errorf("killed after %d of its steps: %d restarts", n, got)
		}
	}
	t.Error("the plan has more steps than were tried")
}

func TestFailedStart(t *testing.T) {
	m := newMachine(t)
	m.fail[node.ContainerdUnit] = "exit-code"
	u := containerdOn(m, "version = 3\n")
	p, err := u.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = u.Apply(t.Context(), p)
	const want = `start containerd.service: systemd's job ended with "failed": exit-code, status 1, last said: address already in use`
	if err == nil || err.Error() != want || node.ClassOf(err) != node.ClassTransient {
		t.Errorf("got %v\nwant %s", err, want)
	}
	p, err = u.Plan(t.Context())
	if err != nil || p.String() != "start containerd.service, which has failed (exit-code, status 1, last said: address already in use)\n" {
		t.Errorf("%v%v", p, err)
	}
	delete(m.fail, node.ContainerdUnit)
	converge(t, u)
}

func TestKubeletFollowsContainerd(t *testing.T) {
	m := newMachine(t)
	k := on(m, Kubelet(files(""), m))
	p, err := k.Plan(t.Context())
	if err != nil || strings.Contains(p.String(), "start") {
		t.Fatalf("%v%v", p, err)
	}
	if err := k.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if p, err = k.Plan(t.Context()); node.ClassOf(err) != node.ClassWaiting || !p.Empty() {
		t.Fatalf("%v%v", p, err)
	}
	converge(t, containerdOn(m, ""))
	converge(t, k)
	if got := m.take(); got != "start containerd.service, start kubelet.service" {
		t.Error(got)
	}
	st, err := os.Stat(filepath.Join(m.root, "/etc/kubernetes/kubelet.yaml"))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

func TestDigestSeesEverything(t *testing.T) {
	base := files("a")
	seen := []string{digest(base)}
	slices.Reverse(base)
	if digest(base) != seen[0] {
		t.Error("the digest depends on the order")
	}
	for _, change := range []func(*node.File){
		func(f *node.File) { f.Data = []byte("b") },
		func(f *node.File) { f.Path += "x" },
		func(f *node.File) { f.Mode = 0o640 },
	} {
		changed := slices.Clone(base)
		change(&changed[1])
		if d := digest(changed); slices.Contains(seen, d) {
			t.Errorf("digest %s twice", d)
		} else {
			seen = append(seen, d)
		}
	}
}
