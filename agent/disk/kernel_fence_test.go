//go:build kernel

package disk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// The helper of a test is the test's own program.
func init() {
	helperProgram = []string{"/proc/self/exe", "disk-helper"}
	if len(os.Args) == 2 && os.Args[1] == helperProgram[1] {
		var in, out = io.Reader(os.Stdin), io.Writer(os.Stdout)
		if gate := os.Getenv("TKENODE_DISK_MOUNT_GATE"); gate != "" { // a mount waits here
			line, _ := bufio.NewReader(in).ReadBytes('\n')
			if bytes.Contains(line, []byte(`"act":"mount"`)) {
				fmt.Println(`{"step":"mount"}`)
				_, _ = os.ReadFile(gate)
				out = io.Discard // nobody listens any more
			}
			in = io.MultiReader(bytes.NewReader(line), os.Stdin)
		}
		if err := Help(in, out); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// unplug takes the device out of sysfs; its mount is left.
func (b *bench) unplug(t *testing.T) {
	t.Helper()
	sysfsGone(t, b.sys, b.loop)
}

// sysfsGone makes a device disappear from a sysfs.
func sysfsGone(t *testing.T, sys, loop string) {
	t.Helper()
	number := strings.TrimSpace(run(t, "cat", "/sys/block/"+loop+"/dev"))
	must(t, errors.Join(os.RemoveAll(filepath.Join(sys, "block", loop)), os.Remove(filepath.Join(sys, "dev", "block", number))))
	// There are other devices, or sysfs could not have been read.
	must(t, os.WriteFile(filepath.Join(sys, "dev", "block", "254:0"), nil, 0o600))
}

// again is the disk as an agent sees it that was just started.
func (b *bench) again(t *testing.T) {
	t.Helper()
	old := b.Disk
	b.Disk = New(Options{Want: old.want, Sealed: old.sealed, Ledger: string(old.ledger), Run: old.run, Log: old.log})
	b.sys, b.pods, b.systemd = old.sys, old.pods, old.systemd
	t.Cleanup(b.Disk.Close)
}

func (b *bench) isMounted(t *testing.T) bool {
	t.Helper()
	m, err := b.mountedNow()
	if err != nil {
		t.Fatal(err)
	}
	return m.Target != ""
}

// TestKernelGone: a disk that goes while it is mounted is fenced, step by step and
// with another agent for each step, and mounted again when it is back.
func TestKernelGone(t *testing.T) {
	b := newBench(t, node.Ext4, nil)
	b.converge(t)
	file := filepath.Join(b.want.MountPoint, "data")
	if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	busy, err := os.Open(file) // who has it open does not keep the mount
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	b.unplug(t)
	var did []string
	for range 5 {
		b.again(t)
		p, err := b.plan(t)
		if node.ReasonOf(err, "") == Gone {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if s := b.Standing(); s.Mounted || s.Fenced == "" {
			t.Errorf("not fenced: %+v", s)
		}
		did = append(did, p.Changes[0].Text)
		p.Changes = p.Changes[:1]
		if err := b.Apply(t.Context(), p); err != nil {
			t.Fatal(err)
		}
	}
	want := "unmount what is left of " + serial + " on " + b.want.MountPoint + "|note that " + serial + " is gone: its block device "
	if got := strings.Join(did, "|"); !strings.HasPrefix(got, want) || len(did) != 2 {
		t.Errorf("steps %q, want %q…", got, want)
	}
	if b.isMounted(t) {
		t.Error("the dead mount is still there")
	}
	if err := os.WriteFile(filepath.Join(b.want.MountPoint, "beneath"), nil, 0o600); !errors.Is(err, unix.EPERM) {
		t.Errorf("write to the bare directory: %v", err)
	}
	b.examine(t.Context())
	if st, h := b.State(), b.Standing().Health; st.State != Gone || !st.Fenced || h.of(node.IOError).Reason != "DiskGone" {
		t.Errorf("state %+v, health %+v", st, h)
	}
	busy.Close()
	b.plug(t, b.loop, serial)
	b.again(t)
	if got := b.converge(t); got != fmt.Sprintf("mount %s (ext4) on %s\n", serial, b.want.MountPoint) {
		t.Errorf("plan when it is back: %s", got)
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "kept" {
		t.Errorf("data: %q, %v", got, err)
	}
	b.examine(t.Context())
	if s := b.Standing(); !s.Mounted || s.Fenced != "" || len(s.Health.bad()) > 0 {
		t.Errorf("still fenced: %+v", s)
	}
}

// TestKernelNotGone: what is no evidence fences nothing.
func TestKernelNotGone(t *testing.T) {
	for name, c := range map[string]func(*testing.T, *bench){
		"sysfs cannot be read": func(t *testing.T, b *bench) {
			if err := os.RemoveAll(filepath.Join(b.sys, "dev")); err != nil {
				t.Fatal(err)
			}
		},
		"sysfs is empty": func(t *testing.T, b *bench) {
			dir := filepath.Join(b.sys, "dev", "block")
			if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o755)); err != nil {
				t.Fatal(err)
			}
		},
		"no serial": func(t *testing.T, b *bench) { b.setSerial(t, "") },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, node.XFS, nil)
			b.converge(t)
			c(t, b)
			p, err := b.plan(t)
			if strings.Contains(p.String(), "gone") || b.Standing().Fenced != "" || !b.isMounted(t) {
				t.Errorf("fenced: %v%v", p, err)
			}
		})
	}
}

