package kube

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

const nodeName = "10.0.0.5"

// apiserver serves one Node; what the watch sends comes from the test.
type apiserver struct {
	*httptest.Server
	ca *authority

	mu      sync.Mutex // guards the rest
	items   string     // of the list
	deny    string     // a Status with which everything is answered
	serials []string   // of the client certificates seen
	lists   int
	onPatch http.HandlerFunc

	events chan string // "" ends the watch
}

func newAPIServer(t *testing.T) *apiserver {
	t.Helper()
	s := &apiserver{ca: newAuthority(t), events: make(chan string)}
	s.Server = httptest.NewUnstartedServer(s)
	pair := s.ca.issue(t, "kube-apiserver", 7, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	serving, err := tls.X509KeyPair(pair, pair)
	if err != nil {
		t.Fatal(err)
	}
	s.TLS = &tls.Config{Certificates: []tls.Certificate{serving}, ClientAuth: tls.RequireAnyClientCert}
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *apiserver) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.serials = append(s.serials, r.TLS.PeerCertificates[0].SerialNumber.String())
	deny, items, patch := s.deny, s.items, s.onPatch
	q := r.URL.Query()
	if q.Get("watch") == "" {
		s.lists++
	}
	s.mu.Unlock()
	switch {
	case r.Method == http.MethodPatch && patch != nil:
		patch(w, r)
	case r.ProtoMajor != 2 || r.URL.Path != nodesPath || q.Get("fieldSelector") != "metadata.name="+nodeName:
		http.Error(w, "unexpected request "+r.Proto+" "+r.URL.String(), http.StatusBadRequest)
	case deny != "":
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, deny)
	case q.Get("watch") == "":
		fmt.Fprintf(w, `{"kind":"NodeList","metadata":{"resourceVersion":"41"},"items":[%s]}`, items)
	default:
		if q.Get("resourceVersion") != "41" || q.Get("timeoutSeconds") == "" {
			http.Error(w, "unexpected watch "+r.URL.String(), http.StatusBadRequest)
			return
		}
		w.(http.Flusher).Flush()
		for {
			select {
			case e := <-s.events:
				if e == "" {
					return
				}
				fmt.Fprintln(w, e)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}
}

func (s *apiserver) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func nodeJSON(conditions string) string {
	return fmt.Sprintf(`{"metadata":{"name":%q,"resourceVersion":"42"},"spec":{"podCIDR":"x"},"status":{"images":[{}],"conditions":[%s]}}`, nodeName, conditions)
}

func event(kind, object string) string { return fmt.Sprintf(`{"type":%q,"object":%s}`, kind, object) }

// follower runs Watch and collects its wakes.
type follower struct {
	*Ready
	woken chan struct{}
	ended chan error
}

func follow(t *testing.T, s *apiserver, cert string) *follower {
	t.Helper()
	c, err := New(strings.Replace(s.URL, "127.0.0.1", "localhost", 1), s.ca.pem(), cert)
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{NewReady(c, nodeName), make(chan struct{}, 100), make(chan error, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { f.ended <- f.Watch(ctx, func() { f.woken <- struct{}{} }) }()
	t.Cleanup(func() { cancel(); <-f.ended; c.Close() })
	return f
}

// expect waits for a wake and compares what Plan then says.
func (f *follower) expect(t *testing.T, want string) {
	t.Helper()
	select {
	case <-f.woken:
	case <-time.After(time.Minute):
		t.Fatalf("not woken for %q; the plan says %q", want, f.plan(t))
	}
	if got := f.plan(t); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func (f *follower) plan(t *testing.T) string {
	t.Helper()
	p, err := f.Plan(t.Context())
	if !p.Empty() {
		t.Errorf("it plans changes: %v", p)
	}
	if err == nil {
		return "ready"
	}
	return fmt.Sprintf("%s %s: %v", node.ClassOf(err), node.ReasonOf(err, "-"), err)
}

func TestReady(t *testing.T) {
	s := newAPIServer(t)
	cert := filepath.Join(t.TempDir(), "pki", "current.pem")
	f := follow(t, s, cert)
	if got := f.plan(t); got != "waiting NotObservedYet: the API server has not been asked for Node 10.0.0.5 yet" {
		t.Error(got)
	}
	valid := func(serial int64) []byte {
		return s.ca.issue(t, "system:node:"+nodeName, serial, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	}
	if err := os.Mkdir(filepath.Dir(cert), 0o700); err != nil {
		t.Fatal(err)
	}
	pem := valid(100)
	if err := errors.Join(os.WriteFile(cert+".new", pem, 0o600), os.Rename(cert+".new", cert)); err != nil {
		t.Fatal(err)
	}
	f.expect(t, "waiting NotRegistered: kubelet has not registered Node 10.0.0.5 yet")
	s.events <- event("ADDED", nodeJSON(""))
	f.expect(t, "waiting NotReported: Node 10.0.0.5 is not Ready: kubelet has not reported its condition yet")
	const cni = `{"type":"Ready","status":"False","reason":"KubeletNotReady","message":"cni plugin not initialized"}`
	s.events <- event("MODIFIED", nodeJSON(`{"type":"DiskPressure","status":"False"},`+cni))
	f.expect(t, "waiting KubeletNotReady: Node 10.0.0.5 is not Ready: cni plugin not initialized")
	s.events <- event("MODIFIED", nodeJSON(cni+`,{"type":"PIDPressure","status":"False","lastHeartbeatTime":"x"}`))
	s.events <- event("BOOKMARK", nodeJSON(""))
	const up = `{"type":"Ready","status":"True","reason":"KubeletReady","message":"kubelet is posting ready status"}`
	s.events <- event("MODIFIED", nodeJSON(up))
	f.expect(t, "ready")
	if n := len(f.woken); n != 0 {
		t.Errorf("woken %d times by heartbeats", n)
	}
	// The history is gone: list again. The certificate has been rotated meanwhile.
	s.set(func() {
		s.items = nodeJSON(`{"type":"Ready","status":"Unknown","reason":"NodeStatusUnknown","message":"Kubelet stopped posting node status."}`)
	})
	pem = valid(101)
	if err := errors.Join(os.WriteFile(cert+".new", pem, 0o600), os.Rename(cert+".new", cert)); err != nil {
		t.Fatal(err)
	}
	s.events <- event("ERROR", `{"kind":"Status","code":410,"reason":"Expired","message":"too old resource version"}`)
	f.expect(t, "waiting NodeStatusUnknown: Node 10.0.0.5 is not Ready: Kubelet stopped posting node status.")
	s.events <- event("DELETED", nodeJSON(up))
	f.expect(t, "waiting NotRegistered: kubelet has not registered Node 10.0.0.5 yet")
	s.set(func() {
		if s.lists != 2 || s.serials[0] != "100" || s.serials[len(s.serials)-1] != "101" {
			t.Errorf("%d lists, certificates %v", s.lists, s.serials)
		}
	})
	s.events <- "" // the server ends the watch much too early
	f.expect(t, "waiting APIServerUnreachable: ask the API server for Node 10.0.0.5: the API server ended the watch at once")
}

func TestRefusals(t *testing.T) {
	s := newAPIServer(t)
	cert := filepath.Join(t.TempDir(), "current.pem")
	write(t, cert, s.ca.issue(t, "system:node:"+nodeName, 9, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)))
	s.set(func() {
		s.deny = `{"kind":"Status","code":403,"reason":"Forbidden","message":"nodes is forbidden: User \"x\" cannot list"}`
	})
	follow(t, s, cert).expect(t, `waiting APIServerRefuses: ask the API server for Node 10.0.0.5: GET /api/v1/nodes: 403 Forbidden: nodes is forbidden: User "x" cannot list`)
	s.set(func() { s.deny = "<html>" })
	follow(t, s, cert).expect(t, "waiting APIServerRefuses: ask the API server for Node 10.0.0.5: GET /api/v1/nodes: 403 Forbidden")
	s.set(func() { s.deny, s.items = "", `{"metadata":` })
	f := follow(t, s, cert)
	<-f.woken
	if got := f.plan(t); !strings.Contains(got, "decode list of Nodes") {
		t.Error(got)
	}
	s.ca = newAuthority(t) // a server that is not the cluster's
	f = follow(t, s, cert)
	<-f.woken
	if got := f.plan(t); !strings.Contains(got, "certificate signed by unknown authority") {
		t.Error(got)
	}
}

func TestNewRefuses(t *testing.T) {
	ca := newAuthority(t).pem()
	for _, bad := range []string{"", "http://10.0.0.10:6443", "10.0.0.10:6443", "https://", "https://%zz"} {
		if _, err := New(bad, ca, "cert"); err == nil {
			t.Errorf("endpoint %q was accepted", bad)
		}
	}
	if _, err := New("https://10.0.0.10:6443", []byte("x"), "cert"); err == nil {
		t.Error("a CA without a certificate was accepted")
	}
}

func FuzzEvent(f *testing.F) {
	f.Add([]byte(event("MODIFIED", nodeJSON(`{"type":"Ready","status":"True"}`))))
	f.Add([]byte(`{"type":"ERROR","object":{"code":410}}`))
	f.Fuzz(func(t *testing.T, line []byte) {
		r := NewReady(nil, nodeName)
		woken := false
		err := r.event(line, func() { woken = true })
		if err != nil && woken {
			t.Error("an event that is refused woke")
		}
	})
}
