package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/kube"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

var since = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// source is a node that waits for its disk.
func source() Source {
	return Source{
		Version: "v0.1.0",
		Conditions: func() []node.Condition {
			return []node.Condition{
				{Type: node.ConfigSealed, Status: node.True, Since: since},
				{Type: node.DisksReady, Status: node.False, Reason: "DiskNotBlank", Message: "disk-1a2b3c4d holds ext4", Since: since},
				{Type: node.NodeReady, Status: node.Unknown, Reason: "NotObservedYet"},
			}
		},
		Instances: func() []reconcile.InstanceStatus {
			return []reconcile.InstanceStatus{
				{Name: "disk/disk-1a2b3c4d", Condition: node.DisksReady, State: reconcile.Failed, Class: "terminal", Since: since},
				{Name: "eni/pool", Condition: node.NetworkReady, State: reconcile.Converged, Since: since},
			}
		},
		Plan: func(context.Context) []reconcile.InstancePlan {
			return []reconcile.InstancePlan{{Name: "disk/disk-1a2b3c4d", Changes: []string{}, Error: "disk-1a2b3c4d holds ext4"}}
		},
		Wake: func(name string) bool { return name != "" },
		Sealed: func() (node.Sealed, bool) {
			cfg := node.Config{Cluster: node.ClusterConfig{ID: "cls-lab00001", BootstrapToken: node.NewSecret("abcdef.0123456789abcdef")}}
			s, err := node.Seal(1, cfg, node.Facts{InstanceID: "ins-lab00001", PrivateIP: netip.MustParseAddr("10.0.0.30")}, since)
			return s, err == nil
		},
		Boot: func() Boot {
			return Boot{Began: since, Steps: []Step{{Name: "kernel", Began: since, Ended: since.Add(time.Second)}}}
		},
		Warnings: func() []node.Condition {
			return []node.Condition{{Type: node.PoolExhausted, Status: node.True, Message: "8 of 8 addresses in use", Since: since}}
		},
		ENI: func() (eni.State, error) {
			return eni.State{Now: since, ENIs: []eni.ENIState{{Slot: eni.Slot{ENI: "eni-pods0001"}, Device: "eth1"}}}, nil
		},
		Volumes: func() Volumes {
			return Volumes{Others: []disk.Other{{DiskID: "disk-csi00001"}}, Limit: kube.Limit{Max: 20, Published: 18}}
		},
		Disks: func() []disk.State { return []disk.State{{DiskID: "disk-abc12345", State: disk.Mounted}} },
		Decide: func(_ context.Context, o disk.Order) error {
			if o.DiskID == "disk-data0000" {
				return fmt.Errorf("format: %w: it is mounted", disk.ErrRefused)
			}
			if o.PID != int32(os.Getpid()) || o.UID != uint32(os.Geteuid()) {
				return fmt.Errorf("asked by %d of %d", o.PID, o.UID)
			}
			return nil
		},
		Explain: func(_ context.Context, q eni.Question) (eni.Explanation, error) {
			if q.Pod == "default/nobody" {
				return eni.Explanation{}, fmt.Errorf("pod %s has no VPC address: %w", q.Pod, eni.ErrNotHere)
			}
			return eni.Explanation{Subject: fmt.Sprint(q)}, nil
		},
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "up 1\n") }),
	}
}

// serve runs a server and returns the path of its socket.
func serve(t *testing.T, s Source) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- New(slog.New(slog.DiscardHandler), s).Run(ctx, path) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left behind: %v", err)
		}
	})
	for range 6000 {
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return path
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("nobody listens")
	return ""
}

func client(t *testing.T, path string) *Client {
	c := NewClient(path)
	t.Cleanup(c.Close)
	return c
}

func TestRoutesAreSorted(t *testing.T) {
	if !slices.IsSortedFunc(Routes, func(a, b Route) int { return strings.Compare(a.Path, b.Path) }) {
		t.Error("Routes are not sorted by path")
	}
	for _, r := range Routes {
		if r.Help == "" || r.serve == nil {
			t.Errorf("%s %s has no help or no handler", r.Method, r.Path)
		}
		if r.Method != http.MethodGet && !r.Root() {
			t.Errorf("%s %s acts and is not for root alone", r.Method, r.Path)
		}
	}
}

