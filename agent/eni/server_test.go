package eni

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
)

// bare returns a network without ENIs, configuration or kernel.
func bare(t *testing.T) *Network {
	n := New(Options{
		Sealed: func() (node.Sealed, bool) { return node.Sealed{}, false }, Dir: t.TempDir(),
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	t.Cleanup(func() { n.Close() })
	return n
}

// serveFor serves a user and returns the socket.
func serveFor(t *testing.T, n *Network, uid uint32) string {
	socket := filepath.Join(t.TempDir(), "cni.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- n.serve(ctx, l, uid) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// call sends text and returns the answer.
func call(t *testing.T, socket, text string) string {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(conn, text)
	answer, _ := io.ReadAll(conn)
	return string(answer)
}

func TestServerRefusesBadRequests(t *testing.T) {
	socket := serveFor(t, bare(t), uint32(os.Getuid()))
	for text, want := range map[string]string{
		`{"command":"ADD","containerID":"../x","ifname":"eth0","netns":"/x"}`:                    "CNI_CONTAINERID",
		`{"command":"ADD","containerID":"a","ifname":"eth0/","netns":"/x"}`:                      "CNI_IFNAME",
		`{"command":"ADD","containerID":"a","ifname":"lo","netns":"/x"}`:                         "CNI_IFNAME",
		`{"command":"ADD","containerID":"a","ifname":"eth0","netns":"x"}`:                        "CNI_NETNS",
		`{"command":"ADD","containerID":"a","ifname":"eth0","netns":"/nowhere"}`:                 "no such file",
		`{"command":"ADD","containerID":"a","ifname":"eth0","netns":"/dev/null"}`:                "is not a network namespace",
		`{"command":"ADD","containerID":"a","ifname":"eth0","netns":"/proc/thread-self/ns/net"}`: "the node's own",
		`{"command":"ADD","containerID":"a","ifname":"eth0","netns":"/x","podName":"a b"}`:       "CNI_ARGS",
		`{"command":"RUN","containerID":"a","ifname":"eth0"}`:                                    "CNI_COMMAND",
		`{"command":"CHECK","containerID":"a","ifname":"eth0","netns":"/x"}`:                     "no address is recorded",
		`{"command":"DEL","containerID":"a","ifname":"eth0"}`:                                    "{}\n",
		`{"command":"GC","valid":[]}`:                                                            "{}\n",
	} {
		if got := call(t, socket, text+"\n"); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q in it", text, got, want)
		}
	}
	for _, text := range []string{"", "{]", strings.Repeat(" ", cni.MaxRequest+1) + "{}", `{"command":1}`} {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(conn, text)
		conn.(*net.UnixConn).CloseWrite()
		if answer, _ := io.ReadAll(conn); len(answer) != 0 {
			t.Errorf("%.20q: answer %q", text, answer)
		}
		conn.Close()
	}
}

func TestServerRefusesOtherUsers(t *testing.T) {
	socket := serveFor(t, bare(t), uint32(os.Getuid())+1)
	if got := call(t, socket, `{"command":"DEL","containerID":"a","ifname":"eth0"}`+"\n"); got != "" {
		t.Errorf("answer %q", got)
	}
}

// TestServerStops holds that calls under way end with the server, without an
// answer, so that the plugin asks the next agent.
func TestServerStops(t *testing.T) {
	n := bare(t)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "cni.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- n.serve(ctx, l, uint32(os.Getuid())) }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	time.AfterFunc(50*time.Millisecond, cancel)
	if answer, _ := io.ReadAll(conn); len(answer) != 0 {
		t.Errorf("answer %q", answer)
	}
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the server does not stop")
	}
}

// TestNoAddressSaysWhy holds what an operator reads in the events of a pod.
func TestNoAddressSaysWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := bare(t)
		began := time.Now()
		_, err := n.allocate(t.Context(), Pod{Attachment: keyOf("a")})
		if want := "no free VPC address: the node has no sealed configuration yet"; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
		if took := time.Since(began); took != addTimeout {
			t.Errorf("took %s", took)
		}
		n.sealed = func() (node.Sealed, bool) { return node.Sealed{}, true }
		n.setBlocked(node.Waiting("ENIAttaching", "eni-a has been attaching for 3s"))
		_, err = n.allocate(t.Context(), Pod{Attachment: keyOf("a")})
		if want := "no free VPC address: no ENI is ready; ENIAttaching: eni-a has been attaching for 3s"; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	})
}

// TestAllocateWaits holds that an ADD gets the address that becomes free.
func TestAllocateWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := bare(t)
		if err := n.ledger.record(record{Slot: &Slot{ENI: "eni-a", MAC: "m", Addrs: testSlot.Addrs[:1]}}); err != nil {
			t.Fatal(err)
		}
		n.paths.ready.Store(&map[int]int{0: 1500})
		if _, err := n.allocate(t.Context(), Pod{Attachment: keyOf("a")}); err != nil {
			t.Fatal(err)
		}
		if err := n.ledger.release(keyOf("a"), time.Now()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(coolDown - 20*time.Second)
		began := time.Now()
		time.AfterFunc(21*time.Second, func() { n.ledger.cleaned(testSlot.Addrs[:1]) }) // as the paths do
		p, err := n.allocate(t.Context(), Pod{Attachment: keyOf("b")})
		if err != nil || p.Addr != testSlot.Addrs[0] || time.Since(began) != 21*time.Second {
			t.Errorf("%s after %s, %v", p.Addr, time.Since(began), err)
		}
	})
}

func FuzzRequest(f *testing.F) {
	f.Add([]byte(`{"command":"ADD","containerID":"a","ifname":"eth0","netns":"/x"}`))
	f.Add([]byte(`{"command":"GC","valid":[{"containerID":"a"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var req cni.Request
		if json.Unmarshal(b, &req) != nil || validate(req) != nil || req.Command == cni.GC {
			return
		}
		name, mac, _ := vethOf(req.Attachment)
		if len(name) > 15 || !spells(name, mac) {
			t.Errorf("%+v: link %q", req, name)
		}
		p := Pod{Attachment: req.Attachment, Namespace: req.PodNamespace, Name: req.PodName}
		if a := alias(p); len(a) > 255 || strings.ContainsAny(a, "\x00\n") {
			t.Errorf("%+v: alias %q", req, a)
		}
	})
}

// starved is a listener whose accepts fail until its errors are used up.
type starved struct {
	net.Listener
	errs []error
}

func (l *starved) Accept() (net.Conn, error) {
	if len(l.errs) == 0 {
		return l.Listener.Accept()
	}
	err := l.errs[0]
	l.errs = l.errs[1:]
	return nil, &net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", err)}
}

func TestAcceptIsTriedAgain(t *testing.T) {
	n := bare(t)
	socket := filepath.Join(t.TempDir(), "cni.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	errs := []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ECONNABORTED, unix.EBADF}
	go func() { done <- n.serve(t.Context(), &starved{l, errs}, uint32(os.Getuid())) }()
	select {
	case err := <-done:
		if !errors.Is(err, unix.EBADF) {
			t.Errorf("serve ended with %v, not with the first error that does not pass", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("serve goes on after an error that does not pass")
	}
}
