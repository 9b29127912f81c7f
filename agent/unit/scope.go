package unit

import (
	"context"
	"fmt"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"

	"github.com/tkenode/tkenode/agent/node"
)

// What package disk asks of systemd: see disk.Systemd.

// Running reports whether a unit runs, or is on its way to or from it.
func (s *Systemd) Running(ctx context.Context, name string) (bool, error) {
	conn, err := s.connection()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	all, err := conn.ListUnitsByNamesContext(ctx, []string{name})
	if err == nil && len(all) != 1 {
		err = fmt.Errorf("%d answers", len(all))
	}
	if err != nil {
		return false, fmt.Errorf("ask systemd for %s: %w", name, err)
	}
	return all[0].ActiveState != "inactive" && all[0].ActiveState != "failed", nil
}

// Stop stops a unit and returns when it has ended.
func (s *Systemd) Stop(ctx context.Context, name string) error {
	return s.job(ctx, name, (*systemd.Conn).StopUnitContext)
}

// Current reports whether systemd has read a unit from file, as the file is now. One
// that systemd does not know it will read when it first needs it.
func (s *Systemd) Current(ctx context.Context, name, file string) (bool, error) {
	conn, err := s.connection()
	if err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	p := properties{ctx: ctx, conn: conn, unit: name}
	from := value[string](&p, "Unit", "FragmentPath")
	again := value[bool](&p, "Unit", "NeedDaemonReload")
	return from == file && !again, p.err
}

// Scope puts a process into a transient scope of its own; there is an error if there
// is one of that name already. The scope goes with its last process.
func (s *Systemd) Scope(ctx context.Context, name, description string, pid int) error {
	conn, err := s.connection()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	result := make(chan string, 1)
	_, err = conn.StartTransientUnitContext(ctx, name, "fail", []systemd.Property{
		systemd.PropDescription(description),
		systemd.PropPids(uint32(pid)),
		{Name: "CollectMode", Value: dbus.MakeVariant("inactive-or-failed")},
		// What hangs in the kernel does not end, and must not hold up a shutdown.
		{Name: "TimeoutStopUSec", Value: dbus.MakeVariant(uint64(5 * time.Second / time.Microsecond))},
	}, result)
	if err != nil {
		return fmt.Errorf("make scope %s: %w", name, err)
	}
	select {
	case r := <-result:
		if r != "done" {
			return fmt.Errorf("make scope %s: systemd's job ended with %q", name, r)
		}
		return nil
	case <-ctx.Done():
		return node.Waiting("Starting", "scope %s is still on its way: %w", name, ctx.Err())
	}
}
