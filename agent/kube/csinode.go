package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	csiNodesPath = "/apis/storage.k8s.io/v1/csinodes"
	// The annotations of the CSINode: what the driver has published, and what we have
	// made of it. Kubelet leaves annotations as they are.
	publishedNote = "tkenode.io/cbs-count-published"
	limitNote     = "tkenode.io/cbs-count"

	// limitPeriod is how often the CSINode is looked at: kubelet writes the driver's
	// own count into it whenever the driver registers anew. A node may not watch it.
	// Source: k8s.io/kubernetes v1.36.3 plugin/pkg/auth/authorizer/rbac/bootstrappolicy/policy.go
	limitPeriod = 10 * time.Minute
	limitRetry  = 15 * time.Second // after a failure; twice as long after each further one
	// limitSettle is after a disk has come: the cluster says a moment later that it is a volume.
	limitSettle = 30 * time.Second
	// mostPeriod is how long an answer of the cloud's holds: an instance is resized rarely.
	mostPeriod = 6 * time.Hour
	// refusedPeriod is how long an API server that does not let the count be changed is left alone.
	refusedPeriod = 24 * time.Hour
)

// Limit is how many volumes the CBS CSI driver may attach to this node.
type Limit struct {
	Max       int       `json:"max"`       // data disks that the instance takes
	NotCSI    []string  `json:"notCSI"`    // of them, not the driver's
	Driver    int       `json:"driver"`    // that the driver itself has published
	Published int       `json:"published"` // that the CSINode says now
	Message   string    `json:"message,omitempty"`
	At        time.Time `json:"at,omitzero"` // zero: not known yet
}

// CSINode keeps the count of volumes in this node's CSINode true: the driver takes
// the disks that are not its own for a constant, and the scheduler then sends pods
// whose volumes cannot be attached. It only ever lowers what the driver has
// published. No condition waits for it.
type CSINode struct {
	client *Client
	name   string // of the Node
	driver string
	// most asks the cloud for the most disks that the instance takes.
	most func(context.Context) (int, error)
	// notCSI returns the disks that are not the driver's, given those that the
	// cluster has attached; a channel that is closed once others are seen; and
	// whether that is known.
	notCSI func(volumes []string) ([]string, <-chan struct{}, bool)
	log    *slog.Logger

	failures int // consecutive; only Run touches it, and what the cloud has said
	max      int
	maxAt    time.Time

	mu  sync.Mutex // guards the rest
	now Limit
}

// NewCSINode returns what keeps the CSINode of the Node called name.
func NewCSINode(client *Client, name, driver string, most func(context.Context) (int, error),
	notCSI func(volumes []string) ([]string, <-chan struct{}, bool), log *slog.Logger,
) *CSINode {
	return &CSINode{client: client, name: name, driver: driver, most: most, notCSI: notCSI, log: log}
}

// Limit returns how things stood last.
func (c *CSINode) Limit() Limit {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// Run keeps the CSINode until ctx ends.
func (c *CSINode) Run(ctx context.Context) {
	if waitForFile(ctx, c.client.cert) != nil {
		return
	}
	for ctx.Err() == nil {
		wait, changed := c.step(ctx)
		if rest(ctx, wait, changed) { // a disk was attached or detached
			rest(ctx, limitSettle, nil)
		}
	}
}

// rest waits for about d, the end of ctx or a change, and reports whether there was one.
func rest(ctx context.Context, d time.Duration, changed <-chan struct{}) bool {
	t := time.NewTimer(d*3/4 + rand.N(d/2))
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	case <-changed:
		return true
	}
	return false
}

// step looks once, and says when to look again.
func (c *CSINode) step(ctx context.Context) (wait time.Duration, changed <-chan struct{}) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	l, changed, err := c.keep(ctx)
	status, answered := errors.AsType[*StatusError](err)
	wait = limitPeriod
	if err == nil {
		c.failures = 0
	}
	switch {
	case answered && (status.Code == http.StatusUnprocessableEntity || status.Code == http.StatusForbidden):
		// Older servers hold the whole entry immutable.
		l.Message = "the API server does not let it be changed, which takes Kubernetes 1.35, or 1.34 with the feature gate MutableCSINodeAllocatableCount: " + status.Message
		wait, changed = refusedPeriod, nil
	case err != nil:
		l.Message, wait = err.Error(), min(limitRetry<<min(c.failures, 8), limitPeriod)
		c.failures++
	}
	c.note(l)
	return wait, changed
}

// note takes down how things stand, and says so once.
func (c *CSINode) note(l Limit) {
	l.At = time.Now()
	c.mu.Lock()
	before := c.now
	c.now = l
	c.mu.Unlock()
	switch {
	case l.Message == errNoDriver.Error():
		if before.Message != l.Message { // as on most nodes when they start, and on many for ever
			c.log.Info("no count of CBS volumes is published", "why", l.Message)
		}
	case l.Message != "" && l.Message != before.Message:
		c.log.Warn("the count of CBS volumes is not kept", "driver", l.Driver, "published", l.Published, "notCSI", l.NotCSI, "message", l.Message)
	case l.Message == "" && (before.Message != "" || l.Published != before.Published):
		c.log.Info("the count of CBS volumes", "published", l.Published, "max", l.Max, "notCSI", l.NotCSI, "driver", l.Driver)
	}
}

