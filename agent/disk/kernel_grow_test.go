//go:build kernel

package disk

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// newMounted returns a disk that is formatted and mounted, however long it takes.
func newMounted(t *testing.T, fs node.FileSystem) *bench {
	t.Helper()
	b := newBench(t, fs, nil)
	b.patience = time.Minute
	b.converge(t)
	return b
}

// enlarge makes the device larger, as the cloud does under a guest.
func (b *bench) enlarge(t *testing.T, size int64) {
	t.Helper()
	if err := os.Truncate(b.file, size); err != nil {
		t.Fatal(err)
	}
	run(t, "losetup", "--set-capacity", "/dev/"+b.loop)
}

// used is what the mounted file system says that it has.
func (b *bench) used(t *testing.T) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(b.want.MountPoint, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks) * st.Bsize
}

// capable reports whether this machine lets an ext4 grow while it is mounted. Where
// it does not, the module has to say so; TestCampaignDiskGrow grows it in any case.
func capable(t *testing.T, fs node.FileSystem, b *bench) bool {
	t.Helper()
	if fs != node.Ext4 || mayResize() {
		return true
	}
	b.enlarge(t, 2<<30)
	if got := b.converge(t); !strings.HasPrefix(got, "grow ") {
		t.Errorf("plan %q", got)
	}
	if s := b.State(); len(s.Warnings) != 1 || !strings.Contains(s.Warnings[0].Message, "lacks CAP_SYS_RESOURCE") || s.State != Mounted {
		t.Errorf("state %s, warnings %+v", s.State, s.Warnings)
	}
	return false
}

func TestKernelGrow(t *testing.T) {
	for _, fs := range []node.FileSystem{node.Ext4, node.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			b := newMounted(t, fs)
			if capable(t, fs, b) {
				testGrow(t, fs, b)
			}
		})
	}
}

func testGrow(t *testing.T, fs node.FileSystem, b *bench) {
	data := filepath.Join(b.want.MountPoint, "data")
	if err := os.WriteFile(data, bytes.Repeat([]byte("kept"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	before, dated := b.used(t), b.read(t).At
	// Less than a block group is not worth a change.
	b.enlarge(t, 400<<20+100<<20)
	if p, err := b.plan(t); err != nil || !p.Empty() {
		t.Errorf("100 MiB more: %v%v", p, err)
	}
	b.enlarge(t, 2<<30)
	p, err := b.plan(t)
	if want := fmt.Sprintf("grow %s on %s from 400 MiB to 2 GiB\n", fs, serial); err != nil || p.String() != want || !p.Serving {
		t.Fatalf("plan %q (serving %v), %v, want %q", p, p.Serving, err, want)
	}
	if s := b.State(); s.State != Mounted {
		t.Errorf("it is %s while there is something to grow: %s", s.State, s.Message)
	}
	if got := b.converge(t); got != p.String() {
		t.Errorf("applied %q", got)
	}
	if now := b.used(t); now < before+1<<30 {
		t.Errorf("%s before, %s now", Size(before), Size(now))
	}
	if e := b.read(t); e.SizeBytes != 2<<30 || !e.At.Equal(dated) {
		t.Errorf("ledger: %+v, before it was dated %s", e, dated)
	}
	// Powered off, and larger when it is on again.
	if err := unix.Unmount(b.want.MountPoint, 0); err != nil {
		t.Fatal(err)
	}
	b.enlarge(t, 3<<30)
	p, err = b.plan(t)
	if err != nil || !strings.HasPrefix(p.String(), "mount ") {
		t.Fatalf("plan %q, %v", p, err)
	}
	if err := b.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if got := b.converge(t); got != fmt.Sprintf("grow %s on %s from 2 GiB to 3 GiB\n", fs, serial) {
		t.Errorf("after it was mounted: %q", got)
	}
	if got, err := os.ReadFile(data); err != nil || !bytes.Equal(got, bytes.Repeat([]byte("kept"), 1<<20)) {
		t.Errorf("data: %d bytes, %v", len(got), err)
	}
	b.check(t)
}

// read returns the ledger's entry.
func (b *bench) read(t *testing.T) entry {
	t.Helper()
	all, err := b.ledger.read()
	if err != nil {
		t.Fatal(err)
	}
	return all[serial]
}

// check unmounts the file system and has it checked.
func (b *bench) check(t *testing.T) {
	t.Helper()
	// A program that was killed holds it until the kernel has done what it was asked.
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Unmount(b.want.MountPoint, 0)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if b.want.FileSystem == node.XFS {
		run(t, "xfs_repair", "-n", "/dev/"+b.loop)
	} else {
		run(t, "e2fsck", "-fn", "/dev/"+b.loop)
	}
}

// TestKernelGrowRefused: an ext4 that has noted an error does not grow, and serves.
// Nor does any where the kernel does not let us, as long as the size is the same.
func TestKernelGrowRefused(t *testing.T) {
	b := newMounted(t, node.Ext4)
	if err := unix.Unmount(b.want.MountPoint, 0); err != nil {
		t.Fatal(err)
	}
	run(t, "debugfs", "-w", "-R", "set_super_value state 2", "/dev/"+b.loop) // EXT2_ERROR_FS
	p, err := b.plan(t)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	b.enlarge(t, 1<<30)
	if got := b.converge(t); !strings.HasPrefix(got, "grow ") {
		t.Errorf("plan %q", got)
	}
	want := "e2fsck -f /dev/" + b.loop
	if !mayResize() {
		want = "CapabilityBoundingSet"
	}
	s := b.State()
	if len(s.Warnings) != 1 || s.Warnings[0].Reason != ReasonGrowRefused || !strings.Contains(s.Warnings[0].Message, want) || s.State != Mounted {
		t.Errorf("state %s, warnings %+v", s.State, s.Warnings)
	}
	if c := Warnings([]State{s}); len(c) != 1 || c[0].Reason != ReasonGrowRefused {
		t.Errorf("conditions %+v", c)
	}
	// Another size is another try.
	b.enlarge(t, 2<<30)
	if p, err := b.plan(t); err != nil || p.String() != "grow ext4 on "+serial+" from 400 MiB to 2 GiB\n" {
		t.Errorf("plan %q, %v", p, err)
	}
}

// TestKernelGrowOtherDisk: a disk that is another one by now is not grown.
func TestKernelGrowOtherDisk(t *testing.T) {
	b := newMounted(t, node.XFS)
	b.enlarge(t, 1<<30)
	p, err := b.plan(t)
	if err != nil || p.Empty() {
		t.Fatalf("plan %q, %v", p, err)
	}
	before := b.used(t)
	b.setSerial(t, "disk-other000")
	if err := b.Apply(t.Context(), p); err == nil {
		t.Error("the plan was applied all the same")
	}
	if now := b.used(t); now != before {
		t.Errorf("%s before, %s now", Size(before), Size(now))
	}
}

// TestKernelGrowKilled kills agents, and the programs that they run, while they grow
// a file system, and wants the next to finish it, and nothing to be lost.
func TestKernelGrowKilled(t *testing.T) {
	if os.Getenv("GROW") != "" {
		growAlone(t)
		return
	}
	for _, fs := range []node.FileSystem{node.Ext4, node.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			b := newMounted(t, fs)
			if !capable(t, fs, b) {
				return
			}
			data := filepath.Join(b.want.MountPoint, "data")
			if err := os.WriteFile(data, []byte("kept"), 0o600); err != nil {
				t.Fatal(err)
			}
			b.enlarge(t, 4<<30)
			b.growHalf(t, 2<<30)
			if got, want := b.converge(t), fmt.Sprintf("grow %s on %s from 2 GiB to 4 GiB\n", fs, serial); got != want {
				t.Errorf("after the agent was killed in the middle: %q, want %q", got, want)
			}
			for i := range 6 {
				size := int64(i+2) * (12 << 30)
				b.enlarge(t, size)
				child := b.agent(t, nil)
				// Sooner and later, whatever it is doing then.
				time.Sleep(time.Duration(i)*10*time.Millisecond + rand.N(10*time.Millisecond))
				kill(t, child)
				b.finish(t)
				if now := b.used(t); now < size*9/10 {
					t.Errorf("%s of %s: %+v", Size(now), Size(size), b.State())
				}
			}
			if got, err := os.ReadFile(data); err != nil || string(got) != "kept" {
				t.Errorf("data: %q, %v", got, err)
			}
			b.check(t)
		})
	}
}

// finish converges, whatever the program of a killed agent still has the kernel do.
func (b *bench) finish(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		p, err := b.plan(t)
		if err == nil && p.Empty() {
			return
		}
		if err == nil {
			err = b.Apply(t.Context(), p)
		}
		if err != nil && (node.ClassOf(err) != node.ClassTransient || time.Now().After(deadline)) {
			t.Fatal(err)
		}
	}
}

