package unit

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// stateAge is how long a state is remembered at most: of some properties,
// NeedDaemonReload among them, systemd sends no signal.
const stateAge = 5 * time.Second

// states remembers what systemd has said of units while its signals tell of their
// changes. A unit that starts sends a dozen of them, each wakes every instance
// that looks at it, and a state takes PID 1 and the bus half a dozen messages.
type states struct {
	asking singleflight.Group

	mu      sync.Mutex // guards the rest
	current bool       // signals come
	changes int        // told of so far: what was asked for before one may be old
	known   map[string]remembered
}

type remembered struct {
	State
	at time.Time
}

// told says whether forget is called, from now on, after each change of a unit.
func (s *states) told(current bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current, s.known = current, map[string]remembered{}
	s.changes++
}

// forget drops what is remembered of units that may have changed: the named, or all.
func (s *states) forget(names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes++
	if len(names) == 0 {
		clear(s.known)
	}
	for _, name := range names {
		delete(s.known, name)
	}
}

// settled reports whether systemd tells of whatever will be different next. Between
// fork and exec a process has not got its own environment yet, and of exec nobody
// is told.
func (s State) settled() bool { return !s.running() || s.Files != "" }

// of returns the state of a unit: what is remembered, of those of whose changes
// systemd tells us, or what ask returns, which has a deadline of its own. Those who
// want it at the same time share one answer.
func (s *states) of(ctx context.Context, name string, ask func(context.Context) (State, error)) (State, error) {
	s.mu.Lock()
	r, ok := s.known[name]
	changes := s.changes
	s.mu.Unlock()
	if age := time.Since(r.at); ok && age < stateAge {
		if r.running() {
			r.Up += age
		}
		return r.State, nil
	}
	answer := s.asking.DoChan(fmt.Sprintf("%s after %d", name, changes), func() (any, error) {
		st, err := ask(context.WithoutCancel(ctx)) // others wait for it, too
		s.mu.Lock()
		defer s.mu.Unlock()
		if err == nil && s.current && s.changes == changes && st.settled() && slices.Contains(units, name) {
			s.known[name] = remembered{st, time.Now()}
		}
		return st, err
	})
	select {
	case a := <-answer:
		return a.Val.(State), a.Err
	case <-ctx.Done():
		return State{}, fmt.Errorf("ask systemd for %s: %w", name, ctx.Err())
	}
}
