package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/node_exporter/collector"
)

const (
	// collectDeadline is how long one collector may take. Those that read /proc
	// take milliseconds; one that takes longer hangs, on a mount that does not
	// answer for instance.
	collectDeadline = 2 * time.Second
	// collectAtOnce bounds the collectors that run at the same time: node_exporter
	// itself stays on one CPU since parallel reads of /proc and /sys contend for
	// locks in the kernel. Source: https://github.com/prometheus/node_exporter/issues/2500
	collectAtOnce = 2
	// maxSeries bounds what one collector may send, were there thousands of mounts.
	maxSeries = 3000
)

// nodeCollectors are the collectors of node_exporter that a Kubernetes node is
// looked at by, and that cost next to nothing.
var nodeCollectors = []string{
	"conntrack", "cpu", "diskstats", "filefd", "filesystem", "loadavg", "meminfo", "netdev",
	"netstat", "pressure", "sockstat", "stat", "time", "timex", "uname", "vmstat",
}

// nodeFlags are node_exporter's own flags. The file systems and links of single
// pods and containers are left out: there are hundreds, they come and go, and
// their numbers are those of the node's disk and ENIs.
var nodeFlags = []string{
	"--collector.filesystem.mount-points-exclude=^/(dev|proc|sys|run|var/lib/containerd/.+|var/lib/kubelet/pods/.+)($|/)",
	"--collector.netdev.device-include=^(lo|eth[0-9]+)$",
}

// parseNodeFlags gives node_exporter's package its options, once: it takes them
// from the global command line of kingpin, whose values are empty until a command
// line was parsed, and keeps them for the life of the process. Ours is not it.
var parseNodeFlags = sync.OnceValue(func() error {
	kingpin.CommandLine.Terminate(nil) // an error is returned and does not end the process
	_, err := kingpin.CommandLine.Parse(nodeFlags)
	return err
})

// unit is one collector with a registry of its own, so that what is wrong with
// it stays with it.
type unit struct {
	name    string
	gather  func() ([]*dto.MetricFamily, error)
	running atomic.Bool // still, since an earlier collection
	failing bool        // said so in the log
}

// result is what one unit has given.
type result struct {
	families []*dto.MetricFamily
	took     time.Duration
	dropped  int // series above maxSeries
	err      error
}

// newUnits makes every collector that can be made on this machine.
func newUnits(log *slog.Logger) []*unit {
	units := []*unit{newUnit("process", collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))}
	if err := parseNodeFlags(); err != nil {
		log.Error("node metrics are not collected", "err", err)
		return units
	}
	for _, name := range nodeCollectors {
		// node_exporter logs each failure each time; ours says it once.
		n, err := collector.NewNodeCollector(slog.New(slog.DiscardHandler), name)
		if err != nil {
			log.Error("metrics are not collected", "collector", name, "err", err)
			continue
		}
		units = append(units, newUnit(name, unchecked{n.Collectors[name]}))
	}
	return units
}

func newUnit(name string, c prometheus.Collector) *unit {
	r := prometheus.NewRegistry()
	r.MustRegister(c)
	return &unit{name: name, gather: r.Gather}
}

// unchecked makes a prometheus.Collector of one of node_exporter's, which do not
// say beforehand what they will give.
type unchecked struct{ collector.Collector }

func (unchecked) Describe(chan<- *prometheus.Desc) {}

func (u unchecked) Collect(ch chan<- prometheus.Metric) {
	err := func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("panic: %v", p)
			}
		}()
		return u.Update(ch)
	}()
	if err != nil && !collector.IsNoDataError(err) {
		ch <- prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(err), err)
	}
}

// errStuck is a collection that has not ended since an earlier one.
var errStuck = errors.New("it has not returned since an earlier collection")

// collect has every unit collect, a few at a time, and returns what came in time
// and how it went.
func collect(ctx context.Context, log *slog.Logger, units []*unit) []*dto.MetricFamily {
	results := make([]result, len(units))
	places := make(chan struct{}, collectAtOnce)
	var wg sync.WaitGroup
	for i, u := range units {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			results[i] = u.collect(ctx)
		})
	}
	wg.Wait()
	var out []*dto.MetricFamily
	for i, u := range units {
		out = append(out, results[i].families...)
		if ctx.Err() == nil { // else the reader has hung up, which is no fault of a collector
			u.report(log, results[i].err)
		}
	}
	return append(out, describe(units, results)...)
}

// collect waits at most the deadline. A collection that outlives it goes on alone
// (nothing can end a system call that hangs), its result goes nowhere, and there
// is no second one beside it.
func (u *unit) collect(ctx context.Context) result {
	if !u.running.CompareAndSwap(false, true) {
		return result{err: errStuck}
	}
	began := time.Now()
	done := make(chan result, 1)
	go func() {
		families, err := u.gather()
		u.running.Store(false) // first: the next collection may begin at once
		done <- result{families: families, err: err}
	}()
	deadline := time.NewTimer(collectDeadline)
	defer deadline.Stop()
	var r result
	select {
	case r = <-done:
	case <-deadline.C:
		r.err = fmt.Errorf("it has not returned for %s", collectDeadline)
	case <-ctx.Done():
		r.err = ctx.Err()
	}
	r.took = time.Since(began)
	r.families, r.dropped = bound(r.families, maxSeries)
	return r
}

// report logs when a collector begins and ceases to fail.
func (u *unit) report(log *slog.Logger, err error) {
	if failing := err != nil; failing != u.failing {
		u.failing = failing
		if failing {
			log.Warn("a collector fails", "collector", u.name, "err", err)
		} else {
			log.Info("a collector works again", "collector", u.name)
		}
	}
}

// bound keeps the first n series of families and says how many it left out.
func bound(families []*dto.MetricFamily, n int) (kept []*dto.MetricFamily, dropped int) {
	for _, f := range families {
		if over := len(f.Metric) - n; over > 0 {
			dropped += over
			f.Metric = slices.Clip(f.Metric[:n])
		}
		n -= len(f.Metric)
		if len(f.Metric) > 0 {
			kept = append(kept, f)
		}
	}
	return kept, dropped
}

// describe tells how each collection went, under the names that node_exporter
// has for it.
func describe(units []*unit, results []result) []*dto.MetricFamily {
	family := func(name, help string, value func(result) float64) *dto.MetricFamily {
		label, kind := "collector", dto.MetricType_GAUGE
		f := &dto.MetricFamily{Name: &name, Help: &help, Type: &kind}
		for i, u := range units {
			v := value(results[i])
			f.Metric = append(f.Metric, &dto.Metric{
				Label: []*dto.LabelPair{{Name: &label, Value: &u.name}},
				Gauge: &dto.Gauge{Value: &v},
			})
		}
		return f
	}
	return []*dto.MetricFamily{
		family("node_scrape_collector_success", "Whether a collector succeeded.", func(r result) float64 {
			if r.err != nil {
				return 0
			}
			return 1
		}),
		family("node_scrape_collector_duration_seconds", "How long a collector took.", func(r result) float64 { return r.took.Seconds() }),
		family("tkenode_collector_dropped_series", "Series of a collector above its limit.", func(r result) float64 { return float64(r.dropped) }),
	}
}
