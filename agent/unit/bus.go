package unit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// Bus is what this package asks of systemd.
type Bus interface {
	// Unit returns the state of a unit; LastLog is left empty.
	Unit(ctx context.Context, name string) (State, error)
	// Start and Restart return when the job has ended, with an error unless its
	// result is "done".
	Start(ctx context.Context, name string) error
	Restart(ctx context.Context, name string) error
	Reload(ctx context.Context) error
	// LastLog returns the unit's last words in the journal, or nothing.
	LastLog(ctx context.Context, name string) string
	// Watch calls changed after each change of a named unit. It returns only on
	// failure or when ctx ends.
	Watch(ctx context.Context, names []string, changed func()) error
}

const (
	systemBus   = "/run/dbus/system_bus_socket"
	callTimeout = 10 * time.Second // PID 1 that is slower than this is sick
	service     = "org.freedesktop.systemd1"
)

// Systemd is the Bus of the machine's PID 1. Its connection is made when it is
// first needed, and again when it is lost.
type Systemd struct {
	log     *slog.Logger
	signals signals
	states  states

	mu   sync.Mutex // guards the rest
	conn *systemd.Conn
	end  context.CancelFunc // of the connection
}

// NewSystemd returns the Bus. It connects to nothing yet; Watch needs Run.
func NewSystemd(log *slog.Logger) *Systemd { return &Systemd{log: log} }

// Close ends the connection.
func (s *Systemd) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop()
}

func (s *Systemd) drop() {
	if s.conn != nil {
		s.conn.Close()
		s.end()
		s.conn = nil
	}
}

// connection returns the one connection. Its context is its lifetime, and so not
// the caller's.
func (s *Systemd) connection() (*systemd.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil && s.conn.Connected() {
		return s.conn, nil
	}
	s.drop()
	// The agent is up before the bus is; Watch wakes when it has come.
	if _, err := os.Stat(systemBus); err != nil {
		return nil, node.Waiting("SystemBusStarting", "the system bus is not up yet: %w", err)
	}
	// A deadline would end the connection, too.
	ctx, cancel := context.WithCancel(context.Background())
	late := time.AfterFunc(callTimeout, cancel)
	conn, err := systemd.NewSystemConnectionContext(ctx)
	late.Stop()
	if err != nil {
		cancel()
		return nil, fmt.Errorf("connect to systemd: %w", err)
	}
	s.conn, s.end = conn, cancel
	return conn, nil
}

// Unit returns the state of a unit, as it was at the last signal of its changes or
// is now.
func (s *Systemd) Unit(ctx context.Context, name string) (State, error) {
	return s.states.of(ctx, name, func(ctx context.Context) (State, error) { return s.ask(ctx, name) })
}

