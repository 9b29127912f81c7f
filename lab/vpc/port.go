package vpc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	ethernetHeader = 14
	maxFrame       = ethernetHeader + MTU
	// queueBytes bounds what waits for a machine that does not read: some 340 full frames, two of which (one being
	// written, one being filled) can exist at a time.
	queueBytes = 512 << 10
	// maxStreamFrame is QEMU's NET_BUFSIZE (include/net/net.h): a longer length can only be a stream out of step.
	maxStreamFrame = 4096 + 65536
)

// port is one ENI in the fabric.
type port struct {
	Port
	network *Network
	mac     [6]byte
	subnet  Subnet
	addrs   atomic.Pointer[[]netip.Addr] // assigned now; Port.Addrs is what it began with

	down      atomic.Bool // SetLink
	connected atomic.Bool
	out       queue // frames to the machine, each behind its length, as QEMU wants them
	counts    counts
	capture   atomic.Pointer[capture]

	link link
	gone chan struct{} // closed by shutdown
	done sync.WaitGroup
}

func (p *port) assigned() []netip.Addr { return *p.addrs.Load() }

// link carries frames between a port and a machine.
type link interface {
	serve(*port) // returns when closed
	io.Closer
}

func (p *port) shutdown() error {
	p.down.Store(true)
	close(p.gone)
	err := p.link.Close()
	p.done.Wait()
	if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrClosed) {
		err = nil // the other end was faster
	}
	return err
}

// deliver queues one packet to the machine. It never waits: a full queue drops.
func (p *port) deliver(etherType uint16, packet []byte) {
	if p.down.Load() || !p.connected.Load() {
		p.drop(DropLinkDown, nil)
		return
	}
	var head [4 + ethernetHeader]byte
	binary.BigEndian.PutUint32(head[:], uint32(ethernetHeader+len(packet)))
	copy(head[4:], p.mac[:])
	copy(head[10:], fabricMAC[:])
	binary.BigEndian.PutUint16(head[16:], etherType)
	if !p.out.put(head[:], packet, nil) {
		p.drop(DropQueueFull, nil)
		return
	}
	p.counts.rx.add(ethernetHeader + len(packet))
	if c := p.capture.Load(); c != nil {
		c.record(head[4:], packet)
	}
}

// run moves frames until the machine goes away: read calls p.network.receive for each, write sends a batch of them.
func (p *port) run(closer io.Closer, read func() error, write func(batch []byte) error) {
	p.out.reset()
	p.connected.Store(true)
	p.network.log.Info("port connected", "eni", p.ENI)
	stop := make(chan struct{})
	var writer sync.WaitGroup
	writer.Go(func() {
		defer closer.Close() // a reader must not go on alone
		var batch []byte
		for {
			select {
			case <-stop:
				return
			case <-p.out.wake:
			}
			if batch = p.out.take(batch); write(batch) != nil {
				return
			}
		}
	})
	err := read()
	p.connected.Store(false)
	close(stop)
	closer.Close()
	writer.Wait()
	level := slog.LevelInfo
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrClosed) {
		level = slog.LevelWarn
	}
	p.network.log.Log(context.Background(), level, "port disconnected", "eni", p.ENI, "err", err)
}

// streamServer accepts QEMU's -netdev stream: every frame behind its length in 4 bytes, big-endian.
type streamServer struct {
	listener net.Listener

	mu      sync.Mutex
	current net.Conn
	closed  bool
}

func listenUnix(path string) (net.Listener, error) {
	if fi, err := os.Lstat(path); err == nil && fi.Mode().Type() == os.ModeSocket {
		os.Remove(path) // left by a lab that was killed
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (s *streamServer) serve(p *port) {
	var session sync.WaitGroup
	defer session.Wait()
	for {
		conn, err := s.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of file descriptors, for one
			p.network.log.Error("accept a machine", "eni", p.ENI, "err", err)
			select {
			case <-p.gone:
				return
			case <-time.After(time.Second):
				continue
			}
		}
		if !s.replace(conn) {
			return
		}
		session.Wait()
		session.Go(func() {
			p.run(conn, func() error { return readStream(conn, p) }, func(batch []byte) error {
				_, err := conn.Write(batch)
				return err
			})
		})
	}
}

// replace ends the connection before this one.
func (s *streamServer) replace(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		conn.Close()
		return false
	}
	if s.current != nil {
		s.current.Close()
	}
	s.current = conn
	return true
}

func (s *streamServer) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	if s.current != nil {
		s.current.Close()
	}
	return s.listener.Close()
}

// readStream hands every frame of r to the port's fabric. One read brings as many frames as the socket holds.
func readStream(r io.Reader, p *port) error {
	buf := make([]byte, 64<<10)
	pending, skip := 0, 0
	for {
		got, err := r.Read(buf[pending:])
		data := buf[:pending+got]
		for {
			if skip > 0 {
				cut := min(skip, len(data))
				data, skip = data[cut:], skip-cut
			}
			if len(data) < 4 {
				break
			}
			size := int64(binary.BigEndian.Uint32(data))
			if size == 0 || size > maxStreamFrame {
				return fmt.Errorf("frame of %d bytes: not QEMU's stream format", size)
			}
			if size > maxFrame {
				p.drop(DropMalformed, nil)
				skip = 4 + int(size)
				continue
			}
			if len(data) < 4+int(size) {
				break
			}
			p.network.receive(p, data[4:4+size])
			data = data[4+size:]
		}
		pending = copy(buf, data)
		if err != nil {
			return err
		}
	}
}

// tapLink carries frames of a tap: one system call each.
type tapLink struct {
	file *os.File
}

func (t *tapLink) Close() error { return t.file.Close() }

func (t *tapLink) serve(p *port) {
	p.run(t.file, func() error {
		buf := make([]byte, maxFrame+1)
		for {
			size, err := t.file.Read(buf)
			if err != nil {
				return err
			}
			p.network.receive(p, buf[:size])
		}
	}, func(batch []byte) error {
		for len(batch) > 0 {
			size := binary.BigEndian.Uint32(batch)
			// A tap that is down refuses frames and comes back; one that is gone ends the reader.
			if _, err := t.file.Write(batch[4 : 4+size]); errors.Is(err, os.ErrClosed) {
				return err
			} else if err != nil {
				p.drop(DropLinkDown, nil)
			}
			batch = batch[4+size:]
		}
		return nil
	})
}

// queue is a bounded run of bytes between many who put and one who takes all of it at once.
type queue struct {
	wake  chan struct{} // holds a token when there may be something to take
	limit int

	mu  sync.Mutex
	buf []byte
}

func (q *queue) init(limit int) {
	q.wake = make(chan struct{}, 1)
	q.limit = limit
}

// put appends a, b and c together or, when that would exceed the limit, not at all.
func (q *queue) put(a, b, c []byte) bool {
	q.mu.Lock()
	if len(q.buf)+len(a)+len(b)+len(c) > q.limit {
		q.mu.Unlock()
		return false
	}
	q.buf = append(append(append(q.buf, a...), b...), c...)
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return true
}

// take returns what was put and keeps spare, which it returned before, to be filled next.
func (q *queue) take(spare []byte) []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	buf := q.buf
	q.buf = spare[:0]
	return buf
}

func (q *queue) reset() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.buf = q.buf[:0]
}
