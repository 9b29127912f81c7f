//go:build kernel

package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// TestMain runs the tests in a mount namespace of their own. A copy of this machine's,
// which another program makes while a disk is mounted, would keep its file system
// alive, and the disk claimed, after every umount(2) here.
func TestMain(m *testing.M) {
	const own = "TKENODE_DISK_OWN_MOUNTS"
	if os.Getenv(own) != "" {
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), own+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // the child dies with the thread that started it
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		fmt.Fprintln(os.Stderr, "run the tests in a mount namespace of their own:", err)
	}
	os.Exit(cmd.ProcessState.ExitCode()) // -1 where it never ran
}

// bench is a loop device with a serial: sysfs for it is a tree of links to the
// real one, since only virtio and NVMe disks have serials.
type bench struct {
	*Disk
	loop string // loop7
	file string // behind it
}

const serial = "disk-abc12345"

func newBench(t *testing.T, fs node.FileSystem, prepare func(file string)) *bench {
	t.Helper()
	dir := t.TempDir()
	b := &bench{file: filepath.Join(dir, "file")}
	f, err := os.Create(b.file)
	if err == nil {
		err = errors.Join(f.Truncate(400<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if prepare != nil {
		prepare(b.file)
	}
	b.loop = strings.TrimPrefix(strings.TrimSpace(run(t, "losetup", "--direct-io=on", "--find", "--show", b.file)), "/dev/")
	mnt := filepath.Join(dir, "mnt")
	t.Cleanup(func() {
		for unix.Unmount(mnt, 0) == nil {
		}
		clearImmutable(mnt)
		run(t, "losetup", "--detach", "/dev/"+b.loop)
	})
	b.Disk = New(Options{
		Want:   node.DiskConfig{DiskID: serial, FileSystem: fs, MountPoint: mnt},
		Ledger: filepath.Join(dir, "ledger"), Run: filepath.Join(dir, "run"), Log: slog.New(slog.DiscardHandler),
	})
	t.Cleanup(b.Disk.Close)
	b.Disk.sys = filepath.Join(dir, "sys")
	b.plug(t, b.loop, serial)
	return b
}

// plug makes a device appear with a serial.
func (b *bench) plug(t *testing.T, name, serial string) {
	t.Helper()
	sysfsEntry(t, b.sys, name, serial)
}

func (b *bench) setSerial(t *testing.T, serial string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(b.sys, "block", b.loop, "serial"), []byte(serial), 0o644); err != nil {
		t.Fatal(err)
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

func clearImmutable(dir string) {
	if f, err := os.Open(dir); err == nil {
		if flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS); err == nil {
			unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags&^0x10)
		}
		f.Close()
	}
}

func (b *bench) plan(t *testing.T) (node.Plan, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return b.Plan(ctx)
}

// converge applies what is planned and expects nothing to be left.
func (b *bench) converge(t *testing.T) string {
	t.Helper()
	p, err := b.plan(t)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Apply(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if left, err := b.plan(t); err != nil || !left.Empty() {
		t.Fatalf("left after apply: %v%v", left, err)
	}
	return p.String()
}

func (b *bench) hash(t *testing.T) [32]byte {
	t.Helper()
	f, err := os.Open(b.file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

func TestKernelFormatAndMount(t *testing.T) {
	for _, fs := range []node.FileSystem{node.Ext4, node.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			b := newBench(t, fs, nil)
			if got := b.converge(t); strings.Count(got, "\n") != 2 || !strings.HasPrefix(got, "format ") {
				t.Errorf("plan of a blank disk:\n%s", got)
			}
			all, err := mounts()
			if err != nil {
				t.Fatal(err)
			}
			m, ok := (observed{Mounts: all}).at(b.want.MountPoint)
			if !ok || m.FSType != string(fs) || m.Source != "/dev/"+b.loop {
				t.Errorf("mounted: %+v", m)
			}
			if err := os.WriteFile(filepath.Join(b.want.MountPoint, "data"), []byte("kept"), 0o600); err != nil {
				t.Fatal(err)
			}
			// A reboot: the file system is mounted again, not made again.
			if err := unix.Unmount(b.want.MountPoint, 0); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(b.want.MountPoint, "beneath"), nil, 0o600); !errors.Is(err, unix.EPERM) {
				t.Errorf("write beneath the missing mount: %v", err)
			}
			if got := b.converge(t); got != fmt.Sprintf("mount %s (%s) on %s\n", serial, fs, b.want.MountPoint) {
				t.Errorf("plan after a reboot:\n%s", got)
			}
			// The system disk is replaced, the data disk kept.
			if err := errors.Join(unix.Unmount(b.want.MountPoint, 0), os.RemoveAll(string(b.ledger))); err != nil {
				t.Fatal(err)
			}
			if got := b.converge(t); !strings.HasPrefix(got, "adopt ") {
				t.Errorf("plan without a ledger:\n%s", got)
			}
			if got, err := os.ReadFile(filepath.Join(b.want.MountPoint, "data")); err != nil || string(got) != "kept" {
				t.Errorf("data: %q, %v", got, err)
			}
		})
	}
}

// TestKernelProofIsKept: a file system that was made, and not journalled as made, is
// adopted with what it rested on that the disk was blank.
func TestKernelProofIsKept(t *testing.T) {
	b := newBench(t, node.Ext4, nil)
	b.converge(t)
	all, err := b.ledger.read()
	if err != nil || all[serial].Proof == "" {
		t.Fatalf("ledger %+v, %v", all, err)
	}
	e := all[serial]
	proof := e.Proof
	e.State, e.Boot = stateFormatting, b.boot
	if err := errors.Join(unix.Unmount(b.want.MountPoint, 0), b.ledger.write(e)); err != nil {
		t.Fatal(err)
	}
	if got := b.converge(t); !strings.HasPrefix(got, "adopt ") {
		t.Errorf("plan:\n%s", got)
	}
	if all, err = b.ledger.read(); err != nil || all[serial].Proof != proof || all[serial].State != stateFormatted {
		t.Errorf("ledger %+v, %v", all[serial], err)
	}
}

// TestKernelForeignIsLeftAlone compares every byte of the disk.
func TestKernelForeignIsLeftAlone(t *testing.T) {
	for name, prepare := range map[string]func(file string){
		"ext4":     func(f string) { run(t, "mkfs.ext4", "-q", f) },
		"xfs":      func(f string) { run(t, "mkfs.xfs", "-q", f) },
		"one byte": func(f string) { poke(t, f, 37<<20+5, 1) },
		"last":     func(f string) { poke(t, f, 400<<20-1, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, node.Ext4, prepare)
			before := b.hash(t)
			p, err := b.plan(t)
			if deep := name == "one byte"; (err == nil) != deep || p.Empty() == deep {
				t.Errorf("plan %q, error %v", p, err)
			} else if deep { // beyond what is read to plan
				err = b.Apply(t.Context(), p)
			}
			if node.ReasonOf(err, "") != "Foreign" || node.ClassOf(err) != node.ClassTerminal {
				t.Errorf("error %v", err)
			}
			have, oerr := b.observe(t.Context(), true)
			if oerr != nil {
				t.Fatal(oerr)
			}
			at, oerr := raise(b.want, have)
			if oerr != nil {
				t.Fatal(oerr)
			}
			if p, err := b.prove(t.Context(), at, have); err == nil || p != nil {
				t.Error("a permit was given")
			}
			if b.hash(t) != before {
				t.Error("the disk has changed")
			}
		})
	}
}

// TestKernelProofWakesNobody: a disk on which the proof finds something is not open
// for writing meanwhile: udev would announce a change of it, and wake us once more.
func TestKernelProofWakesNobody(t *testing.T) {
	b := newBench(t, node.Ext4, func(f string) { poke(t, f, 37<<20+5, 1) })
	p, err := b.plan(t)
	if err != nil || p.Empty() {
		t.Fatalf("plan %q, %v", p, err)
	}
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	// What udev itself watches. Source: systemd src/udev/udev-watch.c
	if _, err := unix.InotifyAddWatch(fd, "/dev/"+b.loop, unix.IN_CLOSE_WRITE); err != nil {
		t.Fatal(err)
	}
	if err := b.Apply(t.Context(), p); node.ReasonOf(err, "") != "Foreign" {
		t.Errorf("error %v", err)
	}
	if n, err := unix.Read(fd, make([]byte, 4096)); !errors.Is(err, unix.EAGAIN) {
		t.Errorf("udev would announce a change: %d bytes, %v", n, err)
	}
}

func poke(t *testing.T, file string, at int64, c byte) {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte{c}, at)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestKernelChangedBeforeFormat changes the world between the plan and its apply.
func TestKernelChangedBeforeFormat(t *testing.T) {
	for name, change := range map[string]func(*testing.T, *bench){
		"written to":   func(t *testing.T, b *bench) { poke(t, "/dev/"+b.loop, 1<<20, 7) },
		"other serial": func(t *testing.T, b *bench) { b.setSerial(t, "disk-other000") },
		"empty serial": func(t *testing.T, b *bench) { b.setSerial(t, "") },
		"claimed": func(t *testing.T, b *bench) {
			f, err := os.OpenFile("/dev/"+b.loop, os.O_RDONLY|unix.O_EXCL, 0)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { f.Close() })
		},
		"mounted elsewhere": func(t *testing.T, b *bench) {
			// Nothing may be left for the kernel to write by itself.
			run(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", "/dev/"+b.loop)
			dir := t.TempDir()
			run(t, "mount", "-o", "ro", "/dev/"+b.loop, dir)
			t.Cleanup(func() { unix.Unmount(dir, 0) })
		},
		"damaged ledger": func(t *testing.T, b *bench) {
			if err := errors.Join(os.MkdirAll(string(b.ledger), 0o700),
				os.WriteFile(filepath.Join(string(b.ledger), serial+".json"), []byte("{"), 0o600)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, node.Ext4, nil)
			p, err := b.plan(t)
			if err != nil || len(p.Changes) != 2 {
				t.Fatalf("%v%v", p, err)
			}
			change(t, b)
			unix.Sync()
			before := b.hash(t)
			if err := b.Apply(t.Context(), p); err == nil {
				t.Error("the plan was applied all the same")
			} else {
				t.Log(err)
			}
			if b.hash(t) != before {
				t.Error("the disk has changed")
			}
		})
	}
}