func TestClient(t *testing.T) {
	c := client(t, serve(t, source()))
	st, err := c.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if st.Unmet == nil || st.Unmet.Type != node.DisksReady || st.Unmet.Message != "disk-1a2b3c4d holds ext4" {
		t.Errorf("first unmet condition is %+v", st.Unmet)
	}
	if st.Node == nil || st.Node.Name != "10.0.0.30" || st.Node.InstanceID != "ins-lab00001" || st.Node.Generation != 1 {
		t.Errorf("node is %+v", st.Node)
	}
	if len(st.Conditions) != 3 || len(st.Instances) != 2 || st.Instances[0].State != reconcile.Failed {
		t.Errorf("status is %+v", st)
	}
	if p, err := c.Plan(t.Context()); err != nil || p.Empty() || p.Instances[0].Error == "" {
		t.Errorf("plan is %+v, %v", p, err)
	}
	if s, err := c.Config(t.Context()); err != nil || s.Config.Cluster.ID != "cls-lab00001" {
		t.Errorf("config is %+v, %v", s, err)
	}
	if b, err := c.Boot(t.Context()); err != nil || len(b.Steps) != 1 || !b.Began.Equal(since) {
		t.Errorf("boot is %+v, %v", b, err)
	}
	if len(st.Warnings) != 1 || st.Warnings[0].Type != node.PoolExhausted {
		t.Errorf("warnings are %+v", st.Warnings)
	}
	if e, err := c.ENI(t.Context()); err != nil || len(e.ENIs) != 1 || e.ENIs[0].ENI != "eni-pods0001" || e.ENIs[0].Device != "eth1" {
		t.Errorf("ENIs are %+v, %v", e, err)
	}
	if err := c.Wake(t.Context(), "eni/pool"); err != nil {
		t.Error(err)
	}
	if err := c.Wake(t.Context(), ""); err != nil {
		t.Error(err)
	}
	if err := c.Wake(t.Context(), "eni/pol"); err == nil || err.Error() != `there is no instance "eni/pol"` {
		t.Errorf("waking an unknown instance: %v", err)
	}
}

func TestExplain(t *testing.T) {
	c := client(t, serve(t, source()))
	q := eni.Question{Pod: "default/web", To: netip.MustParseAddr("10.0.0.1")}
	if e, err := c.Explain(t.Context(), q); err != nil || e.Subject != fmt.Sprint(q) {
		t.Errorf("got %q, %v; want %v", e.Subject, err, q)
	}
	q = eni.Question{IP: netip.MustParseAddr("10.0.16.5")}
	if e, err := c.Explain(t.Context(), q); err != nil || e.Subject != fmt.Sprint(q) {
		t.Errorf("got %q, %v; want %v", e.Subject, err, q)
	}
	if _, err := c.Explain(t.Context(), eni.Question{Pod: "default/nobody"}); err == nil || !strings.Contains(err.Error(), "default/nobody has no VPC address") {
		t.Errorf("unknown pod: %v", err)
	}
	for query, want := range map[string]int{
		"": http.StatusBadRequest, "pod=a/b&ip=10.0.0.1": http.StatusBadRequest, "ip=here": http.StatusBadRequest,
		"ip=fe80::1": http.StatusBadRequest, "pod=a/b&to=x": http.StatusBadRequest, "pod=default/nobody": http.StatusNotFound,
	} {
		resp, err := c.http.Get("http://tkenode/v1/explain?" + query)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("?%s: %s, want %d", query, resp.Status, want)
		}
	}
}

func TestEveryRouteAnswers(t *testing.T) {
	c := client(t, serve(t, source()))
	for _, r := range Routes {
		url := "http://tkenode" + r.Path
		if r.Path == "/debug/pprof/profile" || r.Path == "/debug/pprof/trace" {
			url += "?seconds=1"
		}
		if r.Path == "/v1/explain" {
			url += "?pod=default/web"
		}
		req, err := http.NewRequestWithContext(t.Context(), r.Method, url, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", r.Method, r.Path, err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || len(body) == 0 {
			t.Errorf("%s %s: %s, %d bytes, %v", r.Method, r.Path, resp.Status, len(body), err)
		}
		if bytes.Contains(body, []byte("0123456789abcdef")) {
			t.Errorf("%s %s tells the bootstrap token", r.Method, r.Path)
		}
	}
	resp, err := c.http.Get("http://tkenode/v1/nothing")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("unknown route: %s", resp.Status)
	}
}

func TestUnsealed(t *testing.T) {
	s := source()
	s.Sealed = func() (node.Sealed, bool) { return node.Sealed{}, false }
	c := client(t, serve(t, s))
	if _, err := c.Config(t.Context()); err == nil || err.Error() != "no configuration is sealed yet" {
		t.Errorf("config: %v", err)
	}
	if st, err := c.Status(t.Context()); err != nil || st.Node != nil {
		t.Errorf("status: %+v, %v", st.Node, err)
	}
}

func TestMay(t *testing.T) {
	me := uint32(os.Geteuid())
	for _, tc := range []struct {
		name        string
		peer        peer
		group       int
		read, write bool
	}{
		{"root", peer{uid: 0}, -1, true, true},
		{"the agent's user", peer{uid: me}, -1, true, true},
		{"primary group", peer{uid: me + 1, groups: []uint32{7}}, 7, true, false},
		{"supplementary group", peer{uid: me + 1, groups: []uint32{1, 7}}, 7, true, false},
		{"stranger", peer{uid: me + 1, groups: []uint32{1}}, 7, false, false},
		{"root's group is nothing", peer{uid: me + 1, groups: []uint32{0}}, -1, false, false},
	} {
		if got := tc.peer.may(read, tc.group); got != tc.read {
			t.Errorf("%s may read: %v", tc.name, got)
		}
		if got := tc.peer.may(write, tc.group); got != tc.write {
			t.Errorf("%s may write: %v", tc.name, got)
		}
	}
}

