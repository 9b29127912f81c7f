package metrics

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"github.com/tkenode/tkenode/agent/node"
)

func nowMillis() int64 { return time.Now().UnixMilli() }

var discard = slog.New(slog.DiscardHandler)

func conditions(ready node.Status) func() []node.Condition {
	return func() []node.Condition {
		return []node.Condition{{Type: node.NodeReady, Status: ready, Since: time.Unix(1767225600, 0)}}
	}
}

func sealed(t *testing.T, endpoint string) node.Sealed {
	t.Helper()
	cfg := node.Config{
		Cluster: node.ClusterConfig{ID: "cls-lab00001"},
		Metrics: node.MetricsConfig{
			Endpoint: endpoint, Interval: node.Duration(15 * time.Second),
			ExternalLabels: map[string]string{"team": "sre", "zone": "mine", "empty": ""},
		},
	}
	facts := node.Facts{InstanceID: "ins-lab00001", Zone: "ap-guangzhou-3", PrivateIP: netip.MustParseAddr("10.0.0.30")}
	s, err := node.Seal(1, cfg, facts, time.Unix(1767225600, 0))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func gauge(name string, value float64, labels ...string) *dto.MetricFamily {
	m := &dto.Metric{Gauge: &dto.Gauge{Value: &value}}
	for i := 0; i < len(labels); i += 2 {
		m.Label = append(m.Label, &dto.LabelPair{Name: &labels[i], Value: &labels[i+1]})
	}
	return &dto.MetricFamily{Name: &name, Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{m}}
}

// lines decodes bodies into lines "{labels} value".
func lines(t *testing.T, bodies []body) []string {
	t.Helper()
	var out []string
	for _, b := range bodies {
		got, err := decode(b.data)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != b.samples {
			t.Errorf("%d samples, said %d", len(got), b.samples)
		}
		for _, s := range got {
			v := fmt.Sprint(s.value)
			if math.Float64bits(s.value) == staleNaN {
				v = "stale"
			}
			out = append(out, s.labels+" "+v)
		}
	}
	return out
}

func equal(t *testing.T, what string, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestEncode(t *testing.T) {
	e := newEncoder(map[string]string{"instance": "i", "Zone": "z", "dev": "external", "__name__": "no"})
	at := time.UnixMilli(1767225600123)
	got := lines(t, e.encode([]*dto.MetricFamily{
		gauge("a", 1.5, "dev", "eth0", "none", ""),
		gauge("a", 2.5, "dev", "eth0"), // the same series: the first sample counts
		{
			Name: proto.String("h"), Type: dto.MetricType_HISTOGRAM.Enum(),
			Metric: []*dto.Metric{{Histogram: &dto.Histogram{
				SampleCount: proto.Uint64(3), SampleSum: proto.Float64(7),
				Bucket: []*dto.Bucket{{UpperBound: proto.Float64(0.5), CumulativeCount: proto.Uint64(1)}},
			}}},
		},
		{
			Name: proto.String("s"), Type: dto.MetricType_SUMMARY.Enum(),
			Metric: []*dto.Metric{{Summary: &dto.Summary{
				SampleCount: proto.Uint64(2), SampleSum: proto.Float64(9),
				Quantile: []*dto.Quantile{{Quantile: proto.Float64(0.99), Value: proto.Float64(4)}},
			}}},
		},
	}, at))
	equal(t, "first", got, []string{
		`{Zone="z",__name__="a",dev="eth0",instance="i"} 1.5`,
		`{Zone="z",__name__="h_bucket",dev="external",instance="i",le="0.5"} 1`,
		`{Zone="z",__name__="h_bucket",dev="external",instance="i",le="+Inf"} 3`,
		`{Zone="z",__name__="h_sum",dev="external",instance="i"} 7`,
		`{Zone="z",__name__="h_count",dev="external",instance="i"} 3`,
		`{Zone="z",__name__="s",dev="external",instance="i",quantile="0.99"} 4`,
		`{Zone="z",__name__="s_sum",dev="external",instance="i"} 9`,
		`{Zone="z",__name__="s_count",dev="external",instance="i"} 2`,
	})
	e = newEncoder(nil)
	e.encode([]*dto.MetricFamily{gauge("a", 1), gauge("b", 1)}, at)
	equal(t, "a series that ended", lines(t, e.encode([]*dto.MetricFamily{gauge("b", 2)}, at)), []string{`{__name__="b"} 2`, `{__name__="a"} stale`})
	equal(t, "it ended once", lines(t, e.encode([]*dto.MetricFamily{gauge("b", 3)}, at)), []string{`{__name__="b"} 3`})
	if got := e.encode(nil, at); len(got) != 1 {
		t.Errorf("nothing left: %d bodies", len(got))
	}
	if got := e.encode(nil, at); len(got) != 0 {
		t.Errorf("nothing at all: %d bodies", len(got))
	}
}

func TestEncodeSplits(t *testing.T) {
	var families []*dto.MetricFamily
	for i := range 2*maxSamples + 1 {
		families = append(families, gauge("a", 1, "i", fmt.Sprint(i)))
	}
	got := newEncoder(nil).encode(families, time.Now())
	if len(got) != 3 || got[2].samples != 1 {
		t.Errorf("%d bodies", len(got))
	}
	if n := len(lines(t, got)); n != len(families) {
		t.Errorf("%d samples of %d", n, len(families))
	}
}

func FuzzEncode(f *testing.F) {
	f.Add("name", "a", "b", "c", "d", 1.5, int64(1))
	f.Add("n", "", "", "a", "a", math.NaN(), int64(math.MaxInt64))
	f.Fuzz(func(t *testing.T, name, l1, v1, l2, v2 string, value float64, millis int64) {
		for _, s := range []*string{&name, &l1, &l2, &v1, &v2} {
			*s = strings.ToValidUTF8(*s, "?") // client_golang lets nothing else through
		}
		if name == "" || l1 == "" || l2 == "" || l1 == "__name__" || l2 == "__name__" || millis < 0 {
			return
		}
		got := lines(t, newEncoder(map[string]string{l2: v2}).encode([]*dto.MetricFamily{gauge(name, value, l1, v1)}, time.UnixMilli(millis)))
		if len(got) != 1 || !strings.Contains(got[0], fmt.Sprintf("__name__=%q", name)) {
			t.Errorf("got %q", got)
		}
	})
}

// TestPush follows a launch: conditions alone at first, everything once the node
// is Ready, every interval from then on, each under the external labels.
func TestPush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		var mu sync.Mutex
		ready := node.False
		c := New(discard, func() []node.Condition {
			mu.Lock()
			defer mu.Unlock()
			return conditions(ready)()
		})
		c.transport = r
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { c.Push(ctx, sealed(t, "http://tmp.example/write")) })

		time.Sleep(firstPush + time.Second)
		has := func(want string) bool {
			r.mu.Lock()
			defer r.mu.Unlock()
			return slices.ContainsFunc(r.took, func(s sample) bool { return strings.Contains(s.labels, want) })
		}
		if !has(`{__name__="tkenode_condition",cluster="cls-lab00001",instance="ins-lab00001",job="tkenode",node="10.0.0.30",status="False",team="sre",type="NodeReady",zone="mine"}`) {
			t.Errorf("the condition is not among %v", r.took)
		}
		if has(`"node_`) {
			t.Error("the node is looked at during its launch")
		}
		mu.Lock()
		ready = node.True
		mu.Unlock()
		time.Sleep(15 * time.Second)
		for _, want := range []string{"node_cpu_seconds_total", "node_memory_MemAvailable_bytes", "node_filesystem_avail_bytes",
			"node_load1", "node_boot_time_seconds", "process_resident_memory_bytes", "node_scrape_collector_success"} {
			if !has(`__name__="` + want + `"`) {
				t.Errorf("%s is not pushed", want)
			}
		}
		pushes := func() int {
			r.mu.Lock()
			defer r.mu.Unlock()
			return len(r.times)
		}
		before := pushes()
		time.Sleep(10 * 15 * time.Second)
		if n := pushes() - before; n != 10 {
			t.Errorf("%d pushes in 10 intervals", n)
		}
		cancel()
		wg.Wait()
		if len(r.wrong) > 0 {
			t.Error(errors.Join(r.wrong...))
		}
		for i := 2; i < len(r.times); i++ {
			if d := r.times[i] - r.times[i-1]; d != 15000 {
				t.Errorf("%d ms between pushes", d)
			}
		}
	})
}