func TestKernelWatch(t *testing.T) {
	b := newBench(t, node.Ext4, nil)
	b.converge(t)
	ctx, cancel := context.WithCancel(t.Context())
	woken := make(chan struct{}, 100)
	ended := make(chan error, 1)
	go func() { ended <- b.Watch(ctx, func() { woken <- struct{}{} }) }()
	next := func(why string) {
		t.Helper()
		select {
		case <-woken:
		case err := <-ended:
			t.Fatalf("watch ended before %s: %v", why, err)
		case <-time.After(5 * time.Second):
			t.Fatalf("not woken by %s", why)
		}
	}
	drain := func() {
		for time.Sleep(50 * time.Millisecond); len(woken) > 0; {
			<-woken
		}
	}
	next("the start")
	drain()
	if err := unix.Unmount(b.want.MountPoint, 0); err != nil {
		t.Fatal(err)
	}
	next("an unmount")
	drain()
	if err := os.WriteFile("/sys/block/"+b.loop+"/uevent", []byte("change"), 0); err != nil {
		t.Fatal(err)
	}
	next("a uevent")
	drain()
	// Somebody else's mounts wake nobody. Uevents are the whole machine's, so one
	// try may be disturbed; not every one.
	other := t.TempDir()
	for try := 0; ; try++ {
		drain()
		if err := unix.Mount("tmpfs", other, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		if err := unix.Unmount(other, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
		n := len(woken)
		if n == 0 {
			break
		}
		if try == 20 {
			t.Fatalf("woken by somebody else's mount, %d times", n)
		}
	}
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("watch ended with %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("watch does not end")
	}
}

// TestKernelLedgerFull: nothing is done to a disk that cannot be written down, and what
// was written down before stays whole.
func TestKernelLedgerFull(t *testing.T) {
	b := newBench(t, node.Ext4, nil)
	must(t, os.MkdirAll(string(b.ledger), 0o700))
	must(t, unix.Mount("tmpfs", string(b.ledger), "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { must(t, unix.Unmount(string(b.ledger), 0)) })
	waste := filepath.Join(string(b.ledger), "waste")
	_ = os.WriteFile(waste, make([]byte, 1<<20), 0o600) // as much as fits
	before := b.hash(t)
	p, err := b.plan(t)
	must(t, err)
	if err := b.Apply(t.Context(), p); node.ReasonOf(err, "") != "LedgerFull" || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("with a full disk: %v", err)
	}
	if b.hash(t) != before {
		t.Error("the disk was written to")
	}
	must(t, os.Remove(waste))
	b.converge(t)
	was, err := b.ledger.read()
	must(t, err)
	_ = os.WriteFile(waste, make([]byte, 1<<20), 0o600)
	if err := b.ledger.write(was[serial]); node.ReasonOf(err, "") != "LedgerFull" {
		t.Errorf("an entry that is there is written anew: %v", err)
	}
	if now, err := b.ledger.read(); err != nil || len(now) != 1 || now[serial].UUID != was[serial].UUID {
		t.Errorf("ledger %+v, %v", now, err)
	}
}
