package monitor

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// The geometry of a chart, in SVG units.
const (
	chartWidth  = 460
	chartHeight = 150
	plotLeft    = 54
	plotRight   = chartWidth - 8
	plotTop     = 8
	plotBottom  = chartHeight - 20
	lineColors  = 8 // the page has a class .c0 to .c7
)

// unit says how a value is written, and what the scale begins and ends with.
type unit int

const (
	plain unit = iota
	percent
	bytesUnit
	bytesPerSecond
)

// chart is a picture of some series, ready to be drawn.
type chart struct {
	Title string
	Lines []line
	Y     []tick // lines across
	X     []tick // times below
	Empty bool
}

// line is one series of a chart.
type line struct {
	Name  string
	Last  string // its newest value
	Class string // its colour on the page
	Path  string // of an SVG path
}

// tick is a mark on an axis.
type tick struct {
	At   float64
	Text string
}

// draw makes a chart of series over [from, to]. Stacked series are summed up.
func draw(title string, u unit, stacked bool, name func(map[string]string) string, series []Series, from, to time.Time) chart {
	c := chart{Title: title, Empty: len(series) == 0, X: timeTicks(from, to)}
	sums := make([]float64, 0)
	tops := make([][]float64, len(series))
	maximum := 0.0
	for i, s := range series {
		if len(sums) < len(s.Values) {
			sums = append(sums, make([]float64, len(s.Values)-len(sums))...)
		}
		tops[i] = make([]float64, len(s.Values))
		for j, v := range s.Values {
			if stacked && !math.IsNaN(v) {
				sums[j] += v
				v = sums[j]
			}
			tops[i][j] = v
			if v > maximum && !math.IsInf(v, 0) {
				maximum = v
			}
		}
	}
	top := ceiling(maximum, u)
	for i := 0; i <= 2; i++ {
		v := top * float64(i) / 2
		c.Y = append(c.Y, tick{yOf(v, top), format(v, u)})
	}
	for i, s := range series {
		c.Lines = append(c.Lines, line{
			Name:  name(s.Labels),
			Last:  format(last(s.Values), u),
			Class: fmt.Sprintf("c%d", i%lineColors),
			Path:  path(tops[i], top),
		})
	}
	return c
}

// path draws values from left to right and lifts the pen where one is missing.
func path(values []float64, top float64) string {
	var b strings.Builder
	pen := "M"
	for i, v := range values {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			pen = "M"
			continue
		}
		x := plotLeft + float64(plotRight-plotLeft)*float64(i)/float64(max(1, len(values)-1))
		fmt.Fprintf(&b, "%s%.1f %.1f", pen, x, yOf(v, top))
		if pen == "M" {
			b.WriteString("h.1") // a single point is seen, too
		}
		pen = "L"
	}
	return b.String()
}

func yOf(v, top float64) float64 {
	return plotBottom - (plotBottom-plotTop)*min(max(v/top, 0), 1)
}

// ceiling returns a round number that is not below v.
func ceiling(v float64, u unit) float64 {
	if u == percent && v <= 100 {
		if v <= 10 {
			return 10
		}
		return 100
	}
	if v <= 0 {
		return 1
	}
	if u == bytesUnit || u == bytesPerSecond {
		return math.Pow(2, math.Ceil(math.Log2(v)))
	}
	scale := math.Pow(10, math.Floor(math.Log10(v)))
	for _, step := range []float64{1, 2, 5} {
		if scale*step >= v {
			return scale * step
		}
	}
	return scale * 10
}

// format writes a value as people read it.
func format(v float64, u unit) string {
	if math.IsNaN(v) {
		return "–"
	}
	switch u {
	case percent:
		return fmt.Sprintf("%.3g %%", v)
	case bytesUnit:
		return binary(v) + "B"
	case bytesPerSecond:
		return binary(v) + "B/s"
	}
	return fmt.Sprintf("%.4g", v)
}

func binary(v float64) string {
	for _, prefix := range []string{"", "Ki", "Mi", "Gi", "Ti"} {
		if v < 1024 {
			return fmt.Sprintf("%.3g %s", v, prefix)
		}
		v /= 1024
	}
	return fmt.Sprintf("%.3g Pi", v)
}

func last(values []float64) float64 {
	for i := len(values) - 1; i >= 0; i-- {
		if !math.IsNaN(values[i]) {
			return values[i]
		}
	}
	return math.NaN()
}

// timeTicks marks round times.
func timeTicks(from, to time.Time) []tick {
	span := to.Sub(from)
	step := time.Minute
	for _, s := range []time.Duration{2 * time.Minute, 5 * time.Minute, 15 * time.Minute, time.Hour, 3 * time.Hour, 6 * time.Hour} {
		if span/step > 6 {
			step = s
		}
	}
	var out []tick
	for t := from.Truncate(step).Add(step); t.Before(to); t = t.Add(step) {
		x := plotLeft + (plotRight-plotLeft)*float64(t.Sub(from))/float64(span)
		out = append(out, tick{x, t.Format("15:04")})
	}
	return out
}
