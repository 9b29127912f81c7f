package images

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// tailLines of a failed command's output are part of the error.
const tailLines = 20

// run runs a command to its end and hands its output on line by line. When ctx
// ends, the whole process group is killed; when this process dies, the kernel
// kills the command, and with it the namespaces that hold its mounts.
func run(ctx context.Context, cmd *exec.Cmd, line func(string)) error {
	// Pdeathsig is about the thread that started the child, not the process.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	out, in := io.Pipe()
	cmd.Stdout, cmd.Stderr = in, in
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", cmd.Args[0], err)
	}
	var tail []string
	read := make(chan struct{})
	go func() {
		defer close(read)
		s := bufio.NewScanner(out)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			tail = append(tail, s.Text())
			tail = tail[max(0, len(tail)-tailLines):]
			if line != nil {
				line(s.Text())
			}
		}
		// A line too long for the scanner is not worth losing the command.
		_, _ = io.Copy(io.Discard, out)
	}()
	stop := context.AfterFunc(ctx, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	err := cmd.Wait()
	stop()
	in.Close()
	<-read
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, new(*exec.ExitError)):
		return fmt.Errorf("%s: %w:\n%s", strings.Join(cmd.Args[:min(2, len(cmd.Args))], " "), err, strings.Join(tail, "\n"))
	default:
		return err
	}
}

// asRoot returns a command that is root in namespaces of its own: whatever it
// mounts and starts is gone when it ends, however it ends. Where this process is
// not root, neither is the command: the user's range of subordinate ids
// (/etc/subuid, package uidmap) stands for the ids in the files it makes.
func asRoot(uid int, name string, args ...string) *exec.Cmd {
	ns := []string{"--mount", "--pid", "--fork", "--mount-proc", "--kill-child"}
	if uid != 0 {
		ns = append(ns, "--user", "--map-root-user", "--map-auto")
	}
	cmd := exec.Command("unshare", append(append(ns, "--", name), args...)...)
	// Debian's users do not have the administrator's programs in their path.
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	return cmd
}
