package disk

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/unit"

	"github.com/tkenode/tkenode/agent/node"
)

// What may block in the kernel for ever is done by a process of its own: a thread
// that hangs there keeps its whole process from ending, however it is killed, and
// the agent would not restart any more. One that is late is put into a transient
// scope, so that it belongs to nobody who is restarted; while that is there, no agent
// sends another. Of those that return in time systemd and its journal know nothing.

// helperProgram is that process: a program of its own, since it is started twice a
// minute for every disk, and the agent's own takes six times as long to start. A
// variable for tests.
var helperProgram = []string{"/usr/lib/tkenode/bin/tke-disk"}

// helperLate is when a helper is late: a disk answers in some milliseconds, and one
// that is throttled in some hundreds.
const helperLate = 2 * time.Second

// errHangs says that a helper has not returned.
type errHangs struct{ step string }

func (e errHangs) Error() string { return "the " + e.step + " does not return" }

// errOut says that a helper of this disk is still out.
var errOut = errors.New("an earlier one has not returned")

// errMute says that a helper has ended, as when it is killed, and not said what it found.
var errMute = errors.New("the helper has ended without an answer; see `journalctl -u tkenode-agent` and `dmesg` for who killed it; it is tried again")

// errands sends helpers out, one at a time.
type errands struct {
	disk  *Disk
	scope string // the unit in which one is that is late

	mu  sync.Mutex // held while a helper is waited for; guards out
	out *helper    // nil: none is
}

// helper is a process that is out for a disk.
type helper struct {
	step  string
	began time.Time
	ended chan struct{} // closed when the process has

	cmd     *exec.Cmd
	errand  io.WriteCloser // its standard input
	answers *os.File       // its standard output
}

// scopeName returns the name of a unit for helpers that look at the mount, or that read
// a disk: of a stripe each has its own.
func scopeName(want node.DiskConfig, reads bool) string {
	name := "tkenode-disk-helper-" + systemd.UnitNamePathEscape(want.MountPoint)
	if reads {
		name += "-reads-" + systemd.UnitNameEscape(want.DiskID)
	}
	return name + ".scope"
}

// start starts a helper, which waits for its errand and has files from descriptor 3 on.
// It goes on when the agent ends, unless it reads.
func (d *Disk) start(files []*os.File) (*helper, error) {
	h := &helper{began: time.Now(), ended: make(chan struct{}), cmd: exec.Command(d.program[0], d.program[1:]...)}
	h.cmd.Stderr, h.cmd.ExtraFiles = os.Stderr, files
	var err error
	if h.errand, err = h.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	var theirs *os.File
	if h.answers, theirs, err = os.Pipe(); err != nil {
		return nil, err
	}
	h.cmd.Stdout = theirs
	if err := errors.Join(h.cmd.Start(), theirs.Close()); err != nil {
		return nil, errors.Join(err, h.answers.Close())
	}
	go func() { // it ends with the process, which is killed at the deadline
		defer close(h.ended)
		_ = h.cmd.Wait()
	}()
	return h, nil
}

// banish puts a helper that is late into a scope of its own.
func (s *errands) banish(ctx context.Context, h *helper) {
	select {
	case <-h.ended:
		return
	default:
	}
	d := s.disk
	if d.systemd == nil {
		return
	}
	if err := d.systemd.Scope(ctx, s.scope, "A look of tkenode at the disk of "+d.want.MountPoint+", which is late", h.cmd.Process.Pid); err != nil {
		d.log.Warn("a helper that is late stays with the agent", "mountPoint", d.want.MountPoint, "err", err)
	}
}

// free returns errOut while a helper is out, of this agent or of an earlier one. The
// caller holds mu.
func (s *errands) free(ctx context.Context) error {
	if h := s.out; h != nil {
		select {
		case <-h.ended:
		default:
			return errOut
		}
	}
	if s.disk.systemd != nil { // an earlier agent's
		if out, err := s.disk.systemd.Running(ctx, s.scope); err == nil && out {
			return errOut
		}
	}
	return nil
}

