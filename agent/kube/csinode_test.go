package kube

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const cbs = "com.tencent.cloud.csi.cbs"

// cluster is one CSINode and one Node on an API server, changed only by its own
// handlers, which run one after another.
type cluster struct {
	version   int
	count     string            // JSON of allocatable; empty: the driver is not registered
	notes     map[string]string // annotations
	attached  string            // JSON of volumesAttached
	immutable bool
	patches   []string
	before    func() // runs before a patch is looked at
}

func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	refuse := func(code int, message string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","code":%d,"message":%q}`, code, message)
	}
	switch r.Method + " " + r.URL.Path {
	case "GET /apis/storage.k8s.io/v1/csinodes/" + nodeName:
		notes, _ := json.Marshal(c.notes)
		drivers := `{"name":"other.csi","allocatable":{"count":7}}`
		if c.count != "" {
			drivers += fmt.Sprintf(`,{"name":%q,"nodeID":"ins-1","allocatable":%s}`, cbs, c.count)
		}
		fmt.Fprintf(w, `{"metadata":{"resourceVersion":"%d","annotations":%s},"spec":{"drivers":[%s]}}`, c.version, notes, drivers)
	case "GET /api/v1/nodes/" + nodeName:
		fmt.Fprintf(w, `{"status":{"volumesInUse":["kubernetes.io/csi/other.csi^x"],"volumesAttached":[%s]}}`, c.attached)
	case "PATCH /apis/storage.k8s.io/v1/csinodes/" + nodeName:
		if c.before != nil {
			c.before()
		}
		var p struct {
			Metadata struct {
				ResourceVersion string
				Annotations     map[string]string
			}
			Spec struct {
				Drivers []struct {
					Name        string
					Allocatable json.RawMessage
				}
			}
		}
		b, _ := io.ReadAll(r.Body)
		switch {
		case r.Header.Get("Content-Type") != "application/strategic-merge-patch+json" || json.Unmarshal(b, &p) != nil || len(p.Spec.Drivers) != 1 || p.Spec.Drivers[0].Name != cbs:
			refuse(400, "unexpected patch "+string(b))
		case p.Metadata.ResourceVersion != fmt.Sprint(c.version):
			refuse(409, "the object has been modified")
		case c.immutable:
			refuse(422, `CSINode.storage.k8s.io "10.0.0.5" is invalid: spec.drivers: field is immutable`)
		default:
			c.version++
			c.patches = append(c.patches, string(p.Spec.Drivers[0].Allocatable))
			c.count, c.notes = string(p.Spec.Drivers[0].Allocatable), p.Metadata.Annotations
			fmt.Fprint(w, "{}")
		}
	default:
		refuse(404, "not found: "+r.URL.Path)
	}
}

// newCSINodeOf returns a CSINode of an instance that takes max disks, of which
// notCSI returns those that are not the driver's.
func newCSINodeOf(t *testing.T, c *cluster, max func() (int, error), notCSI func(volumes []string) []string) *CSINode {
	t.Helper()
	ca := newAuthority(t)
	s := httptest.NewUnstartedServer(c)
	pair := ca.issue(t, "kube-apiserver", 7, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
	serving, err := tls.X509KeyPair(pair, pair)
	if err != nil {
		t.Fatal(err)
	}
	s.TLS = &tls.Config{Certificates: []tls.Certificate{serving}, ClientAuth: tls.RequireAnyClientCert}
	s.StartTLS()
	t.Cleanup(s.Close)
	cert := filepath.Join(t.TempDir(), "current.pem")
	write(t, cert, ca.issue(t, "system:node:"+nodeName, 9, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)))
	client, err := New(strings.Replace(s.URL, "127.0.0.1", "localhost", 1), ca.pem(), cert)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return NewCSINode(client, nodeName, cbs, func(context.Context) (int, error) { return max() },
		func(volumes []string) ([]string, <-chan struct{}, bool) { return notCSI(volumes), nil, true }, slog.New(slog.DiscardHandler))
}

func twenty() (int, error) { return 20, nil }

