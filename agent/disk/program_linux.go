package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// programDeadline is far above the seconds that any of them takes: more means that a
// disk hangs.
const programDeadline = 5 * time.Minute

// invocation is one run of a program.
type invocation struct {
	args  []string
	stdin node.Secret // empty: there is none
	files []*os.File  // descriptors 3 and following
}

// exitError is what a program said when it failed.
type exitError struct {
	program string
	code    int // -1: it was killed
	said    string
	err     error
}

func (e *exitError) Error() string { return fmt.Sprintf("%s: %v: %s", e.program, e.err, e.said) }
func (e *exitError) Unwrap() error { return e.err }

// program runs a program to its end and returns what it printed. It is never cut off
// when ctx ends, since half a file system can be neither used nor told from data; it
// ends by its own deadline.
func program(ctx context.Context, in invocation) (string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), programDeadline)
	defer cancel()
	cmd := exec.CommandContext(ctx, in.args[0], in.args[1:]...)
	cmd.ExtraFiles = in.files
	cmd.WaitDelay = 10 * time.Second
	// udev is not asked to make device nodes, nor waited for: it is busy while the
	// machine boots, and the kernel makes those that are used here.
	cmd.Env = append(os.Environ(), "MDADM_NO_UDEV=1", "DM_DISABLE_UDEV=1", "LC_ALL=C")
	if !in.stdin.IsZero() {
		cmd.Stdin = io.Reader(strings.NewReader(in.stdin.Reveal()))
	}
	out, err := cmd.CombinedOutput()
	said := string(bytes.TrimSpace(out[:min(len(out), 1000)]))
	if err != nil {
		e := &exitError{program: in.args[0], code: -1, said: said, err: err}
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			e.code = exit.ExitCode()
		}
		return said, e
	}
	return said, nil
}
