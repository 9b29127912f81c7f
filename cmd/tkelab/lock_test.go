package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// testCache is a cache directory with a short path, for the control socket.
func testCache(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tkelab")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	t.Setenv("TKENODE_CACHE", dir)
	if err := cleanLabDir(); err != nil {
		t.Fatal(err)
	}
	oldSilence, oldPatience := silence, patience
	silence, patience = time.Second, 5*time.Second
	t.Cleanup(func() { silence, patience = oldSilence, oldPatience })
}

// playLab holds the lock and answers as a lab in that state, and ends when it is
// asked to, or at once when it is stopping already.
func playLab(t *testing.T, s state) (asked *atomic.Bool) {
	t.Helper()
	held, err := lock("a test")
	if err != nil {
		t.Fatal(err)
	}
	control, err := net.Listen("unix", socket())
	if err != nil {
		t.Fatal(err)
	}
	asked = &atomic.Bool{}
	end := func() { control.Close(); held.Close() }
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(stateAnswer{s})
		if s == stopping {
			time.AfterFunc(300*time.Millisecond, end)
		}
	})
	mux.HandleFunc("POST /v1/down", func(http.ResponseWriter, *http.Request) {
		asked.Store(true)
		time.AfterFunc(300*time.Millisecond, end)
	})
	server := &http.Server{Handler: mux}
	go func() { _ = server.Serve(control) }()
	t.Cleanup(func() { server.Close(); held.Close() })
	return asked
}

func testProgress(t *testing.T) *progress {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	p := newProgress(f)
	t.Cleanup(p.Close)
	return p
}

func TestTakeLab(t *testing.T) {
	for _, c := range []struct {
		state state
		wants string // of the error; empty: the lab is taken
		down  bool   // the other one was asked to end
	}{
		{starting, "another tkelab is starting a lab (a test, process", false},
		{attached, "another tkelab is starting a lab (a test, process", false},
		{detached, "", true},
		{stopping, "", false},
	} {
		t.Run(string(c.state), func(t *testing.T) {
			testCache(t)
			asked := playLab(t, c.state)
			held, err := takeLab(t.Context(), "tkelab demo", testProgress(t))
			if c.wants == "" && err != nil || c.wants != "" && (err == nil || !strings.Contains(err.Error(), c.wants)) {
				t.Errorf("error %v, want %q", err, c.wants)
			}
			if asked.Load() != c.down {
				t.Errorf("asked to end: %v", asked.Load())
			}
			if err == nil {
				held.Close()
			}
		})
	}
}

func TestTakeLabFromOneThatIsSilent(t *testing.T) {
	testCache(t)
	held, err := lock("tkelab bench")
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := takeLab(t.Context(), "tkelab demo", testProgress(t)); err == nil || !strings.Contains(err.Error(), "held by tkelab bench") {
		t.Errorf("error %v", err)
	}
	if _, err := stopLab(t.Context()); err == nil || !strings.Contains(err.Error(), "held by tkelab bench") {
		t.Errorf("down: %v", err)
	}
}

// down comes before the lab listens: it is not told that there is no lab.
func TestDownDuringTheStart(t *testing.T) {
	testCache(t)
	held, err := lock("tkelab demo")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		was, err := stopLab(context.Background())
		if !was {
			t.Error("no lab, says down")
		}
		done <- err
	}()
	time.Sleep(200 * time.Millisecond)
	held.Close()
	asked := playLab(t, starting)
	if err := <-done; err != nil || !asked.Load() {
		t.Errorf("down: %v, asked %v", err, asked.Load())
	}
}

// The lock stays with the process that it was handed to.
func TestLockIsHandedOn(t *testing.T) {
	testCache(t)
	held, err := lock("tkelab demo")
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("sleep", "60")
	child.ExtraFiles = []*os.File{held}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	held.Close()
	if there, err := locked(); err != nil || !there {
		t.Errorf("locked %v, %v while the child has it", there, err)
	}
	_ = child.Process.Kill()
	_ = child.Wait()
	if there, err := locked(); err != nil || there {
		t.Errorf("locked %v, %v after its end", there, err)
	}
}

func TestProxyCommandIsQuoted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "it's a 100% path")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	self := filepath.Join(dir, "tkelab")
	if err := os.WriteFile(self, []byte("#!/bin/sh\necho \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	// As ssh does it, in this order. Source: sshconnect.c, ssh_proxy_connect.
	text := "exec " + strings.NewReplacer("%%", "%", "%h", "10.0.0.1", "%p", "22").Replace(proxyCommand(self))
	out, err := exec.Command("sh", "-c", text).CombinedOutput()
	if err != nil || string(out) != "connect 10.0.0.1:22\n" {
		t.Errorf("%s: %v %s", text, err, out)
	}
}

// TestWaitKey: a login waits until the console says that cloud-init is past it.
func TestWaitKey(t *testing.T) {
	console := filepath.Join(t.TempDir(), "console.log")
	if err := os.WriteFile(console, []byte("NodeReady is True\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- waitKey(ctx, console) }()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("without the key: %v", err)
	}
	if err := os.WriteFile(console, []byte("cloud-init[707]: Cloud-init v. 22.4.2 running 'modules:config' at Tue\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := waitKey(t.Context(), console); err != nil {
		t.Errorf("with the key: %v", err)
	}
}
