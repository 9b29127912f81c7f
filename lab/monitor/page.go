package monitor

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

//go:embed page.html
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// ranges are how far back the page can look. The first is the default.
var ranges = []struct {
	Name string
	Back time.Duration
}{{"15m", 15 * time.Minute}, {"1h", time.Hour}, {"6h", 6 * time.Hour}, {"24h", 24 * time.Hour}}

// silent is how long after its last push a node counts as silent: three
// intervals at the usual 15 s.
const silent = 45 * time.Second

// panels are the charts of a node; the verb in a query is its instance.
var panels = []struct {
	title   string
	unit    unit
	stacked bool
	legend  string // the labels that name a line
	query   string
}{
	{"CPU", percent, true, "mode", `100 * sum by (mode) (rate(node_cpu_seconds_total{instance=%[1]q,mode!="idle"}[1m])) / scalar(count(node_cpu_seconds_total{instance=%[1]q,mode="idle"}))`},
	{"Memory", bytesUnit, false, "what", `label_replace(node_memory_MemTotal_bytes{instance=%[1]q} - node_memory_MemAvailable_bytes{instance=%[1]q}, "what", "used", "", "") or label_replace(node_memory_MemTotal_bytes{instance=%[1]q}, "what", "total", "", "")`},
	{"Disk space used", percent, false, "mountpoint", `100 - 100 * node_filesystem_avail_bytes{instance=%[1]q,mountpoint!~"/(boot|run).*"} / node_filesystem_size_bytes{instance=%[1]q}`},
	{"Disk read and write", bytesPerSecond, false, "device way", `label_replace(rate(node_disk_read_bytes_total{instance=%[1]q}[1m]), "way", "read", "", "") or label_replace(rate(node_disk_written_bytes_total{instance=%[1]q}[1m]), "way", "write", "", "")`},
	{"Network in and out", bytesPerSecond, false, "device way", `label_replace(rate(node_network_receive_bytes_total{instance=%[1]q,device!="lo"}[1m]), "way", "in", "", "") or label_replace(rate(node_network_transmit_bytes_total{instance=%[1]q,device!="lo"}[1m]), "way", "out", "", "")`},
	{"Stalled for want of (PSI)", percent, false, "what", `100 * (label_replace(rate(node_pressure_cpu_waiting_seconds_total{instance=%[1]q}[1m]), "what", "CPU", "", "") or label_replace(rate(node_pressure_memory_waiting_seconds_total{instance=%[1]q}[1m]), "what", "memory", "", "") or label_replace(rate(node_pressure_io_waiting_seconds_total{instance=%[1]q}[1m]), "what", "disk", "", ""))`},
	{"The agent's memory", bytesUnit, false, "what", `label_replace(process_resident_memory_bytes{instance=%[1]q}, "what", "resident", "", "")`},
	{"The agent's CPU", percent, false, "what", `label_replace(100 * rate(process_cpu_seconds_total{instance=%[1]q}[1m]), "what", "of one core", "", "")`},
}

// row is a node in the table.
type row struct {
	Instance, Name, Zone string
	Ready, Silent        bool
	Verdict              string // Ready, or the first condition that is not True
	Since, Seen          string
	CPU, Memory, Disk    string
}

// launch is one bar in the picture of a boot.
type launch struct {
	Name       string
	X, Width   float64 // percent
	At, Length string
}

// page is what the template shows.
type page struct {
	Now      string
	Range    string
	Ranges   []string
	Nodes    []row
	Ready    int
	Selected *row
	Charts   []chart
	Launch   []launch
	Problem  string

	Width, Height, Left, Right, Bottom int // of a chart
}

// Handler serves the page.
func (m *Monitor) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		p := m.page(r.Context(), r.FormValue("node"), r.FormValue("range"), time.Now())
		var b bytes.Buffer
		if err := pageTemplate.Execute(&b, p); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
		w.Header().Set("Cache-Control", "no-store")
		_, _ = b.WriteTo(w) // the reader has gone
	})
	return mux
}

