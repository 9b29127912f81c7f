//go:build kernel

package eni

import (
	"bytes"
	"context"
	"log/slog"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

// overtaken are paths whose kernel moves on after a plan was made.
type overtaken struct {
	*Paths
	act func(node.Plan)
}

func (o overtaken) Plan(ctx context.Context) (node.Plan, error) {
	p, err := o.Paths.Plan(ctx)
	o.act(p)
	return p, err
}

// TestKernelOvertakenPlan breaks something while a plan is made for another thing
// that depends on it. The plan cannot be carried out; the one after it is made at
// once, and without a back-off.
func TestKernelOvertakenPlan(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web := newPod(t, "web")
		addr := web.add()
		host, _, _ := vethOf(keyOf(web.container()))

		for _, c := range []struct{ first, plan, then string }{
			{"ip route del default table 4001 metric 0", "add route default table 4001: via 10.0.16.1 dev eth1 onlink\n", "ip link set eth1 down"},
			{"ip route flush table 4000", "add route " + addr.String() + " table 4000: dev " + host + "\n", "ip link set " + host + " down"},
			{"ip route flush table 4000", "add route " + addr.String() + " table 4000: dev " + host + "\n", "ip link del " + host},
			{"ip addr flush dev eth1", "add address 10.0.16.4 dev eth1\nadd route default table 4001: via 10.0.16.1 dev eth1 onlink\n", "ip link set eth1 down"},
			{"nft flush map inet tkenode pods", "add nft pod " + addr.String() + ": slot 0\n", "nft delete table inet tkenode"},
		} {
			acted := false
			module := overtaken{n.net.Paths(), func(p node.Plan) {
				if !acted && p.String() == c.plan {
					acted = true
					if out, err := exec.Command("sh", "-ec", c.then).CombinedOutput(); err != nil {
						t.Errorf("%s: %v: %s", c.then, err, out)
					}
				}
			}}
			var log bytes.Buffer
			board := reconcile.NewBoard()
			board.Set("test", node.ConfigSealed, node.True, "Sealed", "")
			engine := reconcile.New(slog.New(slog.NewTextHandler(&log, nil)), board, module)
			sh(t, c.first)
			ctx, cancel := context.WithCancel(t.Context())
			began, done := time.Now(), make(chan struct{})
			go func() { defer close(done); engine.Run(ctx) }()
			n.await("pod after "+c.first+"; "+c.then, func() bool {
				return engine.Status()[0].State == reconcile.Converged && n.answers(addr)
			})
			t.Logf("%s; %s: repaired within %s", c.first, c.then, time.Since(began).Round(time.Millisecond))
			cancel()
			<-done
			if !acted || strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), "outdated") {
				t.Errorf("%s; %s: acted %v, log:\n%s", c.first, c.then, acted, &log)
			}
			if p := n.plan(); !p.Empty() {
				t.Errorf("%s; %s: plan:\n%s", c.first, c.then, p)
			}
		}
	})
}
