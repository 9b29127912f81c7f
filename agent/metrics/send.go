package metrics

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"
)

const (
	// maxPending bounds the bodies that wait in memory: two hours of a usual
	// node's at the default interval. The oldest are given up first.
	maxPending  = 8 << 20
	sendTimeout = 20 * time.Second
	backoffMin  = time.Second
	backoffMax  = time.Minute
	// maxRetryAfter bounds what an endpoint may ask for, so that a mistake of its
	// does not silence a node for a day.
	maxRetryAfter = 10 * time.Minute
	maxReply      = 1 << 10 // as much of a refusal as is worth logging
)

// sender sends bodies in order, one at a time.
type sender struct {
	log    *slog.Logger
	url    *url.URL
	client *http.Client
	own    *ownMetrics
	wake   chan struct{}
	limit  int // maxPending; tests set less

	mu      sync.Mutex // guards the rest
	queue   []body     // the oldest first
	pending int        // bytes in queue
}

func newTransport() *http.Transport {
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
		TLSHandshakeTimeout: 5 * time.Second,
		MaxIdleConns:        1,
		IdleConnTimeout:     2 * time.Minute,
	}
}

func newSender(endpoint string, transport http.RoundTripper, log *slog.Logger, own *ownMetrics) (*sender, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, fmt.Errorf("read metrics.endpoint: %w", err)
	}
	return &sender{
		log:   log,
		url:   u,
		own:   own,
		wake:  make(chan struct{}, 1),
		limit: maxPending,
		client: &http.Client{
			Transport: transport,
			Timeout:   sendTimeout,
			// A POST that was redirected would arrive as a GET.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}, nil
}

// enqueue gives b to the sender and makes room for it.
func (s *sender) enqueue(b body) {
	s.mu.Lock()
	s.queue = append(s.queue, b)
	s.pending += len(b.data)
	lost := 0
	for s.pending > s.limit && len(s.queue) > 1 {
		lost += s.queue[0].samples
		s.shift()
	}
	s.own.pending.Set(float64(s.pending))
	s.mu.Unlock()
	if lost > 0 {
		s.own.dropped.WithLabelValues("queue full").Add(float64(lost))
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// shift removes the oldest body. Its place is cleared, since the array lives on
// beneath the queue. The caller holds mu.
func (s *sender) shift() {
	s.pending -= len(s.queue[0].data)
	s.queue[0] = body{}
	s.queue = s.queue[1:]
}

// take returns the oldest body and leaves it in the queue.
func (s *sender) take() (body, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return body{}, false
	}
	return s.queue[0], true
}

// drop takes b out of the queue, unless it had to make room meanwhile.
func (s *sender) drop(b body) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) > 0 && &s.queue[0].data[0] == &b.data[0] {
		s.shift()
		s.own.pending.Set(float64(s.pending))
	}
}

// run sends until ctx ends.
func (s *sender) run(ctx context.Context) {
	failures := 0
	var down time.Time // since when the endpoint takes nothing; zero: it does
	for ctx.Err() == nil {
		b, ok := s.take()
		if !ok {
			select {
			case <-ctx.Done():
			case <-s.wake:
			}
			continue
		}
		v := s.send(ctx, b)
		if ctx.Err() != nil {
			return
		}
		if v.retry {
			if failures++; failures == 1 {
				down = time.Now()
				s.log.Warn("metrics wait: the endpoint does not take them", "endpoint", s.url.Redacted(), "err", v.err)
			}
			sleep(ctx, max(v.after, backoff(failures)))
			continue
		}
		if failures > 0 {
			s.log.Info("the endpoint takes metrics again", "after", time.Since(down).Round(time.Second))
			failures = 0
		}
		s.drop(b)
		if v.err != nil {
			s.own.dropped.WithLabelValues("refused").Add(float64(b.samples))
			s.log.Warn("the endpoint refused metrics", "endpoint", s.url.Redacted(), "samples", b.samples, "err", v.err)
			continue
		}
		s.own.samples.Add(float64(b.samples))
		s.own.bytes.Add(float64(len(b.data)))
	}
}

// outcome is what became of one request.
type outcome struct {
	err   error // nil: taken
	retry bool
	after time.Duration // the endpoint's wish
}

func (s *sender) send(ctx context.Context, b body) outcome {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url.String(), bytes.NewReader(b.data))
	if err != nil {
		return outcome{err: err}
	}
	req.Header.Set("Content-Encoding", "snappy")
	req.Header.Set("Content-Type", "application/x-protobuf")
	req.Header.Set("User-Agent", "tkenode")
	req.Header.Set("X-Prometheus-Remote-Write-Version", "0.1.0")
	resp, err := s.client.Do(req)
	if err != nil {
		s.own.requests.WithLabelValues("error").Inc()
		return outcome{err: err, retry: true}
	}
	defer resp.Body.Close()
	reply, _ := io.ReadAll(io.LimitReader(resp.Body, maxReply)) // the code alone decides
	s.own.requests.WithLabelValues(strconv.Itoa(resp.StatusCode)).Inc()
	if resp.StatusCode/100 == 2 {
		return outcome{}
	}
	return outcome{
		err:   fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(reply)),
		retry: retried(resp.StatusCode),
		after: retryAfter(resp.Header.Get("Retry-After"), time.Now()),
	}
}

// retried says what is worth sending again: what went wrong at the endpoint, and,
// other than the specification has it, a refused credential, for that is put
// right without the samples being at fault.
func retried(code int) bool {
	return code/100 == 5 || code == http.StatusTooManyRequests ||
		code == http.StatusUnauthorized || code == http.StatusForbidden
}

// retryAfter reads the header of that name: seconds, or a date.
func retryAfter(header string, now time.Time) time.Duration {
	d := time.Duration(0)
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		d = time.Duration(seconds) * time.Second
	} else if at, err := http.ParseTime(header); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}

// backoff doubles up to its limit, with full jitter, so that a fleet whose
// endpoint was away does not come back as one.
func backoff(failures int) time.Duration {
	d := backoffMax
	if failures < 7 { // 1s << 6 exceeds the limit
		d = min(backoffMin<<(failures-1), backoffMax)
	}
	return backoffMin/2 + rand.N(d)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
