// Package cvm is the lab's cloud virtual machine: a QEMU machine that boots the
// node image, to which disks and network interfaces are plugged while it runs.
//
// It knows nothing of instances, VPCs or volumes: lab/cloud decides what a
// machine has, lab/vpc is at the other end of its network sockets. A machine can
// be cut off at any moment (Kill), but its disks are as the host's page cache
// has them; what a loss of power leaves behind needs more than this package.
package cvm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/lab/proc"
)

// Spec describes a machine. The zero values of CPUs and MemoryMiB are those of
// the smallest CVM that a node is run on: 2 and 2048.
type Spec struct {
	Name      string // instance id
	UUID      string
	Dir       string // of this machine alone: its root disk, sockets and console
	Image     string // what the root disk is an overlay of, never written: *.qcow2, or raw
	CPUs      int
	MemoryMiB int

	Config *ConfigDrive // nil: none
	NICs   []NIC        // the first one is the primary
	Disks  []Disk
}

// NIC is a network interface, one end of a unix socket that carries frames
// preceded by their length, 4 bytes in network order.
type NIC struct {
	ID     string
	MAC    net.HardwareAddr
	Socket string
}

// Disk is a virtio disk whose serial is its ID, or what Serial says. Its file is raw:
// QEMU must never guess a format from what a guest has written.
type Disk struct {
	ID     string
	Path   string
	Serial *string // that the guest is told instead, nil: the ID
}

// Machine is a machine that has been started.
type Machine struct {
	spec  Spec
	accel Accel
	group *proc.Group
	qemu  *proc.Process
	qmp   *qmpClient

	mu       sync.Mutex
	slots    map[string]int           // device id -> root port
	unplug   map[string]chan struct{} // closed when the guest has let go of the device
	shutdown bool                     // QEMU said that the guest powered itself off
}

// The files of a machine, in its directory.
const (
	rootFile    = "root.qcow2"
	configFile  = "config.img"
	consoleFile = "console.log"
	qmpFile     = "qmp.sock"
)

// maxSocket is what fits into sockaddr_un beside the final zero (unix(7)).
const maxSocket = 107

// Start starts the machine. A directory that already holds a root disk is that
// of a machine which was stopped: it is started again with what it has written.
func Start(ctx context.Context, spec Spec) (*Machine, error) {
	if err := os.MkdirAll(spec.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	root := filepath.Join(spec.Dir, rootFile)
	if _, err := os.Stat(root); errors.Is(err, os.ErrNotExist) {
		if err := createOverlay(ctx, root, spec.Image); err != nil {
			return nil, fmt.Errorf("start %s: %w", spec.Name, err)
		}
	}
	if spec.Config != nil {
		if err := spec.Config.write(ctx, filepath.Join(spec.Dir, configFile)); err != nil {
			return nil, fmt.Errorf("start %s: %w", spec.Name, err)
		}
	}
	m := newMachine(ctx, spec)
	args, err := m.arguments()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	if err := m.run(ctx, args); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Name, err)
	}
	return m, nil
}

func newMachine(ctx context.Context, spec Spec) *Machine {
	spec.CPUs = cmp.Or(spec.CPUs, 2)
	spec.MemoryMiB = cmp.Or(spec.MemoryMiB, 2048)
	return &Machine{
		spec:   spec,
		accel:  Accelerator(ctx),
		slots:  map[string]int{},
		unplug: map[string]chan struct{}{},
	}
}

