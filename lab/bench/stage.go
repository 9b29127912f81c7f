package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// stageLimit is several times what a stage takes.
const stageLimit = 8 * time.Minute

// message is a line that a stage's process prints.
type message struct {
	Say    string  `json:"say,omitempty"`
	Figure *Figure `json:"figure,omitempty"`
}

// reporter is how a stage's process tells the one that has started it.
type reporter struct{ out *json.Encoder }

func (r reporter) say(format string, args ...any) {
	r.out.Encode(message{Say: fmt.Sprintf(format, args...)})
}

func (r reporter) figure(f Figure) { r.out.Encode(message{Figure: &f}) }

// runStage runs a stage of a measurement in a process of its own, in namespaces of
// its own: this program with the command line command, stage, options. It ends with
// this one, however that ends, and with it everything that lives in its namespaces.
func runStage(ctx context.Context, p Progress, namespaces uintptr, command, stage string, options any) (figures []Figure, err error) {
	in, err := json.Marshal(options)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, stageLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", command, stage, string(in))
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: namespaces,
		Setpgid:    true, // a Ctrl-C is for us to pass on
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	// The signal of the parent's death is that of the thread which has started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	lines := json.NewDecoder(out)
	for {
		var m message
		if err := lines.Decode(&m); err != nil {
			if err != io.EOF {
				cancel()
				return nil, errors.Join(err, cmd.Wait())
			}
			break
		}
		if m.Say != "" {
			p.Say("%s", m.Say)
		}
		if m.Figure != nil {
			figures = append(figures, *m.Figure)
		}
	}
	if err := cmd.Wait(); err != nil {
		return nil, errors.Join(err, ctx.Err())
	}
	return figures, nil
}
