package kube

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func startEgress(t *testing.T, dial DialFunc) (socket string, e *egress) {
	t.Helper()
	socket = filepath.Join(shortDir(t), "egress.sock")
	e, err := newEgress(socket, dial)
	if err != nil {
		t.Fatal(err)
	}
	return socket, e
}

// call sends a request and returns the answer's head and the connection behind it.
func call(t *testing.T, socket, request string) (*http.Response, io.Reader, net.Conn) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	if err != nil {
		t.Fatal(err)
	}
	return resp, r, conn
}

// echo is a kubelet that says where it was called and repeats what it hears,
// until it hears no more.
func echo(ctx context.Context, network, address string) (net.Conn, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		c, err := l.Accept()
		l.Close() // not before: the connection would go with it
		if err != nil {
			return
		}
		defer c.Close()
		io.WriteString(c, network+" "+address+"\n")
		io.Copy(c, c)
		io.WriteString(c, "end")
	}()
	return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
}

func TestEgressJoins(t *testing.T) {
	socket, e := startEgress(t, echo)
	defer e.close()
	// What follows the request in the same packet belongs to the tunnel.
	resp, r, conn := call(t, socket, "CONNECT 10.0.0.5:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nhello ")
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("status %s", resp.Status)
	}
	io.WriteString(conn, "kubelet\n")
	if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if want := "tcp 10.0.0.5:10250\nhello kubelet\nend"; err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
}

func TestEgressRefuses(t *testing.T) {
	socket, e := startEgress(t, func(context.Context, string, string) (net.Conn, error) {
		return nil, errors.New("no route to 10.0.0.99")
	})
	defer e.close()
	for _, c := range []struct {
		name, request string
		status        int
		text          string
	}{
		{"a target that is not there", "CONNECT 10.0.0.99:10250 HTTP/1.1\r\nHost: x\r\n\r\n", http.StatusBadGateway, "no route to 10.0.0.99"},
		{"another method", "GET http://10.0.0.99/ HTTP/1.1\r\nHost: x\r\n\r\n", http.StatusMethodNotAllowed, ""},
		{"no HTTP", "\x16\x03\x01 hello\r\n\r\n", http.StatusBadRequest, ""},
		{"a head without end", "CONNECT x HTTP/1.1\r\nX: " + strings.Repeat("y", headerBytes), http.StatusBadRequest, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp, r, _ := call(t, socket, c.request)
			if resp.StatusCode != c.status {
				t.Errorf("status %s, want %d", resp.Status, c.status)
			}
			if text, _ := io.ReadAll(r); string(text) != c.text {
				t.Errorf("body %q, want %q", text, c.text)
			}
		})
	}
}

func TestEgressCloseEndsTunnels(t *testing.T) {
	socket, e := startEgress(t, echo)
	_, r, _ := call(t, socket, "CONNECT 10.0.0.5:10250 HTTP/1.1\r\nHost: x\r\n\r\n")
	silent, err := net.Dial("unix", socket) // has not said what it wants
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	closed := make(chan error, 1)
	go func() { closed <- e.close() }()
	select {
	case err := <-closed:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("close waits for a tunnel to end by itself")
	}
	if _, err := io.ReadAll(r); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the tunnel is still there")
	}
}

func FuzzEgress(f *testing.F) {
	f.Add([]byte("CONNECT 10.0.0.5:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"))
	f.Add([]byte("CONNECT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, request []byte) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		e := &egress{ctx: ctx, dial: func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("nowhere") }}
		caller, conn := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			e.handle(conn)
		}()
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			io.Copy(io.Discard, caller)
		}()
		caller.Write(request)
		cancel()
		<-done
		<-answered
	})
}