var errNoDriver = errors.New("the CBS CSI driver is not registered on this node")

// keep compares the CSINode with what is so, and changes it if that differs.
func (c *CSINode) keep(ctx context.Context) (l Limit, changed <-chan struct{}, err error) {
	_, changed, known := c.notCSI(nil)
	if !known {
		return l, changed, errors.New("the node's disks have not been looked at yet")
	}
	var object csiNode
	if err := c.read(ctx, csiNodesPath+"/"+c.name, &object); err != nil {
		if status, ok := errors.AsType[*StatusError](err); ok && status.Code == http.StatusNotFound {
			err = errNoDriver
		}
		return l, changed, err
	}
	now, ok := object.count(c.driver)
	if !ok {
		return l, changed, errNoDriver
	}
	l.Published, l.Driver = now, object.published(now)
	var volumes attachments
	if err := c.read(ctx, nodesPath+"/"+c.name, &volumes); err != nil {
		return l, changed, err
	}
	if time.Since(c.maxAt) > mostPeriod {
		most, err := c.most(ctx)
		if err != nil && c.max == 0 {
			return l, changed, err
		}
		if c.maxAt = time.Now(); err == nil {
			c.max = most
		}
	}
	l.Max = c.max
	l.NotCSI, changed, _ = c.notCSI(volumes.of(c.driver))
	want := max(0, min(l.Driver, l.Max-len(l.NotCSI)))
	if want == now {
		return l, changed, nil
	}
	if err := c.publish(ctx, object.Metadata.ResourceVersion, l.Driver, want); err != nil {
		return l, changed, err
	}
	l.Published = want
	return l, changed, nil
}

// csiNode is a CSINode, as far as it matters.
type csiNode struct {
	Metadata struct {
		ResourceVersion string            `json:"resourceVersion"`
		Annotations     map[string]string `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		Drivers []csiDriver `json:"drivers"`
	} `json:"spec"`
}

type csiDriver struct {
	Name        string `json:"name"`
	Allocatable struct {
		Count *int `json:"count"`
	} `json:"allocatable"`
}

// count returns how many volumes the CSINode says that the driver may attach. A
// driver without a limit is left without.
func (o csiNode) count(driver string) (int, bool) {
	for _, d := range o.Spec.Drivers {
		if d.Name == driver && d.Allocatable.Count != nil {
			return *d.Allocatable.Count, true
		}
	}
	return 0, false
}

// published returns what the driver has published, given what the CSINode says now:
// just that, unless it is what we have made of it.
func (o csiNode) published(now int) int {
	ours, err1 := strconv.Atoi(o.Metadata.Annotations[limitNote])
	driver, err2 := strconv.Atoi(o.Metadata.Annotations[publishedNote])
	if err1 != nil || err2 != nil || ours != now || driver < now {
		return now
	}
	return driver
}

// attachments is a Node, as far as volumes matter.
type attachments struct {
	Status struct {
		InUse    []string `json:"volumesInUse"`
		Attached []struct {
			Name string `json:"name"`
		} `json:"volumesAttached"`
	} `json:"status"`
}

// of returns the handles of the driver's volumes, which are named
// kubernetes.io/csi/<driver>^<handle>.
// Source: k8s.io/kubernetes v1.36.3 pkg/volume/csi/csi_plugin.go, GetVolumeName
func (a attachments) of(driver string) (handles []string) {
	names := a.Status.InUse
	for _, v := range a.Status.Attached {
		names = append(names, v.Name)
	}
	for _, n := range names {
		if h, ok := strings.CutPrefix(n, "kubernetes.io/csi/"+driver+"^"); ok {
			handles = append(handles, h)
		}
	}
	return handles
}

func (c *CSINode) read(ctx context.Context, path string, into any) error {
	body, err := c.client.get(ctx, path, url.Values{})
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(io.LimitReader(body, maxAnswer)).Decode(into); err != nil {
		return fmt.Errorf("decode %s: %w", path, err)
	}
	return nil
}

// publish writes the count, unless the CSINode has changed since it was read. The
// list of drivers is merged by name, a node may patch its own CSINode, and of an
// entry the count alone may change.
// Sources: k8s.io/api v0.36.3 storage/v1/types.go, CSINodeSpec; k8s.io/kubernetes
// v1.36.3 plugin/pkg/admission/noderestriction/admission.go, admitCSINode, and
// pkg/apis/storage/validation/validation.go, ValidateCSINodeUpdate
func (c *CSINode) publish(ctx context.Context, version string, driver, count int) error {
	type object = map[string]any
	patch, err := json.Marshal(object{
		"metadata": object{
			"resourceVersion": version,
			"annotations":     map[string]string{publishedNote: strconv.Itoa(driver), limitNote: strconv.Itoa(count)},
		},
		"spec": object{"drivers": []object{{"name": c.driver, "allocatable": object{"count": count}}}},
	})
	if err != nil {
		return err
	}
	path := csiNodesPath + "/" + c.name
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, c.client.base.JoinPath(path).String(), bytes.NewReader(patch))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	body, err := c.client.do(req, path)
	if err != nil {
		return err
	}
	return body.Close()
}