// growHalf has an agent grow the file system to size and no further, and kills it.
func (b *bench) growHalf(t *testing.T, size int64) {
	t.Helper()
	dir := t.TempDir()
	tool, grow := "resize2fs", fmt.Sprintf(`resize2fs "$1" %dM`, size>>20)
	if b.want.FileSystem == node.XFS {
		tool, grow = "xfs_growfs", fmt.Sprintf(`xfs_growfs -D %d "$2"`, size>>12)
	}
	half := filepath.Join(dir, "half")
	script := fmt.Sprintf("#!/bin/sh\nset -e\nPATH=%s\n%s\n: >%s\nexec sleep 600\n", os.Getenv("PATH"), grow, half)
	if err := os.WriteFile(filepath.Join(dir, tool), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	child := b.agent(t, []string{"PATH=" + dir + ":" + os.Getenv("PATH")})
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(half); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not grow")
		}
	}
	kill(t, child)
}

// agent starts another process that grows the file system.
func (b *bench) agent(t *testing.T, env []string) *exec.Cmd {
	t.Helper()
	child := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestKernelGrowKilled$")
	child.Env = append(os.Environ(), "GROW="+strings.Join([]string{b.sys, b.want.MountPoint, string(b.ledger), string(b.want.FileSystem)}, ":"))
	child.Env = append(child.Env, env...)
	child.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	return child
}

// kill kills an agent and what it runs.
func kill(t *testing.T, child *exec.Cmd) {
	t.Helper()
	if err := syscall.Kill(-child.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // it was killed
}

// growAlone is an agent that is killed.
func growAlone(t *testing.T) {
	where := strings.Split(os.Getenv("GROW"), ":")
	d := New(Options{
		Want:   node.DiskConfig{DiskID: serial, FileSystem: node.FileSystem(where[3]), MountPoint: where[1]},
		Ledger: where[2], Run: where[2] + ".run", Log: slog.New(slog.DiscardHandler),
	})
	d.sys = where[0]
	p, err := d.Plan(t.Context())
	if err == nil {
		err = d.Apply(t.Context(), p)
	}
	if err != nil {
		t.Fatal(errors.Join(err, errors.New(p.String())))
	}
}
