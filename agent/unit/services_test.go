package unit

import (
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

func TestHealthy(t *testing.T) {
	code := http.StatusOK
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(code)
		w.Write([]byte(`{"healthy": false}` + "\n"))
	}))
	probe := healthy(s.URL + "/livez")
	if err := probe(t.Context()); err != nil {
		t.Error(err)
	}
	code = http.StatusServiceUnavailable
	if err := probe(t.Context()); err == nil || !strings.HasSuffix(err.Error(), `/livez: 503 Service Unavailable: {"healthy": false}`) {
		t.Errorf("unhealthy: %v", err)
	}
	s.Close()
	if err := probe(t.Context()); err == nil {
		t.Error("nobody listens, and no error")
	}
}

func TestLoopbackAddrs(t *testing.T) {
	addrs, err := loopbackAddrs()
	if err != nil || !slices.Contains(addrs, netip.MustParseAddr("127.0.0.1")) {
		t.Errorf("%v, %v", addrs, err)
	}
}

// TestNobodyResolves: the probe asks the address itself, not the machine's resolver,
// which may know the name.
func TestNobodyResolves(t *testing.T) {
	err := resolves([]netip.Addr{netip.MustParseAddr("127.0.0.77")}, "cluster.local")(t.Context())
	if err == nil || !strings.HasPrefix(err.Error(), "ask 127.0.0.77: lookup kubernetes.default.svc.cluster.local.") {
		t.Errorf("nobody listens: %v", err)
	}
}

// TestServices: each keeps its own files, and waits for kubelet alone.
func TestServices(t *testing.T) {
	m := newMachine(t)
	all := []node.File{
		{Path: "/etc/kubernetes/ca.crt", Mode: 0o644, Data: []byte("ca"), Units: []string{node.KubeletUnit, node.KubeProxyUnit, node.CoreDNSUnit}},
		{Path: "/etc/kubernetes/kube-proxy.yaml", Mode: 0o644, Data: []byte("mode: nftables\n"), Units: []string{node.KubeProxyUnit}},
		{Path: "/etc/kubernetes/Corefile", Mode: 0o644, Data: []byte(".:53 {}\n"), Units: []string{node.CoreDNSUnit}},
		{Path: "/etc/systemd/system/kube-proxy.service", Mode: 0o644, Data: []byte("[Service]\n"), Units: []string{node.KubeProxyUnit}},
		{Path: "/etc/systemd/system/coredns.service", Mode: 0o644, Data: []byte("[Service]\n"), Units: []string{node.CoreDNSUnit}},
	}
	// An address that every machine has, since this one's must not be changed.
	dns := CoreDNS(all, m, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, "cluster.local", nil)
	for u, files := range map[*Unit]string{KubeProxy(all, m, nil): "ca.crt kube-proxy.yaml", dns: "ca.crt Corefile"} {
		if n := u.Needs(); len(n) != 1 || n[0] != node.KubeletReady {
			t.Errorf("%s needs %v", u.Name(), n)
		}
		for name := range strings.FieldsSeq(files) {
			if !slices.ContainsFunc(u.files, func(f node.File) bool { return strings.HasSuffix(f.Path, "/"+name) }) {
				t.Errorf("%s does not keep %s", u.Name(), name)
			}
		}
		converge(t, on(m, u))
		if got, want := m.take(), "start "+u.unit; got != want {
			t.Errorf("%s: %s, want %s", u.Name(), got, want)
		}
	}
}

// TestHeld: a unit is not started while it is held, and is not asked about once it runs.
func TestHeld(t *testing.T) {
	m := newMachine(t)
	held := true
	u := on(m, KubeProxy([]node.File{{Path: "/etc/systemd/system/kube-proxy.service", Mode: 0o644, Data: []byte("[Service]\n"), Units: []string{node.KubeProxyUnit}}}, m, func() bool { return held }))
	p, err := u.Plan(t.Context())
	if node.ReasonOf(err, "") != "NodeNotRegistered" || node.ClassOf(err) != node.ClassWaiting || !p.Empty() || p.Again != holdPoll {
		t.Errorf("while it is held: %v%v, again after %s", p, err, p.Again)
	}
	held = false
	converge(t, u)
	if got := m.take(); got != "start kube-proxy.service" {
		t.Errorf("then: %q", got)
	}
	held = true
	if p, err := u.Plan(t.Context()); err != nil || !p.Empty() {
		t.Errorf("while it runs: %v%v", p, err)
	}
}

// TestMadeIsRemoved: kube-proxy is restarted once when its table goes, and not as long
// as it has made none.
func TestMadeIsRemoved(t *testing.T) {
	m := newMachine(t)
	u := on(m, KubeProxy([]node.File{{Path: "/etc/systemd/system/kube-proxy.service", Mode: 0o644, Data: []byte("[Service]\n"), Units: []string{node.KubeProxyUnit}}}, m, nil))
	there := false
	u.made = func() (bool, error) { return there, nil }
	converge(t, u)
	m.take()
	for _, step := range []struct {
		there bool
		did   string
	}{{false, ""}, {true, ""}, {true, ""}, {false, "restart kube-proxy.service"}, {false, ""}, {true, ""}} {
		there = step.there
		converge(t, u)
		if got := m.take(); got != step.did {
			t.Errorf("table %v: %q, want %q", step.there, got, step.did)
		}
	}
}
