package monitor

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

var (
	from = time.Date(2026, 1, 2, 3, 4, 0, 0, time.UTC)
	to   = from.Add(15 * time.Minute)
	nan  = math.NaN()
)

func TestDraw(t *testing.T) {
	name := func(l map[string]string) string { return l["mode"] }
	c := draw("CPU", percent, true, name, []Series{
		{Labels: map[string]string{"mode": "user"}, Values: []float64{10, 20, nan, 40}},
		{Labels: map[string]string{"mode": "system"}, Values: []float64{10, 20, 30, nan}},
	}, from, to)
	if len(c.Lines) != 2 || c.Lines[0].Name != "user" || c.Lines[0].Last != "40 %" || c.Lines[1].Last != "30 %" {
		t.Errorf("lines are %+v", c.Lines)
	}
	if got := strings.Count(c.Lines[0].Path, "M"); got != 2 {
		t.Errorf("a gap is drawn over: %s", c.Lines[0].Path)
	}
	if c.Y[2].Text != "100 %" || c.Y[0].Text != "0 %" {
		t.Errorf("scale is %+v", c.Y)
	}
	// 10 and 10 on top of it are a fifth of the plot's 122 units, from its bottom at 130.
	if want := "M54.0 105.6"; !strings.HasPrefix(c.Lines[1].Path, want) {
		t.Errorf("stacked line begins %s, want %s", c.Lines[1].Path, want)
	}
	if len(c.X) == 0 || c.X[0].Text != "03:05" && c.X[0].Text != "03:06" {
		t.Errorf("times are %+v", c.X)
	}
	if e := draw("empty", plain, false, name, nil, from, to); !e.Empty || e.Y[2].Text != "1" {
		t.Errorf("no series: %+v", e)
	}
}

func TestCeilingAndFormat(t *testing.T) {
	for _, tc := range []struct {
		v       float64
		unit    unit
		ceiling string
	}{
		{0, plain, "1"}, {3, plain, "5"}, {7, percent, "10 %"}, {12, percent, "100 %"}, {130, percent, "200 %"},
		{0.4, plain, "0.5"}, {1500, bytesUnit, "2 KiB"}, {700 << 20, bytesUnit, "1 GiB"}, {3 << 30, bytesPerSecond, "4 GiB/s"},
	} {
		if got := format(ceiling(tc.v, tc.unit), tc.unit); got != tc.ceiling {
			t.Errorf("ceiling of %v is %s, want %s", tc.v, got, tc.ceiling)
		}
		if ceiling(tc.v, tc.unit) < tc.v {
			t.Errorf("ceiling of %v is below it", tc.v)
		}
	}
	if got := format(nan, bytesUnit); got != "–" {
		t.Errorf("no value: %s", got)
	}
}

func TestJudge(t *testing.T) {
	since := func(c node.ConditionType) string { return "since " + string(c) }
	for _, tc := range []struct {
		name       string
		conditions map[string]Sample
		silent     bool
		verdict    string
		ready      bool
	}{
		{"ready", map[string]Sample{"NodeReady": {Value: 1}}, false, "Ready", true},
		{"silent", map[string]Sample{"NodeReady": {Value: 1}}, true, "Ready", false},
		{"first unmet", map[string]Sample{"DisksReady": {Value: 0}, "NodeReady": {Value: 0}}, false, "DisksReady", false},
	} {
		r := row{Silent: tc.silent}
		r.judge(tc.conditions, since)
		if r.Verdict != tc.verdict || r.Ready != tc.ready {
			t.Errorf("%s: %+v", tc.name, r)
		}
	}
}

// TestPageEscapes: what a node calls itself is text.
func TestPageEscapes(t *testing.T) {
	evil := `"><script>alert(1)</script>`
	n := row{Instance: evil, Name: evil, Zone: evil, Verdict: evil}
	p := page{Nodes: []row{n}, Selected: &n, Ranges: []string{"15m"}, Problem: evil, Launch: []launch{{Name: evil}}, Charts: []chart{
		draw(evil, plain, false, func(map[string]string) string { return evil }, []Series{{Values: []float64{1, 2}}}, from, to),
	}}
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, p); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(b.String(), "<script") || strings.Contains(b.String(), "ZgotmplZ") {
		t.Errorf("not escaped:\n%s", &b)
	}
}

func TestPoint(t *testing.T) {
	var p point
	if err := p.UnmarshalJSON([]byte(`[1767225600.123, "4.5"]`)); err != nil || p.value != 4.5 || p.at().UnixMilli() != 1767225600123 {
		t.Errorf("%+v, %v", p, err)
	}
	for _, bad := range []string{`[1]`, `[1, "x"]`, `["1", "1"]`, `{}`, ``} {
		if err := new(point).UnmarshalJSON([]byte(bad)); err == nil {
			t.Errorf("%s was read", bad)
		}
	}
}