// TestKernelProbe: what the helper finds is told as a condition, and taken back.
func TestKernelProbe(t *testing.T) {
	t.Run("well", func(t *testing.T) {
		b := newBench(t, node.Ext4, nil)
		b.converge(t)
		b.probeNow(t)
		if h := b.Standing().Health; len(h.bad()) > 0 || h.of(node.IOError).Status != node.False || h.of(node.Ext4Error).Status != node.False {
			t.Errorf("health %+v", h)
		}
	})
	t.Run("ext4 error", func(t *testing.T) {
		b := newBench(t, node.Ext4, nil)
		b.converge(t)
		if err := os.Symlink("/sys/fs", filepath.Join(b.sys, "fs")); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile("/sys/fs/ext4/"+b.loop+"/trigger_fs_error", []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
		b.probeNow(t)
		h := b.Standing().Health
		if c := h.of(node.Ext4Error); c.Status != node.True || !strings.Contains(c.Message, "has noted errors (1, the first 20") {
			t.Errorf("%+v", c)
		}
		if c := h.of(node.ReadonlyFilesystem); c.Status != node.True {
			t.Errorf("%+v", c)
		}
		if _, err := b.plan(t); node.ReasonOf(err, "") != "ReadonlyFilesystem" {
			t.Errorf("plan: %v", err)
		}
		if err := unix.Unmount(b.want.MountPoint, 0); err != nil {
			t.Fatal(err)
		}
		_ = exitCode(t, "e2fsck", "-fy", "/dev/"+b.loop) // 1: errors were corrected
		b.converge(t)
		b.probeNow(t)
		if bad := b.Standing().Health.bad(); len(bad) > 0 {
			t.Errorf("after repair: %+v", bad)
		}
	})
	t.Run("xfs shut down", func(t *testing.T) {
		b := newBench(t, node.XFS, nil)
		b.converge(t)
		shutDown(t, b.want.MountPoint)
		b.probeNow(t)
		if c := b.Standing().Health.of(node.IOError); c.Status != node.True || c.Reason != "DiskIOError" || !strings.Contains(c.Message, stepStat+": ") {
			t.Errorf("%+v", c)
		}
		if p, err := b.plan(t); err != nil || !p.Empty() {
			t.Errorf("plan of a disk that is shut down: %v%v", p, err)
		}
	})
	t.Run("another serial", func(t *testing.T) {
		b := newBench(t, node.XFS, nil)
		b.converge(t)
		b.setSerial(t, "disk-other000")
		b.probeNow(t)
		if p, err := b.plan(t); err != nil || !p.Empty() {
			t.Errorf("after it was told once: %v%v", p, err)
		}
		b.probeNow(t)
		p, err := b.plan(t)
		if err != nil || !strings.Contains(p.String(), "says twice that it is disk-other000") {
			t.Fatalf("after it was told twice: %v%v", p, err)
		}
		if err := b.Apply(t.Context(), p); err != nil || b.isMounted(t) {
			t.Errorf("still mounted: %v", err)
		}
	})
}

// probeNow looks at the disk as if a probe were due.
func (b *bench) probeNow(t *testing.T) {
	t.Helper()
	b.tended.probed = time.Time{}
	b.tended.mu.Lock()
	b.tended.verified = time.Time{}
	b.tended.mu.Unlock()
	b.examine(t.Context())
	if b.tended.probed.IsZero() {
		t.Fatal("nothing was probed")
	}
}

// shutDown makes xfs give up, as it does after an error of its log.
func shutDown(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const goingDown = 0x8004587d // XFS_IOC_GOINGDOWN of linux fs/xfs/libxfs/xfs_fs.h
	noFlush := uint32(2)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), goingDown, uintptr(unsafe.Pointer(&noFlush))); errno != 0 {
		t.Fatal(errno)
	}
}

