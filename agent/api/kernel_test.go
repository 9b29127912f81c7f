//go:build kernel

package api

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// stranger is a user and a group that no system hands out to a login.
const stranger = 61234

// TestKernelAccess has processes of other users ask, as the kernel tells them apart.
func TestKernelAccess(t *testing.T) {
	if path := os.Getenv("TKENODE_TEST_ASK"); path != "" {
		ask(path)
		return
	}
	const group = 61235
	dir := t.TempDir()
	for d := dir; d != "/" && d != "."; d = filepath.Dir(d) { // others must be able to reach it
		if info, err := os.Stat(d); err == nil && info.Mode().Perm()&0o001 == 0 {
			if err := os.Chmod(d, info.Mode().Perm()|0o011); err != nil {
				t.Fatal(err)
			}
		}
	}
	path := filepath.Join(dir, "s")
	s := New(slog.New(slog.DiscardHandler), source())
	s.group = group
	ended := make(chan error, 1)
	go func() { ended <- s.Run(t.Context(), path) }()
	for {
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			break
		}
		select {
		case err := <-ended:
			t.Fatal(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	// The test binary lies in a directory that only root can enter.
	exe := filepath.Join(dir, "ask")
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exe, self, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		cred syscall.Credential
		want string
	}{
		{"root", syscall.Credential{}, "status 200, wake 200"},
		{"primary group", syscall.Credential{Uid: stranger, Gid: group}, "status 200, wake 403"},
		{"supplementary group", syscall.Credential{Uid: stranger, Gid: stranger, Groups: []uint32{group}}, "status 200, wake 403"},
		{"stranger", syscall.Credential{Uid: stranger, Gid: stranger, Groups: []uint32{stranger}}, "denied"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestKernelAccess$")
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), "TKENODE_TEST_ASK="+path)
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &tc.cred}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if got, _, _ := strings.Cut(string(out), "\n"); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

// ask prints what this process is answered.
func ask(path string) {
	c := NewClient(path)
	get, err := c.http.Get("http://tkenode/v1/status")
	if errors.Is(err, os.ErrPermission) {
		_, _ = io.WriteString(os.Stdout, "denied\n")
		return
	}
	if err != nil {
		panic(err)
	}
	get.Body.Close()
	post, err := c.http.Post("http://tkenode/v1/wake", "application/json", strings.NewReader("{}"))
	if err != nil {
		panic(err)
	}
	post.Body.Close()
	_, _ = io.WriteString(os.Stdout, "status "+get.Status[:3]+", wake "+post.Status[:3]+"\n")
}
