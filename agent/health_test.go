package agent

import (
	"testing"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

func TestIsNews(t *testing.T) {
	instances := []reconcile.InstanceStatus{
		{Name: "disk/data", Condition: node.DisksReady, Reason: "Foreign", Class: node.ClassTerminal.String()},
		{Name: "unit/containerd", Condition: node.RuntimeReady, Reason: "Error", Class: node.ClassTransient.String()},
	}
	none := node.Condition{}
	is := func(c node.ConditionType, s node.Status, reason string) node.Condition {
		return node.Condition{Type: c, Status: s, Reason: reason}
	}
	for _, c := range []struct {
		name      string
		told, now node.Condition
		want      bool
	}{
		{"not observed yet", none, is(node.NodeReady, node.Unknown, "NotObservedYet"), false},
		{"on its way", none, is(node.DisksReady, node.False, "Applying"), false},
		{"True at once", none, is(node.DisksReady, node.True, "Converged"), true},
		{"still True", is(node.DisksReady, node.True, "Converged"), is(node.DisksReady, node.True, "Converged"), false},
		{"lost", is(node.NetworkReady, node.True, "Converged"), is(node.NetworkReady, node.False, "Applying"), true},
		{"still lost", is(node.NetworkReady, node.False, "Applying"), is(node.NetworkReady, node.False, "Error"), false},
		{"a human must act", none, is(node.DisksReady, node.False, "Foreign"), true},
		{"told that a human must act", is(node.DisksReady, node.False, "Foreign"), is(node.DisksReady, node.False, "Foreign"), false},
		{"lost, and a human must act", is(node.DisksReady, node.True, "Converged"), is(node.DisksReady, node.False, "Foreign"), true},
		{"lost before, now a human must act", is(node.DisksReady, node.False, "Applying"), is(node.DisksReady, node.False, "Foreign"), true},
		{"fails and is tried again", none, is(node.RuntimeReady, node.False, "Error"), false},
	} {
		if got := isNews(c.told, c.now, instances); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
