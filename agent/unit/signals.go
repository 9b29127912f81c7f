package unit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"

	"github.com/tkenode/tkenode/agent/node"
)

// units are those of whose changes systemd tells us.
var units = []string{node.ContainerdUnit, node.KubeletUnit, node.KubeProxyUnit, node.CoreDNSUnit}

// signals passes systemd's signals about units on to who watches them, all from
// one connection: go-systemd's own subscription drops some of them, or polls.
type signals struct {
	mu      sync.Mutex // guards the rest
	watches map[*watch]bool
	up      chan struct{} // closed while signals come
	down    chan struct{} // closed when they come no more
}

type watch struct {
	names   []string
	changed func()
}

// line returns when signals come, or ctx ends; down is closed when they no longer do.
func (s *signals) line(ctx context.Context, w *watch) (down <-chan struct{}, err error) {
	for {
		s.mu.Lock()
		s.init()
		up := s.up
		select {
		case <-up:
			s.watches[w] = true
			down = s.down
		default:
		}
		s.mu.Unlock()
		if down != nil {
			return down, nil
		}
		select {
		case <-up: // they may have ended again since
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// init makes what the zero value lacks. The caller holds mu.
func (s *signals) init() {
	if s.watches == nil {
		s.watches, s.up, s.down = map[*watch]bool{}, make(chan struct{}), make(chan struct{})
	}
}

func (s *signals) leave(w *watch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.watches, w)
}

// begin says that signals come, end that they no longer do.
func (s *signals) begin() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.init()
	close(s.up)
}

func (s *signals) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.down)
	s.up, s.down = make(chan struct{}), make(chan struct{})
}

// tell calls who watches the unit.
func (s *signals) tell(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		if slices.Contains(w.names, name) {
			w.changed()
		}
	}
}

// receiving says whether signals come. Whoever is woken by that finds nothing
// remembered from before.
func (s *Systemd) receiving(yes bool) {
	s.states.told(yes)
	if yes {
		s.signals.begin()
	} else {
		s.signals.end()
	}
}

// Watch calls changed after each change of a named unit, while Run receives the
// signals.
func (s *Systemd) Watch(ctx context.Context, names []string, changed func()) error {
	w := &watch{names, changed}
	down, err := s.signals.line(ctx, w)
	if err != nil {
		return err
	}
	defer s.signals.leave(w)
	changed()
	select {
	case <-down:
		return errors.New("the connection to the system bus is lost")
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run receives systemd's signals until ctx ends; a connection that is lost is made
// anew.
func (s *Systemd) Run(ctx context.Context) { s.keep(ctx, s.receive) }

// keep calls receive again and again, at once after signals have come for long.
func (s *Systemd) keep(ctx context.Context, receive func(context.Context) error) {
	for pause := signalsAgain; ctx.Err() == nil; pause = min(2*pause, signalsPause) {
		began := time.Now()
		if err := receive(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("systemd's signals do not come", "err", err)
		}
		if time.Since(began) > signalsPause {
			pause = signalsAgain
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// After a loss the connection is made anew soon, and later if that is in vain: units
// are looked at all the same, and a bus that is ill is told of in the journal.
const (
	signalsAgain = time.Second
	signalsPause = 30 * time.Second
)

// receive passes signals on from one connection, as long as it lasts.
func (s *Systemd) receive(ctx context.Context) error {
	if err := waitFor(ctx, systemBus); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	subscribed := time.AfterFunc(callTimeout, cancel).Stop
	defer subscribed()
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("connect to the system bus: %w", err)
	}
	defer conn.Close()
	incoming := make(chan *dbus.Signal, 64)
	conn.Signal(incoming)
	names := map[dbus.ObjectPath]string{}
	for _, name := range units {
		path := unitPath(name)
		names[path] = name
		err := conn.AddMatchSignalContext(ctx,
			dbus.WithMatchSender(service),
			dbus.WithMatchObjectPath(path),
			dbus.WithMatchInterface("org.freedesktop.DBus.Properties"),
			dbus.WithMatchMember("PropertiesChanged"))
		if err != nil {
			return fmt.Errorf("watch %s: %w", name, err)
		}
	}
	// Without a subscriber systemd sends no signals at all.
	call := conn.Object(service, "/org/freedesktop/systemd1").CallWithContext(ctx, service+".Manager.Subscribe", 0)
	if call.Err != nil {
		return fmt.Errorf("subscribe to systemd: %w", call.Err)
	}
	subscribed()
	s.receiving(true)
	defer s.receiving(false)
	for {
		select {
		case signal, ok := <-incoming:
			if !ok {
				return errors.Join(errors.New("the system bus closed the connection"), ctx.Err())
			}
			if name := names[signal.Path]; name != "" {
				s.states.forget(name)
				s.signals.tell(name)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
