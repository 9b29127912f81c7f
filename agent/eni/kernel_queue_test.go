//go:build kernel

package eni

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

// TestKernelQueuedDEL removes pods while no agent answers: one before it starts,
// one while systemd holds the socket. The next agent has removed both before it
// answers anything, but not a pod that was added since.
func TestKernelQueuedDEL(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		before := n.kernelDump()
		stop := n.serve()
		web, db, again := newPod(t, "web"), newPod(t, "db"), newPod(t, "again")
		web.add()
		db.add()
		again.add()
		stop()
		must(t, os.RemoveAll(cni.Socket))
		_, err := web.plugin("DEL", nil)
		must(t, err)
		held, err := net.Listen("unix", cni.Socket)
		must(t, err)
		_, err = db.plugin("DEL", map[string]any{"cniVersion": "0.3.1"}) // as TKE calls it
		must(t, err)
		held.Close()
		must(t, cni.Queue(cni.QueueDir).Put(cni.Deletion{Attachment: keyOf(again.container()), At: time.Now().Add(-time.Hour)}))
		must(t, cni.Queue(cni.QueueDir).Put(cni.Deletion{Attachment: cni.Attachment{ContainerID: "../..", IfName: "eth0"}}))

		n.restart()
		n.converge()
		defer n.serve()()
		if _, err := again.plugin("CHECK", map[string]any{"prevResult": map[string]any{}}); err != nil {
			t.Errorf("a pod that was added after the DEL: %v", err)
		}
		s, err := n.net.State()
		must(t, err)
		if len(s.Pods) != 1 || s.Pods[0].Name != "again" {
			t.Errorf("pods: %+v", s.Pods)
		}
		if _, err := again.plugin("DEL", nil); err != nil {
			t.Error(err)
		}
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan after DEL:\n%s", p)
		}
		must(t, n.net.paths.reap())
		if after := n.kernelDump(); after != before {
			t.Errorf("after DEL:\n%s\nbefore ADD:\n%s", after, before)
		}
		left, err := os.ReadDir(cni.QueueDir)
		if err != nil || len(left) != 0 {
			t.Errorf("queue: %v, %v", left, err)
		}
	})
}

// TestKernelQueuedDELOfALostLedger removes a pod while no agent answers, and then the
// ledger: the agent that finds the pod's link takes it away as it was asked to.
func TestKernelQueuedDELOfALostLedger(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		before := n.kernelDump()
		stop := n.serve()
		web := newPod(t, "web")
		addr := web.add()
		stop()
		must(t, os.RemoveAll(cni.Socket))
		_, err := web.plugin("DEL", nil)
		must(t, err)
		must(t, n.net.Close())
		must(t, os.Remove(filepath.Join(n.dir, "ledger")))
		n.start()
		s, err := n.net.ledger.state()
		must(t, err)
		if len(s.Pods) != 1 {
			t.Fatalf("the link was not found: %+v", s.Pods)
		}
		n.record()
		n.converge()
		defer n.serve()()
		n.await("no pod", func() bool {
			s, err := n.net.State()
			must(t, err)
			return len(s.Pods) == 0
		})
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan after the DEL:\n%s", p)
		}
		if after := n.kernelDump(); after != before {
			t.Errorf("after the DEL:\n%s\nbefore ADD:\n%s", after, before)
		}
		if s, err := n.net.ledger.state(); err != nil || !s.restsUntil(addr).After(time.Now()) {
			t.Errorf("%s does not rest: %v", addr, err)
		}
	})
}

// TestKernelCollect removes a pod that the runtime has lost, and neither one that
// it knows nor one in which a process runs.
func TestKernelCollect(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		known, gone, busy := newPod(t, "known"), newPod(t, "gone"), newPod(t, "busy")
		known.add()
		gone.add()
		busy.add()
		process := exec.Command("cat")
		hold, err := process.StdinPipe()
		must(t, err)
		must(t, busy.enter(process.Start))
		defer process.Wait()
		defer hold.Close()

		answer, answerErr := map[string]bool{known.container(): true}, error(nil)
		n.net.sandboxes = func(context.Context) (map[string]bool, error) { return answer, answerErr }
		pods := func() int {
			s, err := n.net.State()
			must(t, err)
			return len(s.Pods)
		}
		start := time.Now()
		must(t, n.net.collect(t.Context(), start))
		must(t, n.net.collect(t.Context(), start.Add(unknownFor-time.Second)))
		answerErr = io.ErrUnexpectedEOF
		if err := n.net.collect(t.Context(), start.Add(unknownFor)); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a runtime that does not answer: %v", err)
		}
		answerErr = nil
		must(t, n.net.collect(t.Context(), start.Add(2*unknownFor)))
		if got := pods(); got != 3 {
			t.Fatalf("%d pods, want all 3: the runtime was silent in between", got)
		}
		must(t, n.net.collect(t.Context(), start.Add(3*unknownFor)))
		s, err := n.net.State()
		must(t, err)
		if len(s.Pods) != 2 || s.Pods[0].Name != "busy" || s.Pods[1].Name != "known" {
			t.Errorf("pods: %+v", s.Pods)
		}
		if p := n.plan(); !p.Empty() {
			t.Errorf("plan:\n%s", p)
		}
	})
}
