package metrics

import (
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/s2"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protowire"
)

// The fields of remote write 1.0.
// Source: https://prometheus.io/docs/specs/prw/remote_write_spec/
const (
	requestTimeseries = 1
	seriesLabels      = 1
	seriesSamples     = 2
	labelName         = 1
	labelValue        = 2
	sampleValue       = 1
	sampleTimestamp   = 2
)

// staleNaN marks the end of a series (same source).
const staleNaN = 0x7ff0000000000002

// maxSamples is how many samples go into one request, as Prometheus has it.
const maxSamples = 2000

// body is the body of one request.
type body struct {
	data    []byte // snappy, block format
	samples int
}

// encoder turns what is collected into request bodies. A series is known by its
// encoded labels.
type encoder struct {
	external []label // sorted
	before   map[string]struct{}
	raw      []byte // of the request being written
	scratch  []byte
	samples  int
	done     []body
}

type label struct{ name, value string }

func newEncoder(external map[string]string) *encoder {
	e := &encoder{}
	for name, value := range external {
		e.external = append(e.external, label{name, value})
	}
	slices.SortFunc(e.external, func(a, b label) int { return strings.Compare(a.name, b.name) })
	return e
}

// encode returns the bodies that carry families, and the end of every series that
// was there the last time and is no longer.
func (e *encoder) encode(families []*dto.MetricFamily, at time.Time) []body {
	e.done = nil
	seen := make(map[string]struct{}, len(e.before))
	millis := at.UnixMilli()
	for _, f := range families {
		for _, m := range f.Metric {
			flatten(f, m, func(suffix string, extra *label, value float64) {
				key := e.series(f.GetName()+suffix, m.Label, extra)
				if _, twice := seen[key]; twice {
					return // two samples of one series at one time are an error to every receiver
				}
				seen[key] = struct{}{}
				e.add(key, math.Float64bits(value), millis)
			})
		}
	}
	for key := range e.before {
		if _, still := seen[key]; !still {
			e.add(key, staleNaN, millis)
		}
	}
	e.before = seen
	e.flush()
	return e.done
}

// flatten calls f with each sample of a metric: histograms and summaries are
// several series.
func flatten(family *dto.MetricFamily, m *dto.Metric, f func(suffix string, extra *label, value float64)) {
	switch family.GetType() {
	case dto.MetricType_COUNTER:
		f("", nil, m.GetCounter().GetValue())
	case dto.MetricType_GAUGE:
		f("", nil, m.GetGauge().GetValue())
	case dto.MetricType_UNTYPED:
		f("", nil, m.GetUntyped().GetValue())
	case dto.MetricType_SUMMARY:
		s := m.GetSummary()
		for _, q := range s.GetQuantile() {
			f("", &label{"quantile", number(q.GetQuantile())}, q.GetValue())
		}
		f("_sum", nil, s.GetSampleSum())
		f("_count", nil, float64(s.GetSampleCount()))
	case dto.MetricType_HISTOGRAM, dto.MetricType_GAUGE_HISTOGRAM:
		h := m.GetHistogram()
		for _, b := range h.GetBucket() {
			if !math.IsInf(b.GetUpperBound(), 1) {
				f("_bucket", &label{"le", number(b.GetUpperBound())}, float64(b.GetCumulativeCount()))
			}
		}
		f("_bucket", &label{"le", "+Inf"}, float64(h.GetSampleCount()))
		f("_sum", nil, h.GetSampleSum())
		f("_count", nil, float64(h.GetSampleCount()))
	}
}

func number(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }

// series returns the encoded labels of a series, sorted by name. A label of the
// metric's own goes before an external one of the same name.
func (e *encoder) series(name string, own []*dto.LabelPair, extra *label) string {
	all := make([]label, 0, len(own)+len(e.external)+2)
	all = append(all, label{"__name__", name})
	for _, l := range own {
		all = append(all, label{l.GetName(), l.GetValue()})
	}
	if extra != nil {
		all = append(all, *extra)
	}
	all = append(all, e.external...)
	slices.SortStableFunc(all, func(a, b label) int { return strings.Compare(a.name, b.name) })
	all = slices.CompactFunc(all, func(a, b label) bool { return a.name == b.name })
	e.scratch = e.scratch[:0]
	for _, l := range all {
		if l.value == "" {
			continue // the same as no label, and not allowed in a request
		}
		size := protowire.SizeTag(labelName) + protowire.SizeBytes(len(l.name)) + protowire.SizeTag(labelValue) + protowire.SizeBytes(len(l.value))
		b := protowire.AppendTag(e.scratch, seriesLabels, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(size))
		b = protowire.AppendTag(b, labelName, protowire.BytesType)
		b = protowire.AppendString(b, l.name)
		b = protowire.AppendTag(b, labelValue, protowire.BytesType)
		e.scratch = protowire.AppendString(b, l.value)
	}
	return string(e.scratch)
}

// add writes one series with one sample.
func (e *encoder) add(labels string, value uint64, millis int64) {
	sample := protowire.SizeTag(sampleValue) + protowire.SizeFixed64() + protowire.SizeTag(sampleTimestamp) + protowire.SizeVarint(uint64(millis))
	series := len(labels) + protowire.SizeTag(seriesSamples) + protowire.SizeBytes(sample)
	b := protowire.AppendTag(e.raw, requestTimeseries, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(series))
	b = append(b, labels...)
	b = protowire.AppendTag(b, seriesSamples, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(sample))
	b = protowire.AppendTag(b, sampleValue, protowire.Fixed64Type)
	b = protowire.AppendFixed64(b, value)
	b = protowire.AppendTag(b, sampleTimestamp, protowire.VarintType)
	e.raw = protowire.AppendVarint(b, uint64(millis))
	if e.samples++; e.samples == maxSamples {
		e.flush()
	}
}

// flush ends the request being written.
func (e *encoder) flush() {
	if e.samples > 0 {
		e.done = append(e.done, body{data: s2.EncodeSnappyBetter(nil, e.raw), samples: e.samples})
	}
	e.raw, e.samples = e.raw[:0], 0
}
