package cvm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

const (
	// qmpLine bounds a message of QEMU. The longest that is asked for, the state
	// of a migration, has about a kilobyte.
	qmpLine = 1 << 20
	// qmpTimeout bounds a command. QEMU answers in milliseconds, but on a host
	// with too little memory its main loop can stand still for seconds.
	qmpTimeout = 30 * time.Second
)

// qmpError is QEMU's refusal of a command.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return e.Desc }

// qmpMessage is any line that QEMU sends: an answer, an event or the greeting.
// Source: https://www.qemu.org/docs/master/interop/qmp-spec.html
type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       *uint64         `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *qmpError       `json:"error"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
}

// qmpClient is a connection to QEMU's control socket. Its reader ends when the
// connection does.
type qmpClient struct {
	conn  net.Conn
	event func(name string, data json.RawMessage) // called by the reader: must not block

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan qmpMessage

	done chan struct{}
	err  error // before done is closed: why the reader ended
}

// newQMP takes over conn, waits for the greeting and leaves the negotiation mode.
func newQMP(ctx context.Context, conn net.Conn, event func(string, json.RawMessage)) (*qmpClient, error) {
	q := &qmpClient{
		conn:    conn,
		event:   event,
		pending: map[uint64]chan qmpMessage{},
		done:    make(chan struct{}),
	}
	greeted := make(chan struct{})
	go q.read(greeted)
	select {
	case <-greeted:
	case <-q.done:
		return nil, fmt.Errorf("read QMP greeting: %w", q.err)
	case <-ctx.Done():
		q.close()
		return nil, fmt.Errorf("read QMP greeting: %w", ctx.Err())
	}
	if err := q.do(ctx, "qmp_capabilities", nil, nil); err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

func (q *qmpClient) read(greeted chan<- struct{}) {
	defer close(q.done)
	defer q.conn.Close()
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, qmpLine)
	for lines.Scan() {
		var m qmpMessage
		if err := json.Unmarshal(lines.Bytes(), &m); err != nil {
			q.err = fmt.Errorf("decode QMP message: %w", err)
			return
		}
		switch {
		case m.Greeting != nil && greeted != nil:
			close(greeted)
			greeted = nil
		case m.Event != "":
			q.event(m.Event, m.Data)
		case m.ID != nil:
			q.answer(m)
		case m.Error != nil: // without an id: QEMU could not parse what it got
			q.err = fmt.Errorf("QMP: %w", m.Error)
			return
		}
	}
	if q.err = lines.Err(); q.err == nil {
		q.err = errors.New("QEMU closed its control socket")
	}
}

func (q *qmpClient) answer(m qmpMessage) {
	q.mu.Lock()
	ch := q.pending[*m.ID]
	delete(q.pending, *m.ID)
	q.mu.Unlock()
	if ch != nil { // nil: nobody waits any longer
		ch <- m
	}
}

// do runs a command and decodes what it returns into result, where that is not
// nil. A command whose ctx ends may still be carried out.
func (q *qmpClient) do(ctx context.Context, command string, args, result any) error {
	ctx, cancel := context.WithTimeout(ctx, qmpTimeout)
	defer cancel()
	m, err := q.roundTrip(ctx, command, args)
	if err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, result); err != nil {
		return fmt.Errorf("QMP %s: decode answer: %w", command, err)
	}
	return nil
}

func (q *qmpClient) roundTrip(ctx context.Context, command string, args any) (qmpMessage, error) {
	answer := make(chan qmpMessage, 1)
	if err := q.send(ctx, command, args, answer); err != nil {
		return qmpMessage{}, err
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			return qmpMessage{}, m.Error
		}
		return m, nil
	case <-q.done:
		return qmpMessage{}, q.err
	case <-ctx.Done():
		return qmpMessage{}, ctx.Err()
	}
}

func (q *qmpClient) send(ctx context.Context, command string, args any, answer chan qmpMessage) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.next++
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, q.next})
	if err != nil {
		return err
	}
	deadline, _ := ctx.Deadline()
	if err := q.conn.SetWriteDeadline(deadline); err != nil {
		return err
	}
	q.pending[q.next] = answer
	if _, err := q.conn.Write(append(line, '\n')); err != nil {
		delete(q.pending, q.next)
		return err
	}
	return nil
}

// close ends the connection and waits for the reader.
func (q *qmpClient) close() {
	q.conn.Close()
	<-q.done
}
