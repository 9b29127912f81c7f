package kube

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// merging is an API server that holds one Node and merges patches into it, as far as
// strategic merge patches of conditions, annotations and unschedulable go.
type merging struct {
	*apiserver
	version int
	node    map[string]any
	said    []string // the patches
}

func (m *merging) patch(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var change map[string]any
	if r.Header.Get("Content-Type") != "application/strategic-merge-patch+json" || json.Unmarshal(body, &change) != nil {
		http.Error(w, "no patch: "+string(body), http.StatusBadRequest)
		return
	}
	m.said = append(m.said, strings.TrimPrefix(r.URL.Path, nodesPath+"/"+nodeName)+" "+string(body))
	if status, ok := change["status"].(map[string]any); ok {
		have := m.node["status"].(map[string]any)
		for _, c := range status["conditions"].([]any) {
			merge(have, c.(map[string]any))
		}
	}
	for _, part := range []string{"metadata", "spec"} {
		for k, v := range asMap(change[part]) {
			if annotations, ok := v.(map[string]any); ok {
				for name, text := range annotations {
					set(asMap(asMap(m.node[part])[k]), name, text)
				}
				continue
			}
			set(asMap(m.node[part]), k, v)
		}
	}
	m.version++
	asMap(m.node["metadata"])["resourceVersion"] = fmt.Sprint(m.version)
	if err := json.NewEncoder(w).Encode(m.node); err != nil {
		panic(err)
	}
}

func asMap(v any) map[string]any { m, _ := v.(map[string]any); return m }

func set(m map[string]any, k string, v any) {
	if v == nil {
		delete(m, k)
		return
	}
	m[k] = v
}

// merge replaces the fields that a condition has of the one of the same type.
func merge(status, change map[string]any) {
	all, _ := status["conditions"].([]any)
	for _, c := range all {
		if have := c.(map[string]any); have["type"] == change["type"] {
			for k, v := range change {
				have[k] = v
			}
			return
		}
	}
	status["conditions"] = append(all, change)
}

func newMerging(t *testing.T) (*merging, *Ready) {
	m := &merging{apiserver: newAPIServer(t), version: 42, node: map[string]any{
		"metadata": map[string]any{"name": nodeName, "resourceVersion": "42", "annotations": map[string]any{}},
		"spec":     map[string]any{}, "status": map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": "True"}}},
	}}
	m.apiserver.set(func() { m.apiserver.onPatch = m.patch })
	cert := filepath.Join(t.TempDir(), "cert.pem")
	write(t, cert, m.ca.issue(t, "system:node:"+nodeName, 1, time.Now().Add(-time.Hour), time.Now().Add(time.Hour)))
	c, err := New(strings.Replace(m.URL, "127.0.0.1", "localhost", 1), m.ca.pem(), cert)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return m, NewReady(c, nodeName)
}