// run starts QEMU and connects to its control socket.
func (m *Machine) run(ctx context.Context, args []string) (err error) {
	socket := filepath.Join(m.spec.Dir, qmpFile)
	if len(socket) > maxSocket {
		return fmt.Errorf("socket %s: its path is longer than %d bytes", socket, maxSocket)
	}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	// The console of an earlier start is set aside, so that nobody takes what that
	// one said for this one's words.
	console := m.Console()
	if err := os.Rename(console, console+".1"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	m.group = proc.NewGroup()
	defer func() {
		if err != nil {
			err = errors.Join(err, m.group.Close())
		}
	}()
	m.qemu, err = m.group.Start(proc.Command{
		Path: qemuBinary,
		Args: append([]string{"-chardev", "socket,id=qmp,server=on,wait=off,path=" + escape(socket),
			"-mon", "chardev=qmp,mode=control"}, args...),
		Log: console,
	})
	if err != nil {
		return err
	}
	conn, err := dialWhenThere(ctx, socket, m.qemu)
	if err != nil {
		return err
	}
	m.qmp, err = newQMP(ctx, conn, m.event)
	if err != nil {
		return errors.Join(err, m.lastWords())
	}
	return nil
}

// lastWords says why QEMU has broken off: a connection that ends says less than
// what QEMU prints before it exits.
func (m *Machine) lastWords() error {
	select {
	case <-m.qemu.Done():
		return m.qemu.Err()
	case <-time.After(time.Second):
		return nil
	}
}

// dialWhenThere connects to a socket that the process has yet to create.
func dialWhenThere(ctx context.Context, socket string, p *proc.Process) (net.Conn, error) {
	var dialer net.Dialer
	for {
		conn, err := dialer.DialContext(ctx, "unix", socket)
		if err == nil {
			return conn, nil
		}
		select {
		case <-p.Done():
			return nil, p.Err()
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to QEMU: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// event notes what the machine tells about itself. The control socket's reader
// calls it.
func (m *Machine) event(name string, data json.RawMessage) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch name {
	case "SHUTDOWN":
		m.shutdown = true
	case "DEVICE_DELETED":
		var d struct{ Device string }
		if json.Unmarshal(data, &d) == nil && m.unplug[d.Device] != nil {
			close(m.unplug[d.Device])
			delete(m.unplug, d.Device)
		}
	}
}

// Stop presses the power button and waits until the guest has shut down. When
// ctx ends before that, the machine still runs.
func (m *Machine) Stop(ctx context.Context) error {
	if err := m.qmp.do(ctx, "system_powerdown", nil, nil); err != nil && !m.ended() {
		return fmt.Errorf("stop %s: %w", m.spec.Name, err)
	}
	select {
	case <-m.Done():
		return m.group.Close()
	case <-ctx.Done():
		return fmt.Errorf("stop %s: the guest has not powered off: %w", m.spec.Name, ctx.Err())
	}
}

// Kill ends the machine at once. What the guest had written to its disks is kept.
func (m *Machine) Kill() error {
	err := m.qemu.Kill()
	m.qmp.close()
	return errors.Join(err, m.group.Close())
}

// Reset presses the reset button.
func (m *Machine) Reset(ctx context.Context) error {
	if err := m.qmp.do(ctx, "system_reset", nil, nil); err != nil {
		return fmt.Errorf("reset %s: %w", m.spec.Name, err)
	}
	return nil
}

// Done is closed when the machine is off.
func (m *Machine) Done() <-chan struct{} { return m.qemu.Done() }

func (m *Machine) ended() bool {
	select {
	case <-m.Done():
		return true
	default:
		return false
	}
}

// Err says, once Done is closed, why QEMU ended; it is nil where the guest
// powered itself off or somebody stopped the machine.
func (m *Machine) Err() error {
	err := m.qemu.Err()
	<-m.qmp.done // whatever QEMU had to say has been read
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shutdown {
		return nil
	}
	return err
}

// Accel reports how the machine's processors are run.
func (m *Machine) Accel() Accel { return m.accel }

// PID returns the process id of QEMU.
func (m *Machine) PID() int { return m.qemu.PID() }

// Console returns the file that holds what the guest printed to its serial
// console. It is of bounded size: what is older, or of an earlier start, is in
// the same name with ".1".
func (m *Machine) Console() string { return filepath.Join(m.spec.Dir, consoleFile) }

// ConsoleTail returns the last n lines of the serial console.
func (m *Machine) ConsoleTail(n int) string {
	tail, err := proc.Tail(m.Console(), n)
	if err != nil {
		return err.Error()
	}
	return strings.ReplaceAll(tail, "\r", "")
}

// WaitConsole waits until text has appeared on the serial console since the
// machine was started.
func (m *Machine) WaitConsole(ctx context.Context, text string) error {
	for {
		ended := m.ended()
		if found, err := contains(m.Console(), text); err != nil || found {
			return err
		}
		if ended {
			return errors.Join(fmt.Errorf("wait for %q on the console: the machine is off", text), m.Err())
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %q on the console: %w; its last lines:\n%s", text, ctx.Err(), m.ConsoleTail(20))
		case <-m.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// contains reads as much as the console's bound lets there be.
func contains(path, text string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	return strings.Contains(string(b), text), err
}

func createOverlay(ctx context.Context, path, base string) error {
	base, err := filepath.Abs(base)
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", format(base), path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("create %s over %s: %w: %s", path, base, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// format goes by the name: QEMU must not guess it from the content.
func format(image string) string {
	if filepath.Ext(image) == ".qcow2" {
		return "qcow2"
	}
	return "raw"
}