func TestCSINode(t *testing.T) {
	c := &cluster{version: 5, attached: `{"name":"kubernetes.io/csi/` + cbs + `^disk-csi00001"}`}
	ids := []string{"disk-a", "disk-b", "disk-c", "disk-d"}
	n := newCSINodeOf(t, c, twenty, func(volumes []string) []string {
		if len(volumes) > 0 && (len(volumes) != 1 || volumes[0] != "disk-csi00001") {
			t.Errorf("the cluster's volumes: %v", volumes)
		}
		return ids
	})
	step := func(why string, published, driver, patches int, message string) {
		t.Helper()
		n.step(t.Context())
		l := n.Limit()
		if l.Published != published || l.Driver != driver || len(c.patches) != patches || message == "" != (l.Message == "") || !strings.Contains(l.Message, message) {
			t.Errorf("%s: %+v, patches %v", why, l, c.patches)
		}
	}
	step("without a driver", 0, 0, 0, "not registered")
	c.count = `{"count":18}`
	step("four are not the driver's", 16, 18, 1, "")
	step("once more", 16, 18, 1, "")
	ids = ids[:1]
	step("three are detached: not above what the driver has published", 18, 18, 2, "")
	ids = []string{"disk-a", "disk-b", "disk-c"}
	step("two are attached", 17, 18, 3, "")
	c.count = `{"count":18}` // the driver has registered anew; annotations stay
	step("the driver publishes again", 17, 18, 4, "")
	c.count = `{"count":10}`
	step("the driver publishes less", 10, 10, 4, "")
	ids = make([]string, 25)
	step("more than there can be", 0, 10, 5, "")
	c.count, c.notes = `{}`, nil
	step("a driver without a limit", 0, 0, 5, "not registered")
	c.count, ids = `{"count":18}`, []string{"disk-a", "disk-b", "disk-c"}
	c.before = func() { c.version++; c.before = nil }
	step("changed meanwhile", 18, 18, 5, "modified")
	step("and then not", 17, 18, 6, "")
	if c.notes[publishedNote] != "18" || c.notes[limitNote] != "17" {
		t.Errorf("annotations %v", c.notes)
	}
}

// TestCSINodeOfOldServer: a server that does not let the count be changed is asked
// once a day, and told of once.
func TestCSINodeOfOldServer(t *testing.T) {
	c := &cluster{version: 5, count: `{"count":18}`, immutable: true}
	n := newCSINodeOf(t, c, twenty, func([]string) []string { return make([]string, 5) })
	var log strings.Builder
	n.log = slog.New(slog.NewTextHandler(&log, nil))
	for range 3 {
		if wait, _ := n.step(t.Context()); wait != refusedPeriod {
			t.Errorf("asked again after %s", wait)
		}
	}
	if l := n.Limit(); l.Published != 18 || !strings.Contains(l.Message, "Kubernetes 1.35") || !strings.Contains(l.Message, "immutable") {
		t.Errorf("%+v", l)
	}
	if strings.Count(log.String(), "\n") != 1 {
		t.Errorf("log:\n%s", &log)
	}
}

// TestCSINodeWithoutTheCloud: what the cloud does not tell is not made up, and what
// it has told holds.
func TestCSINodeWithoutTheCloud(t *testing.T) {
	c := &cluster{version: 5, count: `{"count":18}`}
	fail := errors.New("AuthFailure.UnauthorizedOperation")
	asked := 0
	n := newCSINodeOf(t, c, func() (int, error) { asked++; return 20, fail }, func([]string) []string { return make([]string, 5) })
	var waits []time.Duration
	for range 12 {
		wait, _ := n.step(t.Context())
		waits = append(waits, wait)
	}
	if l := n.Limit(); len(c.patches) > 0 || !strings.Contains(l.Message, "AuthFailure") || waits[0] != limitRetry || waits[11] != limitPeriod {
		t.Errorf("%+v after waits %v", l, waits)
	}
	fail = nil
	n.step(t.Context())
	asked, fail = 0, errors.New("timeout")
	n.maxAt = time.Now().Add(-2 * mostPeriod)
	n.step(t.Context())
	n.step(t.Context())
	if l := n.Limit(); l.Message != "" || l.Published != 15 || asked != 1 {
		t.Errorf("%+v, asked %d times", l, asked)
	}
}
