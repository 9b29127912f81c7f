package kube

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	bootstrappers = "system:bootstrappers"
	nodeDNS       = "tke:node-dns"
)

// bindRoles lets nodes join, lets the API server ask kubelets, and lets nodes run
// kube-proxy and CoreDNS, as the installers of clusters do.
// Source: https://kubernetes.io/docs/reference/access-authn-authz/kubelet-tls-bootstrapping/, docs/services.md
func (c *Cluster) bindRoles(ctx context.Context) error {
	const group = "rbac.authorization.k8s.io"
	err := c.Apply(ctx, "/apis/"+group+"/v1/clusterroles/"+nodeDNS, map[string]any{
		"apiVersion": group + "/v1", "kind": "ClusterRole", "metadata": map[string]any{"name": nodeDNS},
		"rules": []any{
			map[string]any{"apiGroups": []string{""}, "resources": []string{"services", "namespaces"}, "verbs": []string{"list", "watch"}},
			map[string]any{"apiGroups": []string{"discovery.k8s.io"}, "resources": []string{"endpointslices"}, "verbs": []string{"list", "watch"}},
		},
	})
	if err != nil {
		return err
	}
	const csr = "system:certificates.k8s.io:certificatesigningrequests:"
	for _, b := range []struct{ name, role, kind, subject string }{
		{"tke:node-bootstrapper", "system:node-bootstrapper", "Group", bootstrappers},
		{"tke:approve-node-client", csr + "nodeclient", "Group", bootstrappers},
		{"tke:approve-node-renewal", csr + "selfnodeclient", "Group", "system:nodes"},
		{"tke:kubelet-api", "system:kubelet-api-admin", "User", kubeletClient},
		{"tke:node-proxier", "system:node-proxier", "Group", "system:nodes"},
		{nodeDNS, nodeDNS, "Group", "system:nodes"},
	} {
		err := c.Apply(ctx, "/apis/"+group+"/v1/clusterrolebindings/"+b.name, map[string]any{
			"apiVersion": group + "/v1", "kind": "ClusterRoleBinding", "metadata": map[string]any{"name": b.name},
			"roleRef":  map[string]any{"apiGroup": group, "kind": "ClusterRole", "name": b.role},
			"subjects": []any{map[string]any{"apiGroup": group, "kind": b.kind, "name": b.subject}},
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// NewBootstrapToken makes a token with which nodes can join for as long as ttl.
// With a negative ttl it has expired already.
func (c *Cluster) NewBootstrapToken(ctx context.Context, ttl time.Duration) (node.Secret, error) {
	text := strings.ToLower(rand.Text())
	id, secret := text[:6], text[6:22]
	err := c.Apply(ctx, "/api/v1/namespaces/kube-system/secrets/bootstrap-token-"+id, map[string]any{
		"apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
		"metadata": map[string]any{"name": "bootstrap-token-" + id, "namespace": "kube-system"},
		"stringData": map[string]string{
			"token-id": id, "token-secret": secret, "usage-bootstrap-authentication": "true",
			"expiration": time.Now().Add(ttl).UTC().Format(time.RFC3339),
		},
	})
	if err != nil {
		return node.Secret{}, fmt.Errorf("make a bootstrap token: %w", err)
	}
	token := id + "." + secret
	if ttl > 0 {
		if err := c.waitToken(ctx, token); err != nil {
			return node.Secret{}, fmt.Errorf("make a bootstrap token: %w", err)
		}
	}
	return node.NewSecret(token), nil
}

// waitToken waits until the API server knows the token, which it learns from a
// watch of its own.
func (c *Cluster) waitToken(ctx context.Context, token string) error {
	for {
		var review struct{ Status struct{ Authenticated bool } }
		err := c.Do(ctx, http.MethodPost, "/apis/authentication.k8s.io/v1/tokenreviews", map[string]any{
			"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": map[string]string{"token": token},
		}, &review)
		if err != nil || review.Status.Authenticated {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Node is what the lab looks at in a Node.
type Node struct {
	Metadata struct {
		Name   string
		UID    string
		Labels map[string]string

		Annotations map[string]string
	}
	Spec struct {
		ProviderID    string
		Unschedulable bool
		Taints        []node.Taint
	}
	Status struct {
		Conditions []Condition
		Addresses  []struct{ Type, Address string }
	}
}

// Condition is one of a Node's or Pod's conditions.
type Condition struct {
	Type, Status, Reason, Message string
}

// Condition returns the condition of that type; an absent one is Unknown.
func (n *Node) Condition(kind string) Condition {
	for _, c := range n.Status.Conditions {
		if c.Type == kind {
			return c
		}
	}
	return Condition{Type: kind, Status: "Unknown", Reason: "Absent"}
}

// Node returns a Node.
func (c *Cluster) Node(ctx context.Context, name string) (*Node, error) {
	n := &Node{}
	return n, c.Do(ctx, http.MethodGet, "/api/v1/nodes/"+url.PathEscape(name), nil, n)
}

// WaitNodeReady waits until there is a Node of that name which is Ready.
func (c *Cluster) WaitNodeReady(ctx context.Context, name string) (*Node, error) {
	n := &Node{}
	err := c.watch(ctx, "/api/v1/nodes?"+selectName(name), func(object json.RawMessage, gone bool) (bool, error) {
		*n = Node{}
		if gone {
			return false, nil
		}
		err := json.Unmarshal(object, n)
		return n.Condition("Ready").Status == "True", err
	})
	if err != nil {
		ready := n.Condition("Ready")
		return nil, fmt.Errorf("wait for node %s: %w; Ready is %s: %s %s", name, err, ready.Status, ready.Reason, ready.Message)
	}
	return n, nil
}

func selectName(name string) string {
	return "fieldSelector=" + url.QueryEscape("metadata.name="+name)
}

// DeleteNode deletes a Node.
func (c *Cluster) DeleteNode(ctx context.Context, name string) error {
	return c.Do(ctx, http.MethodDelete, "/api/v1/nodes/"+url.PathEscape(name), nil, nil)
}

// Pod describes a pod of one container in the namespace default.
type Pod struct {
	Name    string
	Image   string
	Command []string
	Node    string // empty: where the scheduler puts it

	Labels      map[string]string
	Annotations map[string]string
	HostNetwork bool
	Port        int    // that HostPort leads to
	HostPort    int    // of the node; 0: none
	HostPath    string // directory of the node that the pod has, too, at the same path; empty: none
}

// PodStatus is what the lab looks at in a Pod.
type PodStatus struct {
	Spec   struct{ NodeName string }
	Status struct {
		Phase             string
		PodIP             netip.Addr
		PodIPs            []struct{ IP netip.Addr }
		Conditions        []Condition
		ContainerStatuses []struct {
			Ready        bool
			RestartCount int
			State        struct {
				Waiting struct{ Reason, Message string }
			}
		}
	}
}

const pods = "/api/v1/namespaces/default/pods"

// RunPod creates a pod. Its image is one that the nodes hold: nothing is pulled.
func (c *Cluster) RunPod(ctx context.Context, p Pod) error {
	if err := c.waitServiceAccount(ctx); err != nil {
		return fmt.Errorf("run pod %s: %w", p.Name, err)
	}
	container := map[string]any{"name": "main", "image": p.Image, "command": p.Command, "imagePullPolicy": "Never"}
	if p.HostPort != 0 {
		container["ports"] = []any{map[string]any{"containerPort": p.Port, "hostPort": p.HostPort}}
	}
	spec := map[string]any{"containers": []any{container}, "terminationGracePeriodSeconds": 1}
	if p.HostPath != "" {
		container["volumeMounts"] = []any{map[string]any{"name": "host", "mountPath": p.HostPath}}
		spec["volumes"] = []any{map[string]any{"name": "host", "hostPath": map[string]any{"path": p.HostPath}}}
	}
	if p.HostNetwork {
		spec["hostNetwork"], spec["dnsPolicy"] = true, "ClusterFirstWithHostNet"
	}
	if p.Node != "" {
		spec["nodeName"] = p.Node
	}
	err := c.Do(ctx, http.MethodPost, pods, map[string]any{
		"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": p.Name, "labels": p.Labels, "annotations": p.Annotations}, "spec": spec,
	}, nil)
	if err != nil {
		return fmt.Errorf("run pod %s: %w", p.Name, err)
	}
	return nil
}

// waitServiceAccount waits for what every pod runs as: a controller makes it
// some moments after the API server is ready.
func (c *Cluster) waitServiceAccount(ctx context.Context) error {
	path := "/api/v1/namespaces/default/serviceaccounts?" + selectName("default")
	return c.watch(ctx, path, func(_ json.RawMessage, gone bool) (bool, error) { return !gone, nil })
}

// WaitPodRunning waits until the pod's containers are ready.
func (c *Cluster) WaitPodRunning(ctx context.Context, name string) (*PodStatus, error) {
	p := &PodStatus{}
	err := c.watch(ctx, pods+"?"+selectName(name), func(object json.RawMessage, gone bool) (bool, error) {
		*p = PodStatus{}
		if gone {
			return false, fmt.Errorf("it was deleted")
		}
		err := json.Unmarshal(object, p)
		return p.ready(), err
	})
	if err != nil {
		return nil, fmt.Errorf("wait for pod %s: %w; it is %s", name, err, p)
	}
	return p, nil
}

func (p *PodStatus) ready() bool {
	for _, c := range p.Status.ContainerStatuses {
		if !c.Ready {
			return false
		}
	}
	return p.Status.Phase == "Running" && p.Status.PodIP.IsValid()
}

// String says what the pod waits for.
func (p *PodStatus) String() string {
	text := p.Status.Phase
	if text == "" {
		text = "not there"
	}
	for _, c := range p.Status.Conditions {
		if c.Status == "False" && c.Message != "" {
			text += ", " + c.Type + " is False: " + c.Reason + " " + c.Message
		}
	}
	for _, c := range p.Status.ContainerStatuses {
		if w := c.State.Waiting; w.Reason != "" {
			text += ", container waits: " + w.Reason + " " + w.Message
		}
	}
	return text
}

// Logs returns what the pod's container printed.
func (c *Cluster) Logs(ctx context.Context, name string) (string, error) {
	var text string
	err := c.Do(ctx, http.MethodGet, pods+"/"+url.PathEscape(name)+"/log", nil, &text)
	return text, err
}

// DeletePod deletes a pod and waits until it is gone.
func (c *Cluster) DeletePod(ctx context.Context, name string) error {
	path := pods + "/" + url.PathEscape(name)
	if err := c.Do(ctx, http.MethodDelete, path, nil, nil); err != nil {
		return err
	}
	for {
		err := c.Do(ctx, http.MethodGet, path, nil, nil)
		if NotFound(err) {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("delete pod %s: %w", name, ctx.Err())
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Service is a Service of the namespace default, with one TCP port.
type Service struct {
	Name     string
	Selector map[string]string // of the pods' labels
	Port     int               // of the Service
	Target   int               // of the pods
}

// Expose creates a Service that has a NodePort, and returns the addresses that the
// cluster gave it.
func (c *Cluster) Expose(ctx context.Context, s Service) (ip netip.Addr, nodePort int, err error) {
	var made struct {
		Spec struct {
			ClusterIP netip.Addr
			Ports     []struct{ NodePort int }
		}
	}
	err = c.Do(ctx, http.MethodPost, "/api/v1/namespaces/default/services", map[string]any{
		"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"name": s.Name},
		"spec": map[string]any{
			"type": "NodePort", "selector": s.Selector,
			"ports": []any{map[string]any{"port": s.Port, "targetPort": s.Target}},
		},
	}, &made)
	if err == nil && len(made.Spec.Ports) != 1 {
		err = fmt.Errorf("it has %d ports", len(made.Spec.Ports))
	}
	if err != nil {
		return netip.Addr{}, 0, fmt.Errorf("create service %s: %w", s.Name, err)
	}
	return made.Spec.ClusterIP, made.Spec.Ports[0].NodePort, nil
}