// TestConditions is the life of a disk's troubles as the Node shows them.
func TestConditions(t *testing.T) {
	m, ready := newMerging(t)
	at := time.Date(2026, 11, 28, 7, 0, 0, 0, time.UTC)
	fine := node.Condition{Type: node.IOError, Status: node.False, Reason: "DiskAnswers", Since: at}
	bad := node.Condition{Type: node.IOError, Status: node.True, Reason: "DiskHung", Message: "it hangs", Since: at.Add(time.Minute)}
	var want Wanted
	c := NewConditions(ready, func() Wanted { return want })
	see := func(change func()) { // the watch tells
		change()
		b, err := json.Marshal(m.node)
		if err != nil {
			t.Fatal(err)
		}
		if err := ready.event([]byte(event("MODIFIED", string(b))), func() {}); err != nil {
			t.Fatal(err)
		}
	}
	step := func(name string, w Wanted, plan ...string) {
		t.Helper()
		want = w
		p, err := c.Plan(t.Context())
		if got := strings.TrimSpace(p.String()); err != nil || got != strings.Join(plan, "\n") || !p.Serving {
			t.Fatalf("%s: planned %q, %v; want %q", name, got, err, plan)
		}
		m.said = nil
		if err := c.Apply(t.Context(), p); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if left, _ := c.Plan(t.Context()); !left.Empty() {
			t.Errorf("%s: left: %s", name, left)
		}
	}
	conditions := func(k ...node.Condition) Wanted { return Wanted{Conditions: k, Known: true} }
	step("not registered", conditions(bad))
	see(func() {})
	step("well from the start", conditions(fine))
	step("ill", conditions(bad), "tell Node 10.0.0.5: IOError is True (DiskHung), it hangs")
	if len(m.said) != 1 || !strings.HasPrefix(m.said[0], "/status ") || !strings.Contains(m.said[0], `"lastTransitionTime":"2026-11-28T07:01:00Z"`) {
		t.Errorf("patches %q", m.said)
	}
	worse := bad
	worse.Reason, worse.Message = "DiskIOError", "it fails"
	step("ill in another way", conditions(worse), "tell Node 10.0.0.5: IOError is True (DiskIOError), it fails")
	if strings.Contains(strings.Join(m.said, ""), "lastTransitionTime") {
		t.Errorf("no transition, and its time is written: %q", m.said)
	}
	unknown := node.Condition{Type: node.IOError, Status: node.Unknown}
	step("the agent has just started", conditions(unknown))
	step("gone", Wanted{Conditions: []node.Condition{worse}, Cordon: "disk-a is gone", Known: true}, "cordon Node 10.0.0.5: disk-a is gone")
	if spec := asMap(m.node["spec"]); spec["unschedulable"] != true {
		t.Errorf("spec %v", spec)
	}
	step("the agent has just started, and does not know of the disk yet", Wanted{})
	step("back", conditions(fine), "tell Node 10.0.0.5: IOError is False (DiskAnswers)", "uncordon Node 10.0.0.5, which was cordoned because disk-a is gone")
	if spec, meta := asMap(m.node["spec"]), asMap(m.node["metadata"]); len(spec) > 0 || len(asMap(meta["annotations"])) > 0 {
		t.Errorf("left: %v, %v", spec, meta)
	}
	gone := Wanted{Cordon: "disk-a is gone", Known: true}
	see(func() { asMap(m.node["spec"])["unschedulable"] = true })
	step("somebody else has cordoned it", gone)
	step("which is not undone", conditions(fine))
	see(func() { delete(asMap(m.node["spec"]), "unschedulable") })
	step("gone again", gone, "cordon Node 10.0.0.5: disk-a is gone")
	see(func() { delete(asMap(m.node["spec"]), "unschedulable") })
	step("a human has uncordoned it", gone)
	step("and it is back", conditions(fine), "uncordon Node 10.0.0.5, which was cordoned because disk-a is gone")
	see(func() {
		merge(asMap(m.node["status"]), map[string]any{"type": "IOError", "status": "True", "reason": "FilesystemIsReadOnly"})
	})
	step("a condition of the cluster's own detector", conditions(fine))
}

// TestOlderSight: what the watch tells of the time before a change of ours is no news.
func TestOlderSight(t *testing.T) {
	m, ready := newMerging(t)
	b, err := json.Marshal(m.node)
	if err != nil {
		t.Fatal(err)
	}
	before := event("MODIFIED", string(b))
	woken := 0
	defer ready.listen(func() { woken++ })()
	tell := func() {
		if err := ready.event([]byte(before), func() {}); err != nil {
			t.Fatal(err)
		}
	}
	tell()
	if o, err := ready.client.cordon(t.Context(), nodeName, "why"); err != nil {
		t.Fatal(err)
	} else {
		ready.take(o)
	}
	tell()
	if s := ready.sight(); !s.unschedulable || s.annotations[CordonedBy] != "why" || woken != 2 {
		t.Errorf("seen %+v, woken %d times", s, woken)
	}
}

// TestPatchRefused says what the API server said.
func TestPatchRefused(t *testing.T) {
	m, ready := newMerging(t)
	m.apiserver.set(func() {
		m.apiserver.onPatch = func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			fmt.Fprint(w, `{"message":"node \"10.0.0.5\" is not allowed to modify taints"}`)
		}
	})
	_, err := ready.client.cordon(t.Context(), nodeName, "why")
	if err == nil || err.Error() != `PATCH /api/v1/nodes/10.0.0.5: 403 Forbidden: node "10.0.0.5" is not allowed to modify taints` {
		t.Errorf("error %v", err)
	}
}
