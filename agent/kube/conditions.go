package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// Wanted is what the Node has to say of the machine.
type Wanted struct {
	// Conditions are True where something is wrong, False where it is known that
	// nothing is, and Unknown where nothing is known: then the Node's is left as it is.
	Conditions []node.Condition
	// Cordon is why the node must not be given work; empty: it may.
	Cordon string
	// Known says that an empty Cordon is known to be right.
	Known bool
}

// Conditions writes what is wrong with the machine into the Node, and cordons it where
// it must not be given work. It satisfies reconcile.Module.
type Conditions struct {
	ready *Ready
	want  func() Wanted
}

// NewConditions returns the module for the Node that ready watches.
func NewConditions(ready *Ready, want func() Wanted) *Conditions { return &Conditions{ready, want} }

// Name returns "kube/conditions".
func (c *Conditions) Name() string { return "kube/conditions" }

// Condition returns NodeReady, from which what is done here takes nothing away.
func (c *Conditions) Condition() node.ConditionType { return node.NodeReady }

// Needs returns what has to be so before there is a Node.
func (c *Conditions) Needs() []node.ConditionType { return []node.ConditionType{node.NodeJoined} }

// Watch wakes when the Node has changed.
func (c *Conditions) Watch(ctx context.Context, wake func()) error {
	defer c.ready.listen(wake)()
	wake()
	<-ctx.Done()
	return ctx.Err()
}

// Plan compares the Node, as Ready has seen it last, with what is wanted.
func (c *Conditions) Plan(context.Context) (node.Plan, error) {
	p := node.Plan{Serving: true} // the node is as Ready with them as without
	seen := c.ready.sight()
	if !seen.registered {
		return p, nil // who looks for the Node says so
	}
	want := c.want()
	name := c.ready.name
	if set := stale(want.Conditions, seen); len(set) > 0 {
		p.Add(func(ctx context.Context) error { return c.set(ctx) }, "tell Node %s: %s", name, describe(set))
	}
	switch by := seen.annotations[CordonedBy]; {
	case want.Cordon != "" && !seen.unschedulable && by == "":
		p.Add(func(ctx context.Context) error {
			return c.apply(c.ready.client.cordon(ctx, name, want.Cordon))
		}, "cordon Node %s: %s", name, want.Cordon)
	case want.Cordon == "" && want.Known && by != "":
		p.Add(func(ctx context.Context) error {
			return c.apply(c.ready.client.uncordon(ctx, name))
		}, "uncordon Node %s, which was cordoned because %s", name, by)
	}
	return p, nil
}

// Apply carries p out.
func (c *Conditions) Apply(ctx context.Context, p node.Plan) error { return p.Apply(ctx) }

// set writes what is stale by now.
func (c *Conditions) set(ctx context.Context) error {
	seen := c.ready.sight()
	set := stale(c.want().Conditions, seen)
	if len(set) == 0 {
		return nil
	}
	return c.apply(c.ready.client.setConditions(ctx, c.ready.name, set, func(t node.ConditionType) bool {
		i := slices.IndexFunc(set, func(s node.Condition) bool { return s.Type == t })
		return seen.condition(string(t)).Status != string(set[i].Status)
	}))
}

// apply takes in what the API server answers, which the watch tells only later.
func (c *Conditions) apply(o object, err error) error {
	if err != nil {
		return err
	}
	c.ready.take(o)
	return nil
}

// stale returns the conditions that the Node does not show as they are. What is well
// is only said where the Node shows what the agent has written before: a detector of
// the cluster's may keep a condition of the same type.
func stale(want []node.Condition, seen sight) []node.Condition {
	var set []node.Condition
	for _, w := range want {
		have := seen.condition(string(w.Type))
		switch {
		case w.Status == node.Unknown:
		case w.Status == node.False && (have.Status != string(node.True) || !strings.HasPrefix(have.Reason, reasonPrefix)):
		case have.Status == string(w.Status) && have.Reason == w.Reason:
			// The message's figures grow; the Node is not written to for that.
		default:
			set = append(set, w)
		}
	}
	return set
}

// reasonPrefix begins the reasons of the conditions that are the agent's.
const reasonPrefix = "Disk"

func describe(all []node.Condition) string {
	var texts []string
	for _, c := range all {
		text := fmt.Sprintf("%s is %s (%s)", c.Type, c.Status, c.Reason)
		if c.Message != "" {
			text += ", " + c.Message
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, "; ")
}