// send sends a helper out, with files from its descriptor 3 on, and returns what it has
// found. It is waited for until nothing has been heard of it for quiet; then it is of
// errHangs. What hangs is killed, which may be in vain, and left behind: but for a mount,
// which may have a long journal to replay. heard, if there is one, is told how many bytes
// have been read.
func (s *errands) send(ctx context.Context, e errand, quiet time.Duration, heard func(read int64), files ...*os.File) ([]finding, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.free(ctx); err != nil {
		return nil, err
	}
	h, err := s.disk.start(files)
	if err != nil {
		return nil, fmt.Errorf("start helper: %w; if it is not there, install the package tkenode anew", err)
	}
	s.out = h
	defer h.answers.Close()
	if err := json.NewEncoder(h.errand).Encode(e); err != nil {
		_ = h.cmd.Process.Kill() // it waits for its errand, and so can be
		<-h.ended
		s.out = nil
		return nil, fmt.Errorf("send helper: %w", err)
	}
	found, err := s.listen(ctx, h, quiet, heard)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		if err != nil { // whatever it says, nobody listens any more
			_ = h.cmd.Process.Kill()
		}
		<-h.ended // it has closed its end, so it is ending
		s.out = nil
		return found, err
	}
	if e.Act != toMount {
		_ = h.cmd.Process.Kill()
		select {
		case <-h.ended:
			s.out = nil
		case <-time.After(dropPatience):
			s.disk.log.Error("left behind, a helper does not return", "mountPoint", s.disk.want.MountPoint, "step", h.step, "pid", h.cmd.Process.Pid)
		}
	}
	if err := ctx.Err(); errors.Is(err, context.Canceled) {
		return found, err
	}
	return found, errHangs{h.step}
}

// listen takes in what a helper says, until it ends or has said nothing for quiet, or
// ctx ends: then the error is os.ErrDeadlineExceeded.
func (s *errands) listen(ctx context.Context, h *helper, quiet time.Duration, heard func(read int64)) (found []finding, err error) {
	enough := func() { _ = h.answers.SetReadDeadline(time.Now()) }
	defer context.AfterFunc(ctx, enough)()
	deadline := time.AfterFunc(quiet, enough)
	defer deadline.Stop()
	banished := make(chan struct{})
	late := time.AfterFunc(helperLate, func() { s.banish(ctx, h); close(banished) })
	defer func() {
		if !late.Stop() {
			<-banished
		}
	}()
	lines := bufio.NewScanner(h.answers)
	for lines.Scan() {
		var f finding
		if err := json.Unmarshal(lines.Bytes(), &f); err != nil {
			return found, fmt.Errorf("read helper's answer: %w", err)
		}
		if f.Read > 0 { // it gets on
			if late.Stop() {
				late.Reset(helperLate)
			}
			deadline.Reset(quiet)
			if heard != nil {
				heard(f.Read)
			}
		}
		if h.step = f.Step; f.Ended {
			found, h.step = append(found, f), ""
		}
	}
	return found, lines.Err()
}

// read has a helper read dev, for which disk is open for direct reads. What hangs is
// content, too.
func (d *Disk) read(ctx context.Context, disk *os.File, dev device, e errand, quiet time.Duration, heard func(read int64)) (content, error) {
	e.SizeBytes = dev.SizeBytes
	found, err := d.reads.send(ctx, e, quiet, heard, disk)
	if hangs := new(errHangs); errors.As(err, hangs) || errors.Is(err, errOut) {
		return content{Hung: true, Proving: fmt.Sprintf("%s does not answer: %v; look at the disk in the console, and detach it if it does not come back", dev, err)}, nil
	}
	if err == nil && (len(found) != 1 || found[0].Content == nil) {
		err = errMute
	}
	if err != nil {
		return content{}, fmt.Errorf("read %s: %w", dev, err)
	}
	c := *found[0].Content
	c.at = found[0].At
	return c, nil
}
