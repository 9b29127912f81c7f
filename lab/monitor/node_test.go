//go:build node

package monitor

import (
	"context"
	"io"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/metrics"
	"github.com/tkenode/tkenode/agent/node"
)

// programs is where the pinned Prometheus is built to.
func programs(t *testing.T) string {
	t.Helper()
	cache := os.Getenv("TKENODE_CACHE")
	if cache == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(home, ".cache", "tkenode")
	}
	return filepath.Join(cache, "components", "bin")
}

// TestNodeMonitor pushes what the agent collects on this machine to the real
// Prometheus, asks for it by PromQL, and looks at the page.
func TestNodeMonitor(t *testing.T) {
	m, err := Start(t.Context(), Options{Dir: t.TempDir(), Bin: programs(t), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	log, err := os.Create(filepath.Join(t.TempDir(), "agent.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	began := time.Now()
	c := metrics.New(slog.New(slog.NewTextHandler(log, nil)), func() []node.Condition {
		return []node.Condition{
			{Type: node.ConfigSealed, Status: node.True, Since: began},
			{Type: node.NodeReady, Status: node.True, Since: began},
		}
	})
	s, err := node.Seal(1, node.Config{
		Cluster: node.ClusterConfig{ID: "cls-lab00001"},
		Metrics: node.MetricsConfig{Endpoint: "http://" + m.Addr() + "/api/v1/write", Interval: node.Duration(time.Second)},
	}, node.Facts{InstanceID: "ins-lab00001", Zone: "ap-guangzhou-3", PrivateIP: netip.MustParseAddr("10.0.0.30")}, began)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { c.Push(ctx, s) })
	defer wg.Wait()
	defer cancel()

	for _, query := range []string{
		`tkenode_condition{instance="ins-lab00001",node="10.0.0.30",cluster="cls-lab00001",type="NodeReady",status="True"} == 1`,
		`rate(node_cpu_seconds_total{instance="ins-lab00001",mode="idle"}[1m])`,
		`node_memory_MemTotal_bytes{instance="ins-lab00001"} > 0`,
		`tkenode_remote_write_samples_total{instance="ins-lab00001"} > 100`,
	} {
		await(t, m, query)
	}
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/?node=ins-lab00001", nil))
	body, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1 of 1", "10.0.0.30", "ins-lab00001", ">Ready<", "Last push", "resident"} {
		if !strings.Contains(string(body), want) {
			_, shown, _ := strings.Cut(string(body), "</style>")
			t.Fatalf("the page does not say %q:\n%s", want, shown)
		}
	}
	if p := m.page(t.Context(), "", "1h", time.Now()); p.Problem != "" || len(p.Launch) != 2 {
		t.Errorf("problem %q, launch %+v", p.Problem, p.Launch)
	}
	if said, _ := os.ReadFile(log.Name()); strings.Contains(string(said), "refused metrics") {
		t.Errorf("Prometheus refused something:\n%s", said)
	}
	if _, err := m.Query(t.Context(), "what?"); err == nil || !strings.Contains(err.Error(), "parse error") {
		t.Errorf("a query that is none: %v", err)
	}
}

// await waits until a query has a result.
func await(t *testing.T, m *Monitor, query string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		samples, err := m.Query(ctx, query)
		if err == nil && len(samples) > 0 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %d samples, %v", query, len(samples), err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