// page gathers what is shown. A query that fails is told on the page.
func (m *Monitor) page(ctx context.Context, selected, back string, now time.Time) page {
	p := page{
		Now: now.Format("15:04:05"), Range: ranges[0].Name,
		Width: chartWidth, Height: chartHeight, Left: plotLeft, Right: plotRight, Bottom: plotBottom,
	}
	length := ranges[0].Back
	for _, r := range ranges {
		p.Ranges = append(p.Ranges, r.Name)
		if r.Name == back {
			p.Range, length = r.Name, r.Back
		}
	}
	var err error
	if p.Nodes, err = m.nodes(ctx, now); err != nil {
		p.Problem = err.Error()
		return p
	}
	for i, n := range p.Nodes {
		if n.Ready {
			p.Ready++
		}
		if n.Instance == selected || p.Selected == nil {
			p.Selected = &p.Nodes[i]
		}
	}
	if p.Selected == nil {
		return p
	}
	step := max(15*time.Second, length/120)
	from, to := now.Add(-length), now
	p.Charts = make([]chart, len(panels))
	problems := make([]error, len(panels)+1)
	var wg sync.WaitGroup
	for i, panel := range panels {
		wg.Go(func() {
			series, err := m.QueryRange(ctx, fmt.Sprintf(panel.query, p.Selected.Instance), from, to, step)
			problems[i] = err
			name := func(labels map[string]string) string { return legend(panel.legend, labels) }
			slices.SortFunc(series, func(a, b Series) int { return strings.Compare(name(a.Labels), name(b.Labels)) })
			p.Charts[i] = draw(panel.title, panel.unit, panel.stacked, name, series, from, to)
		})
	}
	wg.Go(func() { p.Launch, problems[len(panels)] = m.launch(ctx, p.Selected.Instance, now) })
	wg.Wait()
	for _, err := range problems {
		if err != nil {
			p.Problem = err.Error()
		}
	}
	return p
}

// legend is the values of the named labels.
func legend(names string, labels map[string]string) string {
	var out []string
	for name := range strings.FieldsSeq(names) {
		out = append(out, labels[name])
	}
	return strings.Join(out, " ")
}

// nodes returns every node that has pushed in the last hour.
func (m *Monitor) nodes(ctx context.Context, now time.Time) ([]row, error) {
	rows := map[string]*row{}
	conditions := map[string]map[string]Sample{}
	// The last value and its time of each condition, also of nodes gone silent.
	const ready = `timestamp(tkenode_condition{type="NodeReady",status="True"})`
	seen, err := m.Query(ctx, ready+" or max_over_time("+ready+"[1h:15s])")
	if err != nil {
		return nil, err
	}
	for _, s := range seen {
		at := time.UnixMilli(int64(s.Value * 1e3))
		rows[s.Labels["instance"]] = &row{
			Instance: s.Labels["instance"], Name: s.Labels["node"], Zone: s.Labels["zone"],
			Seen: ago(now.Sub(at)), Silent: now.Sub(at) > silent,
		}
	}
	met, err := m.Query(ctx, `last_over_time(tkenode_condition{status="True"}[1h])`)
	if err != nil {
		return nil, err
	}
	since, err := m.Query(ctx, `last_over_time(tkenode_condition_since_timestamp_seconds[1h])`)
	if err != nil {
		return nil, err
	}
	sinceOf := map[[2]string]float64{}
	for _, s := range since {
		key := [2]string{s.Labels["instance"], s.Labels["type"]}
		sinceOf[key] = max(sinceOf[key], s.Value) // of the status that it has had last
	}
	for _, s := range met {
		i := s.Labels["instance"]
		if conditions[i] == nil {
			conditions[i] = map[string]Sample{}
		}
		conditions[i][s.Labels["type"]] = s
	}
	for i, r := range rows {
		r.judge(conditions[i], func(t node.ConditionType) string {
			if at, ok := sinceOf[[2]string{i, string(t)}]; ok {
				return ago(now.Sub(time.UnixMilli(int64(at * 1e3))))
			}
			return ""
		})
	}
	return m.usage(ctx, rows)
}