// TestSlowLaunchIsLookedAt: a launch that does not end is worth all metrics.
func TestSlowLaunchIsLookedAt(t *testing.T) {
	c := New(discard, conditions(node.False))
	if c.settled(c.began.Add(settle - time.Second)) {
		t.Error("settled too soon")
	}
	if !c.settled(c.began.Add(settle)) {
		t.Error("never settled")
	}
	if !New(discard, conditions(node.True)).settled(time.Now()) {
		t.Error("a Ready node is not settled")
	}
}

func TestSender(t *testing.T) {
	for _, tc := range []struct {
		name     string
		codes    []string
		attempts int
		took     bool
		atLeast  time.Duration // from the first attempt to the last
	}{
		{"taken", nil, 1, true, 0},
		{"200 is as good", []string{"200"}, 1, true, 0},
		{"server error", []string{"500", "503", "502"}, 4, true, 1500 * time.Millisecond},
		{"refused connection", []string{"refuse", "refuse"}, 3, true, time.Second},
		{"too many", []string{"429"}, 2, true, 500 * time.Millisecond},
		{"too many, come back later", []string{"429 Retry-After=70"}, 2, true, 70 * time.Second},
		{"come back in a year", []string{"503 Retry-After=31536000"}, 2, true, maxRetryAfter},
		{"not allowed now", []string{"401", "403"}, 3, true, time.Second},
		{"bad request", []string{"400"}, 1, false, 0},
		{"not found", []string{"404"}, 1, false, 0},
		{"redirect", []string{"301 Location=http://elsewhere.example/"}, 1, false, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &receiver{codes: tc.codes}
				s, err := newSender("http://tmp.example/write", r, discard, newOwnMetrics(conditions(node.True)))
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				wg.Go(func() { s.run(ctx) })
				s.enqueue(newEncoder(nil).encode([]*dto.MetricFamily{gauge("a", 1)}, time.Now())[0])
				time.Sleep(maxRetryAfter + 10*time.Minute)
				cancel()
				wg.Wait()
				if len(r.times) != tc.attempts || (len(r.took) == 1) != tc.took {
					t.Errorf("%d attempts, took %v", len(r.times), r.took)
				}
				if d := time.Duration(r.times[len(r.times)-1]-r.times[0]) * time.Millisecond; d < tc.atLeast || d > tc.atLeast+2*time.Minute {
					t.Errorf("%v from the first attempt to the last", d)
				}
				if len(r.wrong) > 0 {
					t.Error(errors.Join(r.wrong...))
				}
				if s.pending != 0 || len(s.queue) != 0 {
					t.Errorf("%d bodies, %d bytes are left", len(s.queue), s.pending)
				}
			})
		})
	}
}

