package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// fakeAPI returns a cluster whose API server is handler.
func fakeAPI(t *testing.T, handler http.HandlerFunc) *Cluster {
	t.Helper()
	s := httptest.NewTLSServer(handler)
	t.Cleanup(s.Close)
	return &Cluster{address: netip.MustParseAddrPort(s.Listener.Addr().String()), client: s.Client()}
}

func TestRefusals(t *testing.T) {
	c := fakeAPI(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/api/v1/nodes/gone":
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"kind":"Status","code":404,"reason":"NotFound","message":"nodes \"gone\" not found"}`)
		default:
			http.Error(w, "upstream is down", http.StatusBadGateway)
		}
	})
	_, err := c.Node(t.Context(), "gone")
	if !NotFound(err) || err.Error() != `GET /api/v1/nodes/gone: 404 NotFound: nodes "gone" not found` {
		t.Errorf("err = %v", err)
	}
	err = c.Do(t.Context(), http.MethodGet, "/readyz", nil, nil)
	if NotFound(err) || err == nil || err.Error() != "GET /readyz: 502 Bad Gateway: upstream is down" {
		t.Errorf("err = %v", err)
	}
}

func nodeEvent(kind, ready string) string {
	return fmt.Sprintf(`{"type":%q,"object":{"metadata":{"name":"n"},"status":{"conditions":[{"type":"Ready","status":%q,"reason":"R","message":"m"}]}}}`, kind, ready)
}

func TestWaitNodeReadyOutlivesWatches(t *testing.T) {
	watches := [][]string{
		{},
		{nodeEvent("ADDED", "False"), nodeEvent("DELETED", "True")},
		{nodeEvent("ADDED", "False"), nodeEvent("MODIFIED", "True")},
	}
	var n int
	c := fakeAPI(t, func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("fieldSelector") != "metadata.name=n" || r.FormValue("watch") != "1" {
			t.Errorf("query %s", r.URL.RawQuery)
		}
		for _, e := range watches[n] {
			fmt.Fprintln(w, e)
		}
		n++
	})
	got, err := c.WaitNodeReady(t.Context(), "n")
	if err != nil || got.Condition("Ready").Status != "True" || n != 3 {
		t.Errorf("after %d watches: %+v, %v", n, got, err)
	}
}

func TestWaitNodeReadySaysWhyNot(t *testing.T) {
	c := fakeAPI(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, nodeEvent("ADDED", "False"))
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := c.WaitNodeReady(ctx, "n")
	if !errors.Is(err, context.DeadlineExceeded) || !strings.HasSuffix(err.Error(), "; Ready is False: R m") {
		t.Errorf("err = %v", err)
	}
}

func TestWatchReportsErrors(t *testing.T) {
	c := fakeAPI(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, `{"type":"ERROR","object":{"code":410,"message":"too old resource version"}}`)
	})
	if _, err := c.WaitNodeReady(t.Context(), "n"); err == nil || !strings.Contains(err.Error(), "too old resource version") {
		t.Errorf("err = %v", err)
	}
}

func TestWaitPodRunning(t *testing.T) {
	const waiting = `{"type":"ADDED","object":{"status":{"phase":"Pending",
		"conditions":[{"type":"PodScheduled","status":"False","reason":"Unschedulable","message":"no nodes"}],
		"containerStatuses":[{"state":{"waiting":{"reason":"ErrImageNeverPull","message":"not there"}}}]}}}`
	const running = `{"type":"MODIFIED","object":{"spec":{"nodeName":"n"},"status":{"phase":"Running","podIP":"10.0.16.4","containerStatuses":[{"ready":true}]}}}`
	events := []string{waiting, running}
	c := fakeAPI(t, func(w http.ResponseWriter, r *http.Request) {
		for _, e := range events {
			fmt.Fprintln(w, e)
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	p, err := c.WaitPodRunning(t.Context(), "p")
	if err != nil || p.Status.PodIP != netip.MustParseAddr("10.0.16.4") {
		t.Errorf("%+v, %v", p, err)
	}
	events = events[:1]
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err = c.WaitPodRunning(ctx, "p")
	if want := "it is Pending, PodScheduled is False: Unschedulable no nodes, container waits: ErrImageNeverPull not there"; err == nil || !strings.HasSuffix(err.Error(), want) {
		t.Errorf("err = %v, want …%s", err, want)
	}
}

func TestFreeAddress(t *testing.T) {
	a, err := freeAddress(6443)
	if err != nil {
		t.Fatal(err)
	}
	if !netip.MustParsePrefix("127.64.0.0/10").Contains(a.Addr()) || a.Port() != 6443 {
		t.Errorf("address %v", a)
	}
}