// TestPeer reads this process's own credentials through a socket.
func TestPeer(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	out, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	p, err := readPeer(in.(*net.UnixConn))
	if err != nil {
		t.Fatal(err)
	}
	if int(p.pid) != os.Getpid() || int(p.uid) != os.Geteuid() || !slices.Contains(p.groups, uint32(os.Getegid())) {
		t.Errorf("peer is %+v, want pid %d uid %d gid %d", p, os.Getpid(), os.Geteuid(), os.Getegid())
	}
}

// TestStaleSocket starts where an agent was killed: its socket is still there.
func TestStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	c := client(t, path)
	if _, err := c.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("stale socket: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- New(slog.New(slog.DiscardHandler), source()).Run(ctx, path) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	for i := 0; ; i++ {
		if _, err = c.Status(t.Context()); err == nil {
			break
		}
		if i == 6000 {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v, %v", info, err)
	}
}

func TestClientErrors(t *testing.T) {
	dir := t.TempDir()
	if _, err := client(t, filepath.Join(dir, "none")).Status(t.Context()); !errors.Is(err, ErrNotRunning) {
		t.Errorf("no socket: %v", err)
	}
	hung := filepath.Join(dir, "hung")
	l, err := net.Listen("unix", hung)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := client(t, hung).Status(ctx); !errors.Is(err, ErrHung) {
		t.Errorf("an agent that does not answer: %v", err)
	}
	endless := filepath.Join(dir, "endless")
	el, err := net.Listen("unix", endless)
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: el, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `{"version":"`)
		for range maxAnswer/1024 + 1024 {
			if _, err := w.Write(bytes.Repeat([]byte("x"), 1024)); err != nil {
				return
			}
		}
	})}}
	srv.Start()
	defer srv.Close()
	if _, err := client(t, endless).Status(t.Context()); err == nil {
		t.Error("an endless answer was read")
	}
}

// TestTooManyConnections has strangers take every place: the next one is turned
// away at once, root is not, and a place that is given back is there again.
func TestTooManyConnections(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g := guard(l, 2, slog.New(slog.DiscardHandler))
	var root atomic.Bool
	g.trusted = func(peer) bool { return root.Load() }
	accepted := make(chan net.Conn)
	go func() {
		for {
			c, err := g.Accept()
			if err != nil {
				return
			}
			accepted <- c
		}
	}()
	dial := func() net.Conn {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial()
	first := <-accepted
	dial()
	<-accepted
	if _, err := dial().Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the third stranger: %v", err)
	}
	root.Store(true)
	dial()
	<-accepted
	root.Store(false)
	first.Close()
	first.Close() // twice gives one place back
	dial()
	<-accepted
	if _, err := dial().Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("one too many again: %v", err)
	}
}

// FuzzWake sends anything where JSON is expected: the answer is 200 or says why
// not, and what is accepted is what encoding/json reads of it.
func FuzzWake(f *testing.F) {
	for _, seed := range []string{`{}`, `{"instance":"eni/pool"}`, `{"instance":1}`, `{"x":1}`, `{}{}`, ``, `null`, `[`, `{"instance":"` + strings.Repeat("a", maxBody) + `"}`} {
		f.Add([]byte(seed))
	}
	s := New(slog.New(slog.DiscardHandler), source())
	f.Fuzz(func(t *testing.T, body []byte) {
		w := httptest.NewRecorder()
		err := s.wake(w, httptest.NewRequest(http.MethodPost, "/v1/wake", bytes.NewReader(body)))
		if err != nil {
			if code := codeOf(err); code < 400 || code >= 500 || err.Error() == "" {
				t.Errorf("%q: %d %v", body, code, err)
			}
			return
		}
		var want Wake
		if json.Unmarshal(body, &want) != nil {
			t.Errorf("%q was accepted", body)
		}
		if want.Instance != "" && want.Instance != "eni/pool" && want.Instance != "disk/disk-1a2b3c4d" {
			t.Errorf("%q woke an instance that there is not", body)
		}
	})
}

// TestDecide: the agent is told who decides, and says why it does not follow.
func TestDecide(t *testing.T) {
	c := client(t, serve(t, source()))
	if err := c.Decide(t.Context(), disk.Order{Act: "format", DiskID: "disk-abc12345"}); err != nil {
		t.Error(err)
	}
	if err := c.Decide(t.Context(), disk.Order{Act: "format", DiskID: "disk-data0000"}); err == nil || !strings.Contains(err.Error(), "it is mounted") {
		t.Errorf("refused: %v", err)
	}
}