// ask asks systemd for the state of a unit.
func (s *Systemd) ask(ctx context.Context, name string) (State, error) {
	conn, err := s.connection()
	if err != nil {
		return State{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	all, err := conn.ListUnitsByNamesContext(ctx, []string{name})
	if err == nil && len(all) != 1 {
		err = fmt.Errorf("%d answers", len(all))
	}
	if err != nil {
		return State{}, fmt.Errorf("ask systemd for %s: %w", name, err)
	}
	st := State{Load: all[0].LoadState, Active: all[0].ActiveState, Sub: all[0].SubState}
	if st.Load == "not-found" {
		return st, nil
	}
	p := properties{ctx: ctx, conn: conn, unit: name}
	st.NeedReload = value[bool](&p, "Unit", "NeedDaemonReload")
	if st.running() {
		pid := value[uint32](&p, "Service", "MainPID")
		st.Started = time.UnixMicro(int64(value[uint64](&p, "Service", "ExecMainStartTimestamp")))
		if p.err == nil {
			st.Files, p.err = environment(pid, digestVariable)
		}
		st.Up = sinceBoot() - time.Duration(value[uint64](&p, "Unit", "ActiveEnterTimestampMonotonic"))*time.Microsecond
	} else {
		st.Result = value[string](&p, "Service", "Result")
		st.ExitStatus = int(value[int32](&p, "Service", "ExecMainStatus"))
	}
	return st, p.err
}

// properties reads properties of a unit until the first error.
type properties struct {
	ctx  context.Context
	conn *systemd.Conn
	unit string
	err  error
}

func value[T any](p *properties, kind, name string) (v T) {
	if p.err != nil {
		return v
	}
	got, err := p.conn.GetUnitTypePropertyContext(p.ctx, p.unit, kind, name)
	if err != nil {
		p.err = fmt.Errorf("ask systemd for %s of %s: %w", name, p.unit, err)
		return v
	}
	v, ok := got.Value.Value().(T)
	if !ok {
		p.err = fmt.Errorf("ask systemd for %s of %s: it is a %T", name, p.unit, got.Value.Value())
	}
	return v
}

// environment returns a variable of a process, or nothing if it has none such.
func environment(pid uint32, name string) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return "", node.Waiting("Restarting", "process %d has just ended", pid)
	}
	if err != nil {
		return "", fmt.Errorf("read what process %d was started with: %w", pid, err)
	}
	for v := range strings.SplitSeq(string(b), "\x00") {
		if text, ok := strings.CutPrefix(v, name+"="); ok {
			return text, nil
		}
	}
	return "", nil
}

func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0 // cannot happen: the clock exists
	}
	return time.Duration(ts.Nano())
}

// Start starts a unit, also one that has used up its start limit.
func (s *Systemd) Start(ctx context.Context, name string) error {
	return s.job(ctx, name, (*systemd.Conn).StartUnitContext)
}

// Restart stops and starts a unit.
func (s *Systemd) Restart(ctx context.Context, name string) error {
	return s.job(ctx, name, (*systemd.Conn).RestartUnitContext)
}

func (s *Systemd) job(ctx context.Context, name string, enqueue func(*systemd.Conn, context.Context, string, string, chan<- string) (int, error)) error {
	conn, err := s.connection()
	if err != nil {
		return err
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	if err := conn.ResetFailedUnitContext(call, name); err != nil && !notLoaded(err) {
		return fmt.Errorf("reset %s: %w", name, err)
	}
	// The signals of what the job has changed may come after its end.
	defer s.states.forget(name)
	result := make(chan string, 1) // without room, an abandoned wait would block the connection for ever
	if _, err := enqueue(conn, call, name, "replace", result); err != nil {
		return fmt.Errorf("ask systemd: %w", err)
	}
	select {
	case r := <-result:
		if r != "done" {
			return fmt.Errorf("systemd's job ended with %q", r)
		}
		return nil
	case <-ctx.Done():
		return node.Waiting("Starting", "%s is still on its way: %w", name, ctx.Err())
	}
}

func notLoaded(err error) bool {
	e, ok := errors.AsType[dbus.Error](err)
	return ok && e.Name == "org.freedesktop.systemd1.NoSuchUnit"
}

// Reload makes systemd read its unit files again.
func (s *Systemd) Reload(ctx context.Context) error {
	conn, err := s.connection()
	if err != nil {
		return err
	}
	defer s.states.forget()
	return conn.ReloadContext(ctx)
}

// LastLog asks journalctl.
func (s *Systemd) LastLog(ctx context.Context, name string) string {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "journalctl", "--unit", name, "--lines", "1", "--output", "cat", "--quiet", "--no-pager",
		"_SYSTEMD_UNIT="+name) // the unit's own words, not systemd's about it
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(out[:min(len(out), 400)]))
}

// waitFor returns once path exists. It is asked for often because it is missing
// only for a moment of each boot, in which a launch would stand still.
func waitFor(ctx context.Context, path string) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// unitPath returns the D-Bus object of a unit.
func unitPath(name string) dbus.ObjectPath {
	return dbus.ObjectPath("/org/freedesktop/systemd1/unit/" + systemd.PathBusEscape(name))
}
