// Package monitor is the lab's monitoring endpoint: a real Prometheus that
// accepts remote write, and a page for people over PromQL.
//
// It scrapes nothing and alerts nobody: nodes push, as they do to TMP.
package monitor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/tkenode/tkenode/lab/proc"
)

// Options say where Prometheus is and where it may write.
type Options struct {
	Dir string // made if it is not there; holds data, configuration and log
	Bin string // directory of the program prometheus
	Log *slog.Logger
}

const (
	startTimeout = time.Minute // on a machine that is busy with everything else
	queryTimeout = 20 * time.Second
	maxAnswer    = 32 << 20
	// Samples may come late and out of order, as TMP's kind of store has it.
	configuration = "storage:\n  tsdb:\n    out_of_order_time_window: 12h\n"
	retention     = "2d"
)

// Monitor is a Prometheus that runs.
type Monitor struct {
	log    *slog.Logger
	group  *proc.Group
	addr   string
	client *http.Client
	watch  sync.WaitGroup
}

// Start starts Prometheus and returns when it takes samples.
func Start(ctx context.Context, o Options) (*Monitor, error) {
	m := &Monitor{log: o.Log, group: proc.NewGroup(), client: &http.Client{Transport: &http.Transport{}, Timeout: queryTimeout}}
	if err := m.start(ctx, o); err != nil {
		return nil, errors.Join(fmt.Errorf("start Prometheus: %w", err), m.Stop(ctx))
	}
	return m, nil
}

func (m *Monitor) start(ctx context.Context, o Options) error {
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return err
	}
	config, log := filepath.Join(o.Dir, "prometheus.yml"), filepath.Join(o.Dir, "prometheus.log")
	if err := os.WriteFile(config, []byte(configuration), 0o644); err != nil {
		return err
	}
	// The address is read from the log, which must not tell an earlier one.
	if err := os.Remove(log); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p, err := m.group.Start(proc.Command{
		Path: filepath.Join(o.Bin, "prometheus"),
		Args: []string{
			"--config.file=" + config,
			"--storage.tsdb.path=" + filepath.Join(o.Dir, "data"),
			"--storage.tsdb.retention.time=" + retention,
			"--web.listen-address=127.0.0.1:0",
			"--web.enable-remote-write-receiver",
		},
		Log:  log,
		Stop: 15 * time.Second, // it writes what it has in memory
	})
	if err != nil {
		return err
	}
	m.watch.Go(func() {
		<-p.Done()
		if err := p.Err(); err != nil {
			m.log.Error("Prometheus has ended", "err", err)
		}
	})
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		if m.ready(ctx, log) {
			return nil
		}
		select {
		case <-p.Done():
			return p.Err()
		case <-ctx.Done():
			return fmt.Errorf("it does not answer: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// listening is how exporter-toolkit tells the port that the kernel has chosen.
var listening = regexp.MustCompile(`msg="Listening on" component=web address=(127\.0\.0\.1:\d+)`)

// ready finds out the address and asks there.
func (m *Monitor) ready(ctx context.Context, log string) bool {
	if m.addr == "" {
		text, err := os.ReadFile(log)
		if err != nil {
			return false
		}
		found := listening.FindSubmatch(text)
		if found == nil {
			return false
		}
		m.addr = string(found[1])
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m.addr+"/-/ready", nil)
	if err != nil {
		return false
	}
	resp, err := m.client.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// Stop ends Prometheus and waits for it.
func (m *Monitor) Stop(context.Context) error {
	err := m.group.Close()
	m.watch.Wait()
	m.client.CloseIdleConnections()
	return err
}

// Addr is where Prometheus listens on this machine.
func (m *Monitor) Addr() string { return m.addr }

// Sample is one value of an instant vector.
type Sample struct {
	Labels map[string]string
	Value  float64
	Time   time.Time
}

// Series is one series of a range vector. A point that is missing is NaN.
type Series struct {
	Labels map[string]string
	Values []float64 // one each step
}

// Query evaluates an instant query now.
func (m *Monitor) Query(ctx context.Context, promql string) ([]Sample, error) {
	var result []struct {
		Metric map[string]string
		Value  point
	}
	if err := m.get(ctx, "/api/v1/query", url.Values{"query": {promql}}, "vector", &result); err != nil {
		return nil, fmt.Errorf("query %s: %w", promql, err)
	}
	out := make([]Sample, len(result))
	for i, r := range result {
		out[i] = Sample{Labels: r.Metric, Value: r.Value.value, Time: r.Value.at()}
	}
	return out, nil
}

// QueryRange evaluates a query at every step of [from, to].
func (m *Monitor) QueryRange(ctx context.Context, promql string, from, to time.Time, step time.Duration) ([]Series, error) {
	var result []struct {
		Metric map[string]string
		Values []point
	}
	err := m.get(ctx, "/api/v1/query_range", url.Values{
		"query": {promql}, "start": {seconds(from)}, "end": {seconds(to)}, "step": {strconv.FormatFloat(step.Seconds(), 'f', 3, 64)},
	}, "matrix", &result)
	if err != nil {
		return nil, fmt.Errorf("query %s: %w", promql, err)
	}
	n := int(to.Sub(from)/step) + 1
	out := make([]Series, len(result))
	for i, r := range result {
		s := Series{Labels: r.Metric, Values: make([]float64, n)}
		for j := range s.Values {
			s.Values[j] = math.NaN()
		}
		for _, p := range r.Values {
			if j := int(math.Round(p.at().Sub(from).Seconds() / step.Seconds())); j >= 0 && j < n {
				s.Values[j] = p.value
			}
		}
		out[i] = s
	}
	return out, nil
}

func seconds(t time.Time) string { return strconv.FormatFloat(float64(t.UnixMilli())/1e3, 'f', 3, 64) }

// point is a sample as Prometheus' API writes it: [1767225600.123, "42"].
type point struct{ seconds, value float64 }

func (p point) at() time.Time { return time.UnixMilli(int64(math.Round(p.seconds * 1e3))) }

func (p *point) UnmarshalJSON(b []byte) error {
	var text string
	if err := json.Unmarshal(b, &[]any{&p.seconds, &text}); err != nil {
		return err
	}
	var err error
	p.value, err = strconv.ParseFloat(text, 64)
	return err
}

// get asks Prometheus' API and decodes a result of the type kind into out.
func (m *Monitor) get(ctx context.Context, path string, params url.Values, kind string, out any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m.addr+path+"?"+params.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := m.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct {
			ResultType string
			Result     json.RawMessage
		}
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&answer); err != nil {
		return fmt.Errorf("%s: %w", resp.Status, err)
	}
	if answer.Status != "success" {
		return errors.New(answer.Error)
	}
	if answer.Data.ResultType != kind {
		return fmt.Errorf("it is a %s, not a %s", answer.Data.ResultType, kind)
	}
	return json.Unmarshal(answer.Data.Result, out)
}