// TestKernelHelperHangs: one that does not return is told of, with what it was at.
func TestKernelHelperHangs(t *testing.T) {
	b := newBench(t, node.Ext4, nil)
	script := filepath.Join(t.TempDir(), "helper")
	text := "#!/bin/sh\nread errand\necho '{\"step\":\"" + stepSerial + "\"}'\necho '{\"step\":\"" + stepSerial + "\",\"ended\":true,\"value\":\"" + serial + "\"}'\necho '{\"step\":\"" + stepRead + "\"}'\nexec sleep 1000\n"
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	b.program = []string{script}
	found, err := b.probes.send(t.Context(), errand{Act: toProbe}, 2*time.Second, nil)
	var hangs errHangs
	if !errors.As(err, &hangs) || hangs.step != stepRead || len(found) != 1 || found[0].Value != serial {
		t.Errorf("found %+v, %v", found, err)
	}
	if b.probes.out != nil {
		t.Error("a helper that was killed is still held to be out")
	}
	// One that cannot be killed keeps the next from being sent.
	b.probes.out = &helper{step: stepRead, began: time.Now().Add(-time.Hour), ended: make(chan struct{})}
	if _, err := b.probes.send(t.Context(), errand{Act: toProbe}, time.Second, nil); !errors.Is(err, errOut) {
		t.Errorf("a second helper: %v", err)
	}
	// A disk that is only slow is not said to hang.
	b.program = helperProgram
	b.converge(t)
	for out, want := range map[time.Duration]node.Status{time.Hour: node.True, 5 * time.Second: node.False} {
		mounted := &probeResult{Serial: serial}
		b.tended.found(mounted)
		b.probes.out.began = time.Now().Add(-out)
		b.probeNow(t)
		if c := b.Standing().Health.of(node.IOError); c.Status != want {
			t.Errorf("a helper has been out for %s: %+v", out, c)
		}
	}
	close(b.probes.out.ended)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if found, err := b.probes.send(ctx, errand{Act: toUnmount, Target: b.want.MountPoint, Dev: "1:1"}, time.Minute, nil); err != nil || len(found) != 1 {
		t.Errorf("after it has ended: %+v, %v", found, err)
	}
}

