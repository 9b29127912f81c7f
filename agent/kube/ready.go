package kube

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	nodesPath = "/api/v1/nodes"
	// The server ends a watch after this long, and up to twice as long: nodes do
	// not come back at once, and a rotated certificate is in use soon.
	watchSeconds = 300
)

// Ready serves NodeReady: what the API server knows of this Node. It changes
// nothing; Conditions does. It satisfies reconcile.Module.
type Ready struct {
	client *Client
	name   string

	mu       sync.Mutex // guards the rest
	seen     sight
	listener func() // who else wants to know of changes; nil: nobody
}

// sight is what was last seen of the Node.
type sight struct {
	err        error // why nothing can be seen
	known      bool  // the API server has answered
	registered bool
	ready      condition
	// What the agent itself writes, and what it must not overwrite.
	version       uint64 // of the Node; a Node of an older one is no news
	unschedulable bool
	annotations   map[string]string // those of ours
	conditions    []condition       // of node.DiskConditionTypes
}

// condition returns one of the Node's conditions; of one that it has not, nothing.
func (s sight) condition(t string) condition {
	for _, c := range s.conditions {
		if c.Type == t {
			return c
		}
	}
	return condition{}
}

// same reports whether nothing has changed that anybody here looks at.
func (s sight) same(o sight) bool {
	return s.known == o.known && s.registered == o.registered && s.ready == o.ready && s.unschedulable == o.unschedulable &&
		maps.Equal(s.annotations, o.annotations) && slices.Equal(s.conditions, o.conditions)
}

// NewReady returns the module for the Node called name.
func NewReady(client *Client, name string) *Ready { return &Ready{client: client, name: name} }

// Name returns "kube/node".
func (r *Ready) Name() string { return "kube/node" }

// Condition returns NodeReady.
func (r *Ready) Condition() node.ConditionType { return node.NodeReady }

// Needs returns what has to be so before the Node is looked at.
func (r *Ready) Needs() []node.ConditionType { return []node.ConditionType{node.NodeJoined} }

// Plan judges what Watch has seen last; there is never anything to apply.
func (r *Ready) Plan(context.Context) (node.Plan, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return node.Plan{}, r.seen.judge(r.name)
}

// Apply has nothing to do.
func (r *Ready) Apply(context.Context, node.Plan) error { return nil }

// Registered reports whether kubelet has registered the Node, as far as was seen.
func (r *Ready) Registered() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen.registered
}

func (s sight) judge(name string) error {
	_, refused := errors.AsType[*StatusError](s.err)
	switch {
	case refused:
		return node.Waiting("APIServerRefuses", "ask the API server for Node %s: %w", name, s.err)
	case s.err != nil:
		return node.Waiting("APIServerUnreachable", "ask the API server for Node %s: %w", name, s.err)
	case !s.known:
		return node.Waiting("NotObservedYet", "the API server has not been asked for Node %s yet", name)
	case !s.registered:
		return node.Waiting("NotRegistered", "kubelet has not registered Node %s yet", name)
	case s.ready.Status == string(node.True):
		return nil
	}
	message := s.ready.Message
	return node.Waiting(reason(s.ready.Reason, "NotReady"), "Node %s is not Ready: %s", name, message[:min(len(message), 1<<10)])
}

// set records what is seen and wakes if it is news.
func (r *Ready) set(s sight, wake func()) {
	r.mu.Lock()
	before, listener := r.seen, r.listener
	if s.registered && before.registered && s.version != 0 && s.version < before.version {
		// The watch tells of the Node as it was before the agent itself wrote to it.
		r.mu.Unlock()
		return
	}
	r.seen = s
	r.mu.Unlock()
	// kubelet's heartbeats are not news.
	if !before.same(s) || s.err != nil || before.err != nil {
		wake()
		if listener != nil {
			listener()
		}
	}
}

// listen has wake called, too, until the returned function is.
func (r *Ready) listen(wake func()) (end func()) {
	set := func(f func()) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.listener = f
	}
	set(wake)
	return func() { set(nil) }
}

// sight returns what was last seen.
func (r *Ready) sight() sight {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.seen
}

// take records the Node that the API server has answered a change with.
func (r *Ready) take(o object) { r.set(o.sight(), func() {}) }

// Watch follows the Node from the moment there is a certificate to ask with.
func (r *Ready) Watch(ctx context.Context, wake func()) error {
	err := waitForFile(ctx, r.client.cert)
	for err == nil {
		err = r.follow(ctx, wake)
		r.client.Close() // the next connection presents the certificate of then
	}
	if ctx.Err() == nil {
		r.set(sight{err: err}, wake)
	}
	return err
}

