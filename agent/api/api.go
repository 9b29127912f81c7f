// Package api is the agent's local socket: HTTP and JSON on
// /run/tkenode/tkenode.sock, for the person on call and for scripts on the node.
//
// The table in routes.go says what can be asked, and by whom. Everything is told
// from memory except the plan and explanations, which are made anew. Nothing that is
// served changes the node by itself: it makes the agent look again, or tells it what
// root has decided of a disk that it may not touch otherwise. It is not the way to
// manage many nodes: that is what the Node's conditions and the metrics are for.
package api

import (
	"context"
	"net/http"
	"time"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/kube"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

// Socket is where the agent listens.
const Socket = "/run/tkenode/tkenode.sock"

// Group is the group whose members may read.
const Group = "tkenode"

// Source is what the server tells. The agent fills it in; every function is safe
// for concurrent use and, Plan, Explain and Decide apart, answers at once.
type Source struct {
	Version    string
	Conditions func() []node.Condition
	Instances  func() []reconcile.InstanceStatus
	Plan       func(context.Context) []reconcile.InstancePlan
	Wake       func(instance string) bool
	Sealed     func() (node.Sealed, bool) // false: nothing is sealed yet
	Boot       func() Boot
	// Warnings are what is wrong although the node may be Ready.
	Warnings func() []node.Condition
	ENI      func() (eni.State, error)
	Disks    func() []disk.State
	Volumes  func() Volumes
	// Decide takes down what an operator has decided of a disk.
	Decide  func(context.Context, disk.Order) error
	Explain func(context.Context, eni.Question) (eni.Explanation, error)
	Metrics http.Handler
}

// Status is how the node stands.
type Status struct {
	Version string    `json:"version"`
	Now     time.Time `json:"now"`     // the agent's clock, which "since" is measured by
	Started time.Time `json:"started"` // the agent
	Node    *Identity `json:"node,omitempty"`
	// Unmet is the first condition in launch order that is not True: the one to look at.
	Unmet *node.Condition `json:"unmet,omitempty"`
	// Warnings are what is wrong although the node may be Ready; they are True.
	Warnings   []node.Condition           `json:"warnings,omitempty"`
	Conditions []node.Condition           `json:"conditions"`
	Instances  []reconcile.InstanceStatus `json:"instances"`
}

// Volumes are the disks that are attached and not of the NodeConfig, and how many
// more may be.
type Volumes struct {
	Others []disk.Other `json:"others"`
	Limit  kube.Limit   `json:"limit"`
}

// Identity says which node it is, once a configuration is sealed.
type Identity struct {
	Name       string `json:"name"`
	InstanceID string `json:"instanceID"`
	Cluster    string `json:"cluster"`
	Zone       string `json:"zone"`
	Generation int    `json:"generation"` // of the sealed configuration
}

// Condition returns the condition of type t.
func (s Status) Condition(t node.ConditionType) (node.Condition, bool) {
	for _, c := range s.Conditions {
		if c.Type == t {
			return c, true
		}
	}
	return node.Condition{}, false
}

// Plan is what every instance would change now.
type Plan struct {
	Instances []reconcile.InstancePlan `json:"instances"`
}

// Empty reports whether every instance is as it is wanted. Without an instance
// nothing is known to be wanted yet.
func (p Plan) Empty() bool {
	if len(p.Instances) == 0 {
		return false
	}
	for _, in := range p.Instances {
		if len(in.Changes) > 0 || in.Error != "" {
			return false
		}
	}
	return true
}

// Boot is the ledger of this boot: what took how long until the node was Ready.
type Boot struct {
	Began time.Time `json:"began"` // when the kernel started
	Steps []Step    `json:"steps"` // in the order in which they began
}

// Step is one step of a boot.
type Step struct {
	Name  string    `json:"name"`
	Began time.Time `json:"began"`
	Ended time.Time `json:"ended,omitzero"` // zero: not yet
}

// Wake asks one instance, or with no name all of them, to look again now.
type Wake struct {
	Instance string `json:"instance,omitempty"`
}

// failure is the body of every answer that is not a success.
type failure struct {
	Error string `json:"error"`
}