// TestKernelReadHangs: a disk that nobody has mounted, and of which no read returns, holds
// up nobody: it is said to hang, no second helper is sent, and it is formatted once it
// answers.
func TestKernelReadHangs(t *testing.T) {
	b := newBench(t, node.Ext4, nil)
	hangs := filepath.Join(t.TempDir(), "helper")
	must(t, os.WriteFile(hangs, []byte("#!/bin/sh\necho '{\"step\":\""+stepContent+"\"}'\nexec sleep 1000\n"), 0o700))
	b.program, b.quiet = []string{hangs}, 300*time.Millisecond
	began := time.Now()
	_, err := b.Plan(t.Context())
	if took := time.Since(began); node.ReasonOf(err, "") != Hung || took > 10*time.Second {
		t.Fatalf("after %s: %v", took, err)
	}
	if st := b.State(); st.State != Hung || !strings.Contains(st.Message, "does not answer: the read of what it holds does not return") {
		t.Errorf("%s: %s", st.State, st.Message)
	}
	// One that cannot be killed keeps the next from being sent.
	out := &helper{ended: make(chan struct{})}
	b.reads.out, b.program = out, helperProgram
	if _, err := b.Plan(t.Context()); node.ReasonOf(err, "") != Hung {
		t.Errorf("beside a helper that is out: %v", err)
	}
	close(out.ended)
	b.quiet = probeDeadline
	p, err := b.plan(t)
	must(t, err)
	// It hangs while it is sampled, and nobody holds it afterwards.
	b.program, b.quiet = []string{hangs}, 300*time.Millisecond
	if err := b.Apply(t.Context(), p); node.ReasonOf(err, "") != Hung {
		t.Errorf("while it is sampled: %v", err)
	}
	b.program, b.quiet = helperProgram, probeDeadline
	b.converge(t)
}

// TestKernelAnswerCutOff: what a helper that has died had not said yet is no proof.
func TestKernelAnswerCutOff(t *testing.T) {
	b := newBench(t, node.Ext4, nil)
	dies := filepath.Join(t.TempDir(), "helper")
	for _, said := range []string{"", `{"step":"x","ended":true}`, `{"step":"x","read":5}`, `{"step":"x","ended":true,"content":{"blank":tr`, `{"step":"x","ended":true,"content":{}}`} {
		must(t, os.WriteFile(dies, []byte("#!/bin/sh\nread errand\necho '"+said+"'\n"), 0o700))
		b.program = []string{dies}
		if p, err := b.plan(t); err == nil {
			t.Errorf("%q: planned %s", said, p)
		}
		b.program = helperProgram
		p, err := b.plan(t)
		must(t, err)
		b.program = []string{dies}
		if err := b.Apply(t.Context(), p); err == nil || b.isMounted(t) {
			t.Errorf("%q: formatted", said)
		}
	}
	if all, err := b.ledger.read(); err != nil || len(all) != 0 {
		t.Errorf("ledger %+v, %v", all, err)
	}
}

// TestKernelMountHangs: a mount that takes long is waited for, and not sent once more.
func TestKernelMountHangs(t *testing.T) {
	b := newMounted(t, node.XFS)
	must(t, unix.Unmount(b.want.MountPoint, 0))
	p, err := b.plan(t)
	must(t, err)
	gate := filepath.Join(t.TempDir(), "gate")
	must(t, unix.Mkfifo(gate, 0o600))
	t.Setenv("TKENODE_DISK_MOUNT_GATE", gate)
	b.quiet = time.Second
	if err := b.Apply(t.Context(), p); node.ReasonOf(err, "") != Hung || !strings.Contains(err.Error(), "journal") {
		t.Fatalf("while it is mounted: %v", err)
	}
	if _, err := b.plan(t); node.ReasonOf(err, "") != Hung {
		t.Errorf("meanwhile: %v", err)
	}
	must(t, os.WriteFile(gate, []byte("go\n"), 0))
	<-b.reads.out.ended
	if !b.isMounted(t) {
		t.Error("it is not mounted")
	}
	b.quiet = probeDeadline
	b.converge(t)
}

func exitCode(t *testing.T, name string, args ...string) int {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
	if exit == nil {
		return 0
	}
	return exit.ExitCode()
}