// judge says in a word how a node stands.
func (r *row) judge(conditions map[string]Sample, since func(node.ConditionType) string) {
	r.Verdict, r.Since = "Ready", since(node.NodeReady)
	for _, t := range node.ConditionTypes {
		if c, ok := conditions[string(t)]; ok && c.Value != 1 {
			r.Verdict, r.Since = string(t), since(t)
			break
		}
	}
	r.Ready = r.Verdict == "Ready" && !r.Silent
}

// usage fills in the columns of figures and returns the nodes in order.
func (m *Monitor) usage(ctx context.Context, rows map[string]*row) ([]row, error) {
	for _, column := range []struct {
		query string
		set   func(*row, string)
	}{
		{`100 * (1 - avg by (instance) (rate(node_cpu_seconds_total{mode="idle"}[1m])))`, func(r *row, s string) { r.CPU = s }},
		{`100 * (1 - node_memory_MemAvailable_bytes / node_memory_MemTotal_bytes)`, func(r *row, s string) { r.Memory = s }},
		{`100 * max by (instance) (1 - node_filesystem_avail_bytes / node_filesystem_size_bytes)`, func(r *row, s string) { r.Disk = s }},
	} {
		samples, err := m.Query(ctx, column.query)
		if err != nil {
			return nil, err
		}
		for _, s := range samples {
			if r := rows[s.Labels["instance"]]; r != nil {
				column.set(r, fmt.Sprintf("%.0f %%", s.Value))
			}
		}
	}
	out := make([]row, 0, len(rows))
	for _, r := range rows {
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b row) int { return strings.Compare(a.Name+a.Instance, b.Name+b.Instance) })
	return out, nil
}

// follows says what each condition of a launch comes after, so that its bar
// begins where the work on it could.
var follows = map[node.ConditionType][]node.ConditionType{
	node.DisksReady:   {node.ConfigSealed},
	node.RuntimeReady: {node.DisksReady},
	node.NetworkReady: {node.ConfigSealed},
	node.NodeJoined:   {node.ConfigSealed},
	node.KubeletReady: {node.RuntimeReady, node.NodeJoined},
	node.NodeReady:    {node.KubeletReady, node.NetworkReady},

	node.ServicesReady: {node.KubeletReady},
	node.DNSReady:      {node.KubeletReady},
}

// launch returns the picture of a node's boot: from the start of its kernel until
// each condition was first met.
func (m *Monitor) launch(ctx context.Context, instance string, now time.Time) ([]launch, error) {
	boot, err := m.Query(ctx, fmt.Sprintf(`last_over_time(node_boot_time_seconds{instance=%q}[1d])`, instance))
	if err != nil || len(boot) == 0 {
		return nil, err
	}
	// The agent may have started again since: the earliest counts, of this boot.
	age := now.Unix() - int64(boot[0].Value) + 1
	met, err := m.Query(ctx, fmt.Sprintf(`min_over_time(tkenode_condition_since_timestamp_seconds{instance=%q,status="True"}[%ds])`, instance, age))
	if err != nil {
		return nil, err
	}
	at := map[node.ConditionType]float64{}
	total := 0.0
	for _, s := range met {
		if d := s.Value - boot[0].Value; d >= 0 {
			at[node.ConditionType(s.Labels["type"])] = d
			total = max(total, d)
		}
	}
	var out []launch
	for _, t := range node.ConditionTypes {
		end, ok := at[t]
		if !ok || total == 0 {
			continue
		}
		begin := 0.0
		for _, before := range follows[t] {
			begin = max(begin, min(at[before], end))
		}
		out = append(out, launch{
			Name: string(t), X: 100 * begin / total, Width: max(0.5, 100*(end-begin)/total),
			At: fmt.Sprintf("%.1f s", end), Length: fmt.Sprintf("%.1f s", end-begin),
		})
	}
	return out, nil
}

// ago writes an age with the unit that matters.
func ago(d time.Duration) string {
	switch d = max(0, d); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < 2*time.Hour:
		return fmt.Sprintf("%.0f min", d.Minutes())
	}
	return fmt.Sprintf("%.0f h", d.Hours())
}