// follow lists the Node once and then watches it until the server ends the watch.
func (r *Ready) follow(ctx context.Context, wake func()) error {
	version, err := r.list(ctx, wake)
	if err != nil {
		return err
	}
	q := r.query()
	q.Set("watch", "true")
	q.Set("resourceVersion", version)
	q.Set("timeoutSeconds", strconv.Itoa(watchSeconds+rand.IntN(watchSeconds)))
	began := time.Now()
	body, err := r.client.get(ctx, nodesPath, q)
	if err != nil {
		return err
	}
	defer body.Close()
	lines := bufio.NewScanner(body) // the server sends one object a line
	lines.Buffer(nil, maxAnswer)
	for lines.Scan() {
		if err := r.event(lines.Bytes(), wake); err != nil {
			if e, ok := errors.AsType[*StatusError](err); ok && e.Code == http.StatusGone {
				return nil // the version is too old: list again
			}
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("watch Node %s: %w", r.name, err)
	}
	if time.Since(began) < time.Second {
		return errors.New("the API server ended the watch at once")
	}
	return nil
}

// query selects this Node alone; a node may not list others.
func (r *Ready) query() url.Values {
	return url.Values{"fieldSelector": {"metadata.name=" + r.name}}
}

func (r *Ready) list(ctx context.Context, wake func()) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	body, err := r.client.get(ctx, nodesPath, r.query())
	if err != nil {
		return "", err
	}
	defer body.Close()
	var all struct {
		Metadata metadata `json:"metadata"`
		Items    []object `json:"items"`
	}
	if err := json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(&all); err != nil {
		return "", fmt.Errorf("decode list of Nodes: %w", err)
	}
	s := sight{known: true}
	for _, o := range all.Items {
		if o.Metadata.Name == r.name {
			s = o.sight()
		}
	}
	r.set(s, wake)
	return all.Metadata.ResourceVersion, nil
}

// event takes in one event of the watch.
func (r *Ready) event(line []byte, wake func()) error {
	var e struct {
		Type   string          `json:"type"`
		Object json.RawMessage `json:"object"`
	}
	if err := json.Unmarshal(line, &e); err != nil {
		return fmt.Errorf("decode watch event: %w", err)
	}
	switch e.Type {
	case "ERROR":
		status := &StatusError{}
		if err := json.Unmarshal(e.Object, status); err != nil {
			return fmt.Errorf("decode watch error: %w", err)
		}
		status.Request = "watch " + nodesPath
		return status
	case "ADDED", "MODIFIED", "DELETED":
		var o object
		if err := json.Unmarshal(e.Object, &o); err != nil {
			return fmt.Errorf("decode Node: %w", err)
		}
		if o.Metadata.Name != r.name {
			return nil
		}
		s := sight{known: true}
		if e.Type != "DELETED" {
			s = o.sight()
		}
		r.set(s, wake)
	}
	return nil
}

// object is a Node, as far as it matters.
type object struct {
	Metadata metadata `json:"metadata"`
	Spec     struct {
		Unschedulable bool `json:"unschedulable"`
	} `json:"spec"`
	Status struct {
		Conditions []condition `json:"conditions"`
	} `json:"status"`
}

type metadata struct {
	Name            string `json:"name"`
	ResourceVersion string `json:"resourceVersion"`

	Annotations map[string]string `json:"annotations"`
}

type condition struct {
	Type    string `json:"type"`
	Status  string `json:"status"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// sight is what is seen of the Node. Resource versions of one object can be compared.
// Source: https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions
func (o object) sight() sight {
	s := sight{known: true, registered: true, ready: o.ready(), unschedulable: o.Spec.Unschedulable}
	s.version, _ = strconv.ParseUint(o.Metadata.ResourceVersion, 10, 64) // 0: nothing is older
	if by, ok := o.Metadata.Annotations[CordonedBy]; ok {
		s.annotations = map[string]string{CordonedBy: by}
	}
	for _, c := range o.Status.Conditions {
		if slices.Contains(node.DiskConditionTypes[:], node.ConditionType(c.Type)) {
			s.conditions = append(s.conditions, c)
		}
	}
	return s
}

func (o object) ready() condition {
	for _, c := range o.Status.Conditions {
		if c.Type == "Ready" {
			return c
		}
	}
	return condition{Reason: "NotReported", Message: "kubelet has not reported its condition yet"}
}
