package agent

import (
	"context"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/metrics"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

// launch has keep run a sealed configuration until end.
func launch(t *testing.T, cfg node.Config, render func(node.Config, node.Facts) ([]node.File, error), cni net.Listener) (a *Agent, ended <-chan error, end func()) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	a = &Agent{options: Options{Log: log, Console: io.Discard, Files: render}, log: log, board: reconcile.NewBoard()}
	s, err := node.Seal(1, cfg, node.Facts{InstanceID: "ins-1", Region: "ap-guangzhou"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	a.board.Set("bootstrap", node.ConfigSealed, node.True, "Sealed", "")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.keep(ctx, s, cni, metrics.New(log, a.board.Conditions)) }()
	return a, done, cancel
}

// minimal is the least that bootstrap seals, as far as the agent is concerned.
func minimal(t *testing.T) node.Config {
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	return node.Config{Cluster: node.ClusterConfig{Endpoint: "https://127.0.0.1:1", CertificateAuthority: string(ca)}}
}

func noFiles(node.Config, node.Facts) ([]node.File, error) { return nil, nil }

func listener(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "cni.sock"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 30 s: %s", what)
		}
	}
}

// TestEveryConditionHasAModule: one that nobody serves would block, for ever, who
// needs it.
func TestEveryConditionHasAModule(t *testing.T) {
	a, ended, end := launch(t, minimal(t), noFiles, listener(t))
	eventually(t, "the engine does not run", func() bool { return a.engine.Load() != nil })
	served := map[node.ConditionType]bool{}
	for _, in := range a.engine.Load().Status() {
		served[in.Condition] = true
	}
	for _, c := range a.board.Conditions() {
		if !served[c.Type] && c.Status != node.True {
			t.Errorf("no module serves %s, which is %s", c.Type, c.Status)
		}
		if c.Type == node.DisksReady && c.Reason != "NoneWanted" {
			t.Errorf("without a wanted disk: %+v", c)
		}
	}
	end()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestKeepEndsWithTheCNISocket: the daemon has to end, and to be restarted, when
// it cannot serve pods any more.
func TestKeepEndsWithTheCNISocket(t *testing.T) {
	l := listener(t)
	l.Close()
	_, ended, end := launch(t, minimal(t), noFiles, l)
	defer end()
	select {
	case err := <-ended:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("keep ended with %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("keep waits for an engine that nobody ends")
	}
}

func TestUnusableConfigurationIsACondition(t *testing.T) {
	a, ended, end := launch(t, minimal(t), func(node.Config, node.Facts) ([]node.File, error) {
		return nil, errors.New("kubelet.config: unknown field")
	}, listener(t))
	eventually(t, "ConfigSealed is still True", func() bool {
		c, _ := a.board.Unmet(node.ConfigSealed)
		return len(c) == 1 && c[0].Reason == "Unusable" && strings.Contains(c[0].Message, "render files: kubelet.config: unknown field; install")
	})
	select {
	case err := <-ended:
		t.Errorf("keep ended: %v", err)
	default:
	}
	end()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
