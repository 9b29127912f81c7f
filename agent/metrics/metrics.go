// Package metrics collects what node_exporter would, and how the node stands by
// the agent's own conditions, and pushes both by Prometheus remote write.
//
// A collector that hangs or panics costs its own series and nothing else. Until
// the node is Ready, or has been given up as slow, only the conditions are
// pushed: the CPU belongs to the launch. What the endpoint does not take waits in
// bounded memory and nowhere else; nothing here listens or answers to a scrape,
// the local socket apart.
package metrics

import (
	"context"
	"hash/fnv"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	firstPush       = 3 * time.Second  // after the configuration is known: a launch that fails shows, too
	settle          = 2 * time.Minute  // after which a launch no longer counts as one
	defaultInterval = 15 * time.Second // where the configuration says none
)

// Collector collects and pushes.
type Collector struct {
	log        *slog.Logger
	conditions func() []node.Condition
	began      time.Time
	transport  http.RoundTripper // to the endpoint; tests replace it
	own        *ownMetrics

	mu    sync.Mutex // one collection at a time; guards the rest
	units []*unit    // empty until something is first collected
}

// New returns a collector that tells conditions beside what it collects.
func New(log *slog.Logger, conditions func() []node.Condition) *Collector {
	return &Collector{
		log:        log,
		conditions: conditions,
		began:      time.Now(),
		transport:  newTransport(),
		own:        newOwnMetrics(conditions),
	}
}

// ServeHTTP answers with everything that is pushed, collected now.
func (c *Collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	format := expfmt.NewFormat(expfmt.TypeTextPlain)
	w.Header().Set("Content-Type", string(format))
	enc := expfmt.NewEncoder(w, format)
	for _, f := range c.gather(r.Context(), true) {
		if err := enc.Encode(f); err != nil {
			return // the client has gone
		}
	}
}

// Push collects and pushes as s wants it, until ctx ends. Without an endpoint it
// only waits.
func (c *Collector) Push(ctx context.Context, s node.Sealed) {
	m := s.Config.Metrics
	if m.Endpoint == "" {
		<-ctx.Done()
		return
	}
	send, err := newSender(m.Endpoint, c.transport, c.log, c.own)
	if err != nil {
		c.log.Error("metrics are not pushed", "err", err)
		<-ctx.Done()
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { send.run(ctx) })

	interval := time.Duration(m.Interval)
	if interval <= 0 {
		interval = defaultInterval
	}
	enc := newEncoder(externalLabels(s))
	for at := range ticks(ctx, interval, s.Facts.InstanceID) {
		families := c.gather(ctx, c.settled(at))
		if ctx.Err() != nil {
			return
		}
		for _, b := range enc.encode(families, at) {
			send.enqueue(b)
		}
	}
}

// settled reports whether the launch is over, well or not.
func (c *Collector) settled(now time.Time) bool {
	if now.Sub(c.began) >= settle {
		return true
	}
	return slices.ContainsFunc(c.conditions(), func(x node.Condition) bool {
		return x.Type == node.NodeReady && x.Status == node.True
	})
}

// externalLabels name the node on every series, for a store that has many.
func externalLabels(s node.Sealed) map[string]string {
	out := map[string]string{
		"job":      "tkenode",
		"cluster":  s.Config.Cluster.ID,
		"instance": s.Facts.InstanceID,
		"node":     s.Config.Name(s.Facts),
		"zone":     s.Facts.Zone,
	}
	maps.Copy(out, s.Config.Metrics.ExternalLabels)
	maps.DeleteFunc(out, func(_, v string) bool { return v == "" }) // an empty label is no label
	return out
}

// ticks yields when to collect: soon, and then at every interval, at an offset of
// the instance's own, so that the nodes of a cluster do not push at once. A tick
// that was missed is not made up for.
func ticks(ctx context.Context, interval time.Duration, instance string) func(func(time.Time) bool) {
	return func(yield func(time.Time) bool) {
		offset := offsetOf(instance, interval)
		timer := time.NewTimer(firstPush)
		defer timer.Stop()
		for {
			var at time.Time
			select {
			case <-ctx.Done():
				return
			case at = <-timer.C:
			}
			if !yield(at) {
				return
			}
			now := time.Now()
			next := now.Add(-offset).Truncate(interval).Add(interval + offset)
			timer.Reset(next.Sub(now))
		}
	}
}

func offsetOf(instance string, interval time.Duration) time.Duration {
	h := fnv.New64a()
	_, _ = h.Write([]byte(instance)) // never fails
	return time.Duration(h.Sum64() % uint64(interval))
}

// ownMetrics is what the agent tells of itself.
type ownMetrics struct {
	registry *prometheus.Registry
	samples  prometheus.Counter
	bytes    prometheus.Counter
	requests *prometheus.CounterVec // by status code, "error" without an answer
	dropped  *prometheus.CounterVec // samples, by reason
	pending  prometheus.Gauge
}

func newOwnMetrics(conditions func() []node.Condition) *ownMetrics {
	m := &ownMetrics{
		registry: prometheus.NewPedanticRegistry(),
		samples: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tkenode_remote_write_samples_total", Help: "Samples that the endpoint took."}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tkenode_remote_write_bytes_total", Help: "Bytes of request bodies that the endpoint took."}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tkenode_remote_write_requests_total", Help: "Requests by status code; error where there was no answer."}, []string{"code"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tkenode_remote_write_dropped_samples_total", Help: "Samples given up: refused by the endpoint, or the queue was full."}, []string{"reason"}),
		pending: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "tkenode_remote_write_pending_bytes", Help: "Bytes of request bodies that wait to be sent."}),
	}
	m.registry.MustRegister(m.samples, m.bytes, m.requests, m.dropped, m.pending, conditionCollector(conditions))
	return m
}

var (
	conditionDesc = prometheus.NewDesc("tkenode_condition", "Whether a condition of the node has this status.", []string{"type", "status"}, nil)
	sinceDesc     = prometheus.NewDesc("tkenode_condition_since_timestamp_seconds", "Since when a condition has its status.", []string{"type", "status"}, nil)
)

// conditionCollector turns conditions into series.
type conditionCollector func() []node.Condition

func (conditionCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- conditionDesc
	ch <- sinceDesc
}

func (f conditionCollector) Collect(ch chan<- prometheus.Metric) {
	for _, c := range f() {
		for _, s := range []node.Status{node.True, node.False, node.Unknown} {
			v := 0.0
			if c.Status == s {
				v = 1
			}
			ch <- prometheus.MustNewConstMetric(conditionDesc, prometheus.GaugeValue, v, string(c.Type), string(s))
		}
		if !c.Since.IsZero() {
			ch <- prometheus.MustNewConstMetric(sinceDesc, prometheus.GaugeValue, float64(c.Since.UnixMilli())/1e3, string(c.Type), string(c.Status))
		}
	}
}

// gather collects the agent's own metrics and, unless the launch is still under
// way, those of the node.
func (c *Collector) gather(ctx context.Context, all bool) []*dto.MetricFamily {
	c.mu.Lock()
	defer c.mu.Unlock()
	out, err := c.own.registry.Gather()
	if err != nil {
		c.log.Error("own metrics are incomplete", "err", err)
	}
	if !all {
		return out
	}
	if c.units == nil {
		c.units = newUnits(c.log)
	}
	return append(out, collect(ctx, c.log, c.units)...)
}
