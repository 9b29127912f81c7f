// Package bench measures the shipped node image in the lab against the best that
// somebody else has, pair by pair in one run, so that both see the same machine in
// the same state. Each measurement returns figures; nothing here judges them.
//
// It is no profiler and no load generator, and keeps no history.
package bench

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
)

// Figure is one measured number, as it is printed: one JSON object a line.
type Figure struct {
	Name     string   `json:"name"`
	Unit     string   `json:"unit"`
	Start    *float64 `json:"start,omitempty"` // of a step, since power-on
	Ours     float64  `json:"ours"`
	Peer     float64  `json:"peer,omitzero"`
	PeerName string   `json:"peer_name,omitempty"`
	Ratio    float64  `json:"ratio,omitzero"`
	Runs     int      `json:"runs,omitzero"`
}

// Progress is told how a measurement goes.
type Progress interface {
	Begin(step string)
	End(step string, err error)
	Say(format string, args ...any)
}

// Pair is what ours and the peer took, one after the other.
type Pair struct{ Ours, Peer float64 }

// compare returns the medians of the pairs. The ratio is the median of the pairs'
// own ratios: a machine that is slow for a while is slow for both of a pair.
func compare(name, unit, peer string, pairs []Pair) Figure {
	of := func(value func(Pair) float64) float64 {
		values := make([]float64, len(pairs))
		for i, p := range pairs {
			values[i] = value(p)
		}
		return round(median(values))
	}
	return Figure{
		Name: name, Unit: unit, PeerName: peer, Runs: len(pairs),
		Ours:  of(func(p Pair) float64 { return p.Ours }),
		Peer:  of(func(p Pair) float64 { return p.Peer }),
		Ratio: of(func(p Pair) float64 { return p.Ours / p.Peer }),
	}
}

// median of at least one value.
func median(values []float64) float64 {
	v := slices.Sorted(slices.Values(values))
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// percentile of at least one value: the smallest that so many percent do not exceed.
func percentile(values []float64, percent int) float64 {
	v := slices.Sorted(slices.Values(values))
	return v[max((len(v)*percent+99)/100-1, 0)]
}

// round keeps as many decimals as mean anything.
func round(v float64) float64 { return math.Round(v*1000) / 1000 }

// Table writes figures for people.
func Table(figures []Figure) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "figure\tours\tpeer\tratio\tunit\truns")
	for _, f := range figures {
		peer, ratio := "", ""
		if f.PeerName != "" {
			peer, ratio = fmt.Sprint(f.Peer), fmt.Sprintf("%.2f", f.Ratio)
		}
		fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%s\t%d\n", f.Name, f.Ours, peer, ratio, f.Unit, f.Runs)
	}
	w.Flush() // into memory
	return b.String()
}
