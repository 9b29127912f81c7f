package proc

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// parentEnv makes the test binary a lab that starts one child and hangs.
const parentEnv = "PROC_TEST_PARENT_LOG"

func TestMain(m *testing.M) {
	if log := os.Getenv(parentEnv); log != "" {
		parent(log)
	}
	os.Exit(m.Run())
}

func parent(log string) {
	p, err := NewGroup().Start(Command{Path: "sleep", Args: []string{"300"}, Log: log})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	fmt.Println(p.PID())
	select {}
}

func TestChildDiesWithTheLab(t *testing.T) {
	lab := exec.Command(os.Args[0])
	lab.Env = append(os.Environ(), parentEnv+"="+filepath.Join(t.TempDir(), "log"))
	out, err := lab.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.Start(); err != nil {
		t.Fatal(err)
	}
	defer lab.Wait()
	defer lab.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatalf("the lab said %q", line)
	}
	// A pidfd becomes readable when its process ends, reaped or not.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if awaitExit(t, fd, 100*time.Millisecond) {
		t.Fatal("the child ended before the lab did")
	}
	if err := lab.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if !awaitExit(t, fd, 5*time.Second) {
		unix.Kill(pid, unix.SIGKILL)
		t.Fatal("the child outlived the lab")
	}
}

func awaitExit(t *testing.T, pidfd int, limit time.Duration) bool {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(time.Until(deadline).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		return n == 1
	}
}

func start(t *testing.T, g *Group, c Command) *Process {
	t.Helper()
	if c.Log == "" {
		c.Log = filepath.Join(t.TempDir(), "log")
	}
	p, err := g.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func group(t *testing.T) *Group {
	g := NewGroup()
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

func sh(script string) Command { return Command{Path: "/bin/sh", Args: []string{"-c", script}} }

func TestErrCarriesTheLastLines(t *testing.T) {
	p := start(t, group(t), sh("echo first; echo address already in use >&2; exit 3"))
	err := p.Err()
	if err == nil {
		t.Fatal("no error for a process that ended by itself")
	}
	for _, want := range []string{"sh (pid ", "exit status 3", "first\n\taddress already in use"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not say %q", err, want)
		}
	}
}

func TestStopIsNoFailure(t *testing.T) {
	p := start(t, group(t), Command{Path: "sleep", Args: []string{"300"}})
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := p.Err(); err != nil {
		t.Errorf("Err = %v after Stop", err)
	}
	if err := p.Stop(); err != nil {
		t.Errorf("second Stop: %v", err)
	}
}

func TestStopKillsWhatIgnoresSIGTERM(t *testing.T) {
	c := sh("trap '' TERM; echo ready; while :; do sleep 1; done")
	c.Stop = 100 * time.Millisecond
	p := start(t, group(t), c)
	awaitTail(t, p, "ready")
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
}

func TestDescendantsEndWithTheChild(t *testing.T) {
	p := start(t, group(t), sh("sleep 300 & echo $!; exit 0"))
	<-p.Done()
	tail, err := p.Tail(1)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(tail)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if !awaitExit(t, fd, 5*time.Second) {
		t.Error("a descendant is left")
	}
}

func TestCloseStopsInReverse(t *testing.T) {
	dir := t.TempDir()
	g := NewGroup()
	var procs []*Process
	for _, name := range []string{"etcd", "apiserver"} {
		c := sh(fmt.Sprintf("trap 'date +%%s%%N >%s; exit' TERM; echo ready; while :; do sleep 0.01; done", filepath.Join(dir, name)))
		p := start(t, g, c)
		awaitTail(t, p, "ready")
		procs = append(procs, p)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	at := func(name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if at("apiserver") >= at("etcd") {
		t.Error("the first one started was not the last one stopped")
	}
	for _, p := range procs {
		if !p.ended() {
			t.Errorf("pid %d is left", p.PID())
		}
	}
	if _, err := g.Start(sh("true")); err == nil {
		t.Error("a closed group started a process")
	}
}

func TestStartReportsWhatCannotBeRun(t *testing.T) {
	_, err := group(t).Start(Command{Path: "/nonexistent/etcd", Log: filepath.Join(t.TempDir(), "log")})
	if err == nil || !strings.Contains(err.Error(), "start /nonexistent/etcd: ") {
		t.Errorf("err = %v", err)
	}
}

func awaitTail(t *testing.T, p *Process, want string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; {
		tail, err := p.Tail(1)
		if err == nil && tail == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the process printed %q, not %q (%v)", tail, want, err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestLogIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	l.limit = 1000
	for i := range 500 {
		if n, err := fmt.Fprintf(l, "line %d\n", i); err != nil || n == 0 {
			t.Fatal(n, err)
		}
	}
	var total int64
	for _, p := range []string{path, path + ".1"} {
		fi, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		total += fi.Size()
	}
	if total > 2*l.limit {
		t.Errorf("the log takes %d bytes, more than twice its limit of %d", total, l.limit)
	}
	tail, err := Tail(path, 3)
	if err != nil {
		t.Fatal(err)
	}
	if want := "line 497\nline 498\nline 499"; tail != want {
		t.Errorf("Tail = %q, want %q", tail, want)
	}
}

func TestTailOfNoLog(t *testing.T) {
	tail, err := Tail(filepath.Join(t.TempDir(), "none"), 5)
	if err != nil || tail != "" {
		t.Errorf("Tail = %q, %v", tail, err)
	}
}
