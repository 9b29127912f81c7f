package kube

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	dialTimeout   = 10 * time.Second
	headerTimeout = 10 * time.Second
	headerBytes   = 8 << 10
)

// DialFunc connects to an address of the VPC.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// egress is the way of the API server into the VPC, for logs, exec,
// port-forward and webhooks: an HTTP proxy on a unix socket that understands
// CONNECT alone. The API server calls it HTTPConnect.
// Source: https://kubernetes.io/docs/tasks/extend-kubernetes/setup-konnectivity/
type egress struct {
	dial     DialFunc
	listener net.Listener
	ctx      context.Context
	cancel   context.CancelFunc
	conns    sync.WaitGroup // with the accept loop
}

func newEgress(socket string, dial DialFunc) (*egress, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("listen for the API server's calls: %w", err)
	}
	e := &egress{dial: dial, listener: l}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.conns.Go(e.serve)
	return e, nil
}

func (e *egress) serve() {
	for {
		conn, err := e.listener.Accept()
		if err == nil {
			e.conns.Go(func() { e.handle(conn) })
			continue
		}
		select {
		case <-e.ctx.Done():
			return
		case <-time.After(100 * time.Millisecond): // out of descriptors: some will be freed
		}
	}
}

// handle joins the caller to the address that it asks for.
func (e *egress) handle(caller net.Conn) {
	defer caller.Close()
	defer context.AfterFunc(e.ctx, func() { caller.Close() })()
	fromCaller, address, status := readConnect(caller)
	if status != http.StatusOK {
		refuse(caller, status, "")
		return
	}
	ctx, cancel := context.WithTimeout(e.ctx, dialTimeout)
	defer cancel()
	target, err := e.dial(ctx, "tcp", address)
	if err != nil {
		refuse(caller, http.StatusBadGateway, err.Error())
		return
	}
	defer target.Close()
	defer context.AfterFunc(e.ctx, func() { target.Close() })()
	if _, err := io.WriteString(caller, "HTTP/1.1 200 Connection established\r\n\r\n"); err == nil {
		join(caller, fromCaller, target)
	}
}

// readConnect reads a request of bounded size in bounded time.
func readConnect(caller net.Conn) (rest io.Reader, address string, status int) {
	limited := &io.LimitedReader{R: caller, N: headerBytes}
	reader := bufio.NewReader(limited)
	if caller.SetReadDeadline(time.Now().Add(headerTimeout)) != nil {
		return nil, "", http.StatusInternalServerError
	}
	r, err := http.ReadRequest(reader)
	if err != nil {
		return nil, "", http.StatusBadRequest
	}
	if r.Method != http.MethodConnect {
		return nil, "", http.StatusMethodNotAllowed
	}
	if caller.SetReadDeadline(time.Time{}) != nil {
		return nil, "", http.StatusInternalServerError
	}
	limited.N = math.MaxInt64 // the tunnel has no limit
	return reader, r.Host, http.StatusOK
}

// refuse answers a caller that may be gone already.
func refuse(caller net.Conn, status int, text string) {
	_ = caller.SetWriteDeadline(time.Now().Add(headerTimeout))
	_, _ = fmt.Fprintf(caller, "HTTP/1.1 %d %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s",
		status, http.StatusText(status), len(text), text)
}

// join copies both ways until both have ended. The end of one direction is
// passed on, since exec without input relies on it.
func join(caller net.Conn, fromCaller io.Reader, target net.Conn) {
	var up sync.WaitGroup
	up.Go(func() {
		_, err := io.Copy(target, fromCaller)
		endWrite(target, err)
	})
	_, err := io.Copy(caller, target)
	endWrite(caller, err)
	up.Wait()
}

func endWrite(c net.Conn, err error) {
	half, ok := c.(interface{ CloseWrite() error })
	if err != nil || !ok || half.CloseWrite() != nil {
		c.Close()
	}
}

// close ends every tunnel and waits for them.
func (e *egress) close() error {
	e.cancel()
	err := e.listener.Close()
	e.conns.Wait()
	return err
}
