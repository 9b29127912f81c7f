package api

import (
	"log/slog"
	"net"
	"sync"
)

// guard reads who connects, and closes at once the connections of strangers that
// are more than n. Root's own are not counted: the agent watches itself over this
// socket, and no reader shall be able to stop it from doing so.
func guard(l net.Listener, n int, log *slog.Logger) *guarded {
	return &guarded{Listener: l, places: make(chan struct{}, n), trusted: peer.trusted, log: log}
}

type guarded struct {
	net.Listener
	places  chan struct{}
	trusted func(peer) bool // tests replace it
	log     *slog.Logger
}

func (g *guarded) Accept() (net.Conn, error) {
	for {
		c, err := g.Listener.Accept()
		if err != nil {
			return nil, err
		}
		p, err := readPeer(c.(*net.UnixConn))
		if err != nil {
			g.log.Warn("a connection is closed", "err", err)
			_ = c.Close()
			continue
		}
		if g.trusted(p) {
			return &conn{Conn: c, peer: p, release: func() {}}, nil
		}
		select {
		case g.places <- struct{}{}:
			return &conn{Conn: c, peer: p, release: sync.OnceFunc(func() { <-g.places })}, nil
		default:
			_ = c.Close()
		}
	}
}

// conn knows its peer and gives its place back when it is closed.
type conn struct {
	net.Conn
	peer    peer
	release func()
}

func (c *conn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
