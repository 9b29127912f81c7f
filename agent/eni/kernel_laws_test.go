//go:build kernel

package eni

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
)

// TestKernelLaw7UnknownWantDeletesNothing: without a configuration nobody knows
// what is wanted, so what is there stays.
func TestKernelLaw7UnknownWantDeletesNothing(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		before := n.kernelDump()
		n.net.sealed = func() (node.Sealed, bool) { return node.Sealed{}, false }
		p, err := n.net.Paths().Plan(t.Context())
		if err == nil || !p.Empty() {
			t.Errorf("%v%v", p, err)
		}
		if n.kernelDump() != before {
			t.Error("planning changed the kernel")
		}
	})
}

// TestKernelLaw9ADDWaitsForTheAgent makes an ADD while the agent is down. The
// socket is held beyond the agent's life, as systemd does.
func TestKernelLaw9ADDWaitsForTheAgent(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		held, err := net.ListenUnix("unix", &net.UnixAddr{Name: cni.Socket, Net: "unix"})
		must(t, err)
		defer held.Close()
		serve := func() (stop func()) {
			f, err := held.File()
			must(t, err)
			l, err := net.FileListener(f)
			must(t, errors.Join(err, f.Close()))
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error)
			go func() { done <- n.net.Serve(ctx, l) }()
			return func() {
				cancel()
				must(t, <-done)
			}
		}
		serve()()
		if _, err := os.Lstat(cni.Socket); err != nil {
			t.Fatalf("the agent took the socket with it: %v", err)
		}
		web := newPod(t, "web")
		added := make(chan netip.Addr)
		go func() { added <- web.add() }()
		select {
		case a := <-added:
			t.Fatalf("got %s from nobody", a)
		case <-time.After(300 * time.Millisecond):
		}
		n.restart()
		n.converge()
		defer serve()()
		select {
		case a := <-added:
			web.listen()
			n.reached(a)
		case <-time.After(time.Minute):
			t.Fatal("still waiting")
		}
	})
}
