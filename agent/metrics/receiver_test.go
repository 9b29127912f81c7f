package metrics

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/klauspost/compress/snappy"
	"google.golang.org/protobuf/encoding/protowire"
)

// sample is one sample as a receiver reads it.
type sample struct {
	labels string // {a="b",c="d"}
	value  float64
	millis int64
}

// decode reads a request body as strictly as the specification allows a receiver
// to: https://prometheus.io/docs/specs/prw/remote_write_spec/
func decode(compressed []byte) ([]sample, error) {
	raw, err := snappy.Decode(nil, compressed)
	if err != nil {
		return nil, err
	}
	var out []sample
	seen := map[string]bool{}
	err = fields(raw, map[protowire.Number]func([]byte) error{
		requestTimeseries: func(b []byte) error {
			s, err := decodeSeries(b)
			if err != nil {
				return err
			}
			if seen[s.labels] {
				return fmt.Errorf("%s twice in one request", s.labels)
			}
			seen[s.labels] = true
			out = append(out, s)
			return nil
		},
	})
	return out, err
}

func decodeSeries(b []byte) (sample, error) {
	var s sample
	var names, values []string
	samples := 0
	err := fields(b, map[protowire.Number]func([]byte) error{
		seriesLabels: func(b []byte) error {
			var name, value string
			err := fields(b, map[protowire.Number]func([]byte) error{
				labelName:  func(b []byte) error { name = string(b); return nil },
				labelValue: func(b []byte) error { value = string(b); return nil },
			})
			if name == "" || value == "" || !utf8.ValidString(name) || !utf8.ValidString(value) {
				return fmt.Errorf("label %q=%q", name, value)
			}
			names, values = append(names, name), append(values, value)
			return err
		},
		seriesSamples: func(b []byte) error {
			samples++
			v, n := protowire.ConsumeFixed64(b[1:])
			if b[0] != sampleValue<<3|byte(protowire.Fixed64Type) || n < 0 {
				return fmt.Errorf("sample %x", b)
			}
			b = b[1+n:]
			ms, n := protowire.ConsumeVarint(b[1:])
			if b[0] != sampleTimestamp<<3 || n < 0 || len(b) != 1+n {
				return fmt.Errorf("timestamp %x", b)
			}
			s.value, s.millis = math.Float64frombits(v), int64(ms)
			return nil
		},
	})
	var text []string
	for i, n := range names {
		text = append(text, fmt.Sprintf("%s=%q", n, values[i]))
	}
	s.labels = "{" + strings.Join(text, ",") + "}"
	switch {
	case err != nil:
		return s, err
	case samples != 1:
		return s, fmt.Errorf("%s has %d samples", s.labels, samples)
	case !slices.IsSorted(names) || len(slices.Compact(slices.Clone(names))) != len(names):
		return s, fmt.Errorf("labels %v are not sorted, or twice there", names)
	case !slices.Contains(names, "__name__"):
		return s, fmt.Errorf("%s has no name", s.labels)
	}
	return s, nil
}

// fields calls the function of each length-delimited field; any other is an error.
func fields(b []byte, want map[protowire.Number]func([]byte) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 || typ != protowire.BytesType || want[num] == nil {
			return fmt.Errorf("field %d of type %d", num, typ)
		}
		b = b[n:]
		v, n := protowire.ConsumeBytes(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		if err := want[num](v); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// receiver is an endpoint in memory. It answers with codes one after another and
// then 204, and keeps what it took.
type receiver struct {
	mu    sync.Mutex
	codes []string // "503", "429 Retry-After=7", "refuse"
	times []int64  // of every attempt, in ms
	took  []sample
	wrong []error
}

func (r *receiver) RoundTrip(req *http.Request) (*http.Response, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.times = append(r.times, nowMillis())
	for name, want := range map[string]string{
		"Content-Encoding": "snappy", "Content-Type": "application/x-protobuf",
		"X-Prometheus-Remote-Write-Version": "0.1.0",
	} {
		if got := req.Header.Get(name); got != want {
			r.wrong = append(r.wrong, fmt.Errorf("%s: %q", name, got))
		}
	}
	if !strings.HasPrefix(req.Header.Get("User-Agent"), "tkenode") || req.Method != http.MethodPost {
		r.wrong = append(r.wrong, fmt.Errorf("%s by %q", req.Method, req.Header.Get("User-Agent")))
	}
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	samples, err := decode(body)
	if err != nil {
		r.wrong = append(r.wrong, err)
	}
	code, header := 204, http.Header{}
	if len(r.codes) > 0 {
		first, rest, _ := strings.Cut(r.codes[0], " ")
		r.codes = r.codes[1:]
		if first == "refuse" {
			return nil, fmt.Errorf("connection refused")
		}
		if _, err := fmt.Sscan(first, &code); err != nil {
			return nil, err
		}
		if name, value, ok := strings.Cut(rest, "="); ok {
			header.Set(name, value)
		}
	}
	if code/100 == 2 {
		r.took = append(r.took, samples...)
	}
	return &http.Response{
		StatusCode: code, Status: fmt.Sprintf("%d %s", code, http.StatusText(code)), Header: header,
		Body: io.NopCloser(bytes.NewReader([]byte("because"))), Request: req,
	}, nil
}