// TestOutage: while the endpoint is away the queue grows to its bound and no
// further, gives up the oldest, and is sent in order afterwards.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receiver{}
		for range 40 {
			r.codes = append(r.codes, "503")
		}
		own := newOwnMetrics(conditions(node.True))
		s, err := newSender("http://tmp.example/write", r, discard, own)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { s.run(ctx) })
		s.limit = 100 << 10
		e := newEncoder(nil)
		source := rand.NewChaCha8([32]byte{})
		enqueued := 0
		for i := range 80 {
			var families []*dto.MetricFamily
			for j := range 10 {
				random := make([]byte, 200) // which no compression makes smaller
				_, _ = source.Read(random)
				families = append(families, gauge("a", float64(i), "j", fmt.Sprint(j), "random", base64.StdEncoding.EncodeToString(random)))
			}
			for _, b := range e.encode(families, time.UnixMilli(int64(i))) {
				enqueued += b.samples
				s.enqueue(b)
				s.mu.Lock()
				if s.pending > s.limit {
					t.Fatalf("%d bytes pending", s.pending)
				}
				s.mu.Unlock()
			}
		}
		time.Sleep(3 * time.Hour)
		cancel()
		wg.Wait()
		if !slices.IsSortedFunc(r.took, func(a, b sample) int { return int(a.millis - b.millis) }) {
			t.Error("sent out of order")
		}
		lost := counter(t, own.registry, "tkenode_remote_write_dropped_samples_total")
		if lost == 0 || len(r.took)+int(lost) != enqueued {
			t.Errorf("took %d, gave up %.0f, enqueued %d", len(r.took), lost, enqueued)
		}
		if len(r.wrong) > 0 {
			t.Error(errors.Join(r.wrong...))
		}
	})
}

func counter(t *testing.T, r *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.Metric {
				sum += m.GetCounter().GetValue()
			}
		}
	}
	return sum
}

