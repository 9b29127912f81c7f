package agent

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/kube"
	"github.com/tkenode/tkenode/agent/metrics"
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

func TestOneLine(t *testing.T) {
	for text, want := range map[string]string{
		"a\nWATCHDOG=1\r\n":             "a WATCHDOG=1  ",
		"\x1b[2Jx\x9b\u2028\u0085é\xff": " [2Jx\ufffd  é\ufffd",
		strings.Repeat("é", 4000):       strings.Repeat("é", maxLine/2) + "…",
		"x" + strings.Repeat("é", 600):  "x" + strings.Repeat("é", maxLine/2-1) + "…",
	} {
		if got := oneLine(text); got != want {
			t.Errorf("%.40q became %.60q", text, got)
		}
	}
}

func TestBeforeTheSeal(t *testing.T) {
	a := &Agent{board: reconcile.NewBoard()}
	s := a.source(nil)
	b, err := json.Marshal(api.Plan{Instances: s.Plan(t.Context())})
	if err != nil || string(b) != `{"instances":[]}` || s.Instances() == nil {
		t.Errorf("%s, %v, %v", b, s.Instances(), err)
	}
	if (api.Plan{}).Empty() {
		t.Error("a plan of nothing says that the node is as it is wanted")
	}
}

// notifications stands in for systemd's socket.
func notifications(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}

// heard reports whether state arrives within d.
func heard(c *net.UnixConn, state string, d time.Duration) bool {
	c.SetReadDeadline(time.Now().Add(d))
	b := make([]byte, 4<<10)
	for {
		n, err := c.Read(b)
		if err != nil {
			return false
		}
		if string(b[:n]) == state {
			return true
		}
	}
}

// TestWatchdogOfADeadLoop: systemd is fed while every loop turns, and no longer.
func TestWatchdogOfADeadLoop(t *testing.T) {
	systemd := notifications(t)
	t.Setenv("WATCHDOG_USEC", "300000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	log := slog.New(slog.DiscardHandler)
	a := &Agent{log: log, board: reconcile.NewBoard(), socket: filepath.Join(t.TempDir(), "agent.sock")}
	engine := reconcile.New(log, a.board, kube.NewJoin("10.0.0.5"))
	a.engine.Store(engine)
	ctx, stop := context.WithCancel(t.Context())
	loops, die := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	defer die()
	wg.Go(func() { engine.Run(loops) })
	wg.Go(func() { api.New(log, a.source(metrics.New(log, a.board.Conditions))).Run(ctx, a.socket) })
	wg.Go(func() { a.watchdog(ctx) })
	for _, state := range []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1"} {
		if !heard(systemd, state, 30*time.Second) {
			t.Fatalf("no %s", state)
		}
	}
	die()
	for deadline := time.Now().Add(time.Minute); heard(systemd, "WATCHDOG=1", 2*time.Second); {
		if time.Now().After(deadline) {
			t.Fatal("the watchdog is fed although the engine is dead")
		}
	}
}

// TestStatusIsNoReasonToEnd: a status that systemd does not take is logged.
func TestStatusIsNoReasonToEnd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	a := &Agent{options: Options{Console: io.Discard}, log: slog.New(slog.DiscardHandler), board: reconcile.NewBoard()}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := a.tell(ctx); err != nil {
		t.Error(err)
	}
}
