// Package proc runs the lab's child processes so that none can outlive the lab.
//
// Every child is in a process group of its own, so that a Ctrl-C at the terminal
// reaches the lab alone, which then stops its children in order; and the kernel
// kills a child when the lab dies without having been able to. What a child
// prints goes to a file of bounded size, and how it ended is reported with the
// last lines of it.
//
// It is not a supervisor: nothing is restarted here.
package proc

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// drain is how long the rest of the output is waited for after a child has
	// ended, since a descendant of it may hold the pipe open.
	drain = 2 * time.Second
	// killed is how long a child may take to vanish after SIGKILL. It is longer
	// than that only in uninterruptible sleep in the kernel.
	killed = 10 * time.Second
	// tailLines is how many lines of the log an error carries.
	tailLines = 12
)

// Command says what to run.
type Command struct {
	Path string   // the executable, looked up in PATH where it has no slash
	Args []string // without the program's own name
	Env  []string // added to the lab's own environment
	Dir  string
	Log  string        // file that receives stdout and stderr, and Log+".1" what no longer fits
	Stop time.Duration // from SIGTERM to SIGKILL; zero: 5 s
}

// Group owns processes: Close ends what is left of them, the latest first.
type Group struct {
	spawn chan func()

	mu     sync.Mutex
	procs  []*Process
	closed bool
}

// NewGroup returns an empty group.
func NewGroup() *Group {
	g := &Group{spawn: make(chan func())}
	go g.spawner()
	return g
}

// spawner starts the children. It never unlocks its thread, because Pdeathsig is
// sent when the thread ends that forked the child, not when the process does
// (prctl(2), PR_SET_PDEATHSIG); so the thread must live as long as the children.
func (g *Group) spawner() {
	runtime.LockOSThread()
	for start := range g.spawn {
		start()
	}
}

// Start runs c as a member of the group.
func (g *Group) Start(c Command) (*Process, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, fmt.Errorf("start %s: its group is closed", c.Path)
	}
	log, err := openLog(c.Log)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	if c.Stop == 0 {
		c.Stop = 5 * time.Second
	}
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Dir = c.Dir
	cmd.Env = append(cmd.Environ(), c.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.WaitDelay = drain
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}

	started := make(chan error, 1)
	g.spawn <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		log.close()
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	p := &Process{name: filepath.Base(c.Path), cmd: cmd, log: log, grace: c.Stop, done: make(chan struct{})}
	// Those that have ended need no Close; the list must not grow with restarts.
	g.procs = append(slices.DeleteFunc(g.procs, (*Process).ended), p)
	go p.wait()
	return p, nil
}

// Close stops every process of the group, the latest first, and waits for each.
func (g *Group) Close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil
	}
	g.closed = true
	var errs []error
	for _, p := range slices.Backward(g.procs) {
		errs = append(errs, p.Stop())
	}
	close(g.spawn)
	return errors.Join(errs...)
}

// Process is one child.
type Process struct {
	name  string
	cmd   *exec.Cmd
	log   *logFile
	grace time.Duration

	mu     sync.Mutex
	reaped bool // the number of the process group may be somebody else's
	asked  bool // somebody wanted it to end

	done chan struct{}
	err  error // before done is closed: how it ended
}

// wait reaps the child and whatever of its group it left behind.
func (p *Process) wait() {
	pid := p.cmd.Process.Pid
	// The child is seen dead but not reaped, so until cmd.Wait below the group's
	// number cannot have been given to another.
	for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.mu.Lock()
	_ = unix.Kill(-pid, unix.SIGKILL) // ESRCH: nobody else is in it
	p.reaped = true
	p.mu.Unlock()

	err := p.cmd.Wait()
	p.log.close()
	p.mu.Lock()
	asked := p.asked
	p.mu.Unlock()
	if !asked {
		p.err = p.explain(err)
	}
	close(p.done)
}

func (p *Process) explain(err error) error {
	how := "exit status 0"
	if err != nil {
		how = err.Error()
	}
	tail, _ := p.Tail(tailLines) // without a log, how it ended is still worth saying
	return fmt.Errorf("%s (pid %d) ended: %s; last lines of %s:\n%s", p.name, p.PID(), how, p.log.path, indent(tail))
}

func indent(s string) string { return "\t" + strings.ReplaceAll(s, "\n", "\n\t") }

// PID returns the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended and has been reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says, once Done is closed, why the process ended by itself; it is nil for
// one that Stop or Kill ended.
func (p *Process) Err() error {
	<-p.done
	return p.err
}

// Tail returns the last n lines that the process printed.
func (p *Process) Tail(n int) (string, error) { return Tail(p.log.path, n) }

// Stop sends SIGTERM, SIGKILL after the grace period, and waits for the end.
func (p *Process) Stop() error {
	p.signal(unix.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(p.grace):
		return p.Kill()
	}
}

// Kill sends SIGKILL and waits for the end.
func (p *Process) Kill() error {
	p.signal(unix.SIGKILL)
	select {
	case <-p.done:
		return nil
	case <-time.After(killed):
		return fmt.Errorf("kill %s (pid %d): still there after %v", p.name, p.PID(), killed)
	}
}

func (p *Process) signal(s unix.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		p.asked = true
		_ = unix.Kill(-p.PID(), s) // the group is there: nobody has reaped its leader
	}
}

func (p *Process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}