// TestBadCollectors: one that hangs, one that panics, one that fails and one that
// has too much to say; the others do not notice.
func TestBadCollectors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		var calls atomic.Int32
		desc := prometheus.NewDesc("many", "help", []string{"i"}, nil)
		units := []*unit{
			newUnit("hangs", unchecked{update(func(chan<- prometheus.Metric) error {
				calls.Add(1)
				<-hang
				return nil
			})}),
			newUnit("panics", unchecked{update(func(chan<- prometheus.Metric) error { panic("no") })}),
			newUnit("fails", unchecked{update(func(chan<- prometheus.Metric) error { return errors.New("no") })}),
			newUnit("many", unchecked{update(func(ch chan<- prometheus.Metric) error {
				for i := range maxSeries + 7 {
					ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, 1, fmt.Sprint(i))
				}
				return nil
			})}),
			newUnit("good", unchecked{update(func(ch chan<- prometheus.Metric) error {
				ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("good", "help", nil, nil), prometheus.GaugeValue, 42)
				return nil
			})}),
		}
		for round := range 3 {
			began := time.Now()
			got := map[string]float64{}
			for _, f := range collect(t.Context(), discard, units) {
				for _, m := range f.Metric {
					key := f.GetName()
					if len(m.Label) > 0 && key != "many" {
						key += "/" + m.Label[0].GetValue()
					}
					got[key] += m.GetGauge().GetValue()
				}
			}
			for key, want := range map[string]float64{
				"good": 42, "many": maxSeries, "tkenode_collector_dropped_series/many": 7,
				"node_scrape_collector_success/hangs": 0, "node_scrape_collector_success/panics": 0,
				"node_scrape_collector_success/fails": 0, "node_scrape_collector_success/good": 1,
			} {
				if v, ok := got[key]; !ok || v != want {
					t.Errorf("round %d: %s is %v, want %v", round, key, v, want)
				}
			}
			if took := time.Since(began); took > collectDeadline {
				t.Errorf("round %d took %v", round, took)
			}
		}
		if n := calls.Load(); n != 1 {
			t.Errorf("the one that hangs was called %d times", n)
		}
		close(hang)
		synctest.Wait()
		for _, f := range collect(t.Context(), discard, units) {
			for _, m := range f.Metric {
				if f.GetName() == "node_scrape_collector_success" && m.Label[0].GetValue() == "hangs" && m.GetGauge().GetValue() != 1 {
					t.Error("it is not collected after it has come back")
				}
			}
		}
	})
}

type update func(chan<- prometheus.Metric) error

func (f update) Update(ch chan<- prometheus.Metric) error { return f(ch) }

// onAnyLinux are collectors that work wherever this test runs.
var onAnyLinux = []string{"cpu", "meminfo", "filesystem", "stat", "uname", "loadavg", "netdev", "vmstat"}

// TestThisMachine collects with every collector that is chosen, for real.
func TestThisMachine(t *testing.T) {
	c := New(discard, conditions(node.True))
	var text string
	// A busy machine may exceed a collector's deadline once.
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		w := httptest.NewRecorder()
		c.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		if text = w.Body.String(); !slices.ContainsFunc(onAnyLinux, func(name string) bool {
			return strings.Contains(text, fmt.Sprintf("node_scrape_collector_success{collector=%q} 0\n", name))
		}) {
			break
		}
	}
	for _, name := range append([]string{"process"}, nodeCollectors...) {
		if !strings.Contains(text, fmt.Sprintf("node_scrape_collector_success{collector=%q} ", name)) {
			t.Errorf("there is no collector %s", name)
		}
	}
	for _, name := range onAnyLinux {
		if !strings.Contains(text, fmt.Sprintf("node_scrape_collector_success{collector=%q} 1\n", name)) {
			t.Errorf("collector %s fails on any Linux", name)
		}
	}
	if !strings.Contains(text, `tkenode_condition{status="True",type="NodeReady"} 1`) {
		t.Error("the conditions are missing")
	}
	for line := range strings.Lines(text) {
		if strings.Contains(line, `device="veth`) || strings.Contains(line, `mountpoint="/proc`) {
			t.Errorf("not of the node: %s", line)
		}
	}
}

func TestTicksAreOffset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const interval = 15 * time.Second
		offsets := map[time.Duration]bool{}
		for i := range 20 {
			ctx, cancel := context.WithCancel(t.Context())
			n := 0
			var last time.Time
			for at := range ticks(ctx, interval, fmt.Sprintf("ins-%d", i)) {
				if n++; n == 1 {
					continue
				}
				if d := at.Sub(last); n > 2 && d != interval {
					t.Fatalf("%v between ticks", d)
				}
				if last = at; n == 4 {
					break
				}
			}
			cancel()
			offsets[last.Sub(last.Truncate(interval))] = true
		}
		if len(offsets) < 15 {
			t.Errorf("20 instances share %d offsets", len(offsets))
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "-7": 0, "x": 0, "99999999999999": 0, "86400": maxRetryAfter,
		"Fri, 02 Jan 2026 03:05:05 GMT": time.Minute, "Thu, 01 Jan 2026 00:00:00 GMT": 0,
	} {
		if got := retryAfter(header, now); got != want {
			t.Errorf("%q: %v, want %v", header, got, want)
		}
	}
}
