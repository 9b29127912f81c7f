package disk

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// TestAlive: a device is asked for its serial only if nothing that it was asked for
// before hangs.
func TestAlive(t *testing.T) {
	stat := func(ended, inFlight int) string {
		return fmt.Sprintf("%8d 0 100 5 %8d 0 0 0 %8d 5 5 0 0 0 0 0 0\n", ended, ended, inFlight)
	}
	write := func(dir, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "stat"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	if !alive(dir) {
		t.Error("of a device that tells nothing nothing is known")
	}
	if write(dir, stat(7, 0)); !alive(dir) {
		t.Error("idle")
	}
	if write(dir, stat(7, 2)); alive(dir) {
		t.Error("two requests are in flight, and none ends")
	}
	busy := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for n := 8; ; n++ {
			select {
			case <-busy:
				return
			case <-time.After(alivePause / 10):
				// Replaced, since who reads must not find it empty.
				if os.WriteFile(filepath.Join(dir, "new"), []byte(stat(n, 2)), 0o600) != nil || os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, "stat")) != nil {
					return
				}
			}
		}
	}()
	// However slow the machine is, one of the tries sees a request end.
	seen := false
	for n := 0; n < 100 && !seen; n++ {
		seen = alive(dir)
	}
	close(busy)
	<-done
	if !seen {
		t.Error("busy")
	}
}

// TestDevicesThatHang are what they told before, and nothing if they did not.
func TestDevicesThatHang(t *testing.T) {
	d := New(Options{})
	d.sys = t.TempDir()
	plug := func(name, dev, seq, serial string, inFlight int) {
		t.Helper()
		dir := filepath.Join(d.sys, "block", name)
		if err := os.MkdirAll(filepath.Join(dir, "holders"), 0o755); err != nil {
			t.Fatal(err)
		}
		stat := fmt.Sprintf("7 0 100 5 7 0 0 0 %d 5 5 0 0 0 0 0 0", inFlight)
		for file, text := range map[string]string{"dev": dev, "diskseq": seq, "serial": serial, "size": "100", "ro": "0", "stat": stat} {
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	see := func(name string, mounted bool, was *serving, want ...string) {
		t.Helper()
		all, err := d.devices(mounted, was)
		if err != nil || len(all) != len(want) {
			t.Fatalf("%s: %+v, %v", name, all, err)
		}
		for i, w := range want {
			if all[i].Serial != w {
				t.Errorf("%s: %s is %q, want %q", name, all[i].Name, all[i].Serial, w)
			}
		}
	}
	plug("vdb", "253:16", "9", "disk-b", 0)
	plug("vdc", "253:32", "10", "disk-c", 3)
	see("one hangs from the start", false, nil, "disk-b", "")
	plug("vdb", "253:16", "9", "disk-x", 3)
	see("the other hangs later", false, nil, "disk-b", "")
	plug("vdb", "253:16", "9", "disk-x", 0)
	plug("vdc", "253:32", "10", "disk-c", 0)
	see("mounted: who has told is not asked", true, nil, "disk-b", "disk-c")
	see("not mounted: everybody is", false, nil, "disk-x", "disk-c")
	plug("vdb", "253:16", "12", "disk-y", 3)
	see("another device of the same number", false, nil, "", "disk-c")
	see("the agent has just started", true, &serving{DiskID: "disk-y", Dev: "253:16", Seq: "12"}, "disk-y", "disk-c")
}

// TestReadingThatHangs is told of when no read has ended for a minute.
func TestReadingThatHangs(t *testing.T) {
	at := time.Date(2026, 11, 28, 7, 0, 0, 0, time.UTC)
	p := &proof{claim: &claim{dev: device{Name: "vdb", Serial: "disk-abc12345", SizeBytes: 20 << 30}}, began: at, why: "x"}
	for _, c := range []struct {
		after time.Duration
		read  int64
		hung  bool
	}{{0, 0, false}, {30 * time.Second, 1 << 30, false}, {80 * time.Second, 1 << 30, false}, {90 * time.Second, 1 << 30, true}, {91 * time.Second, 2 << 30, false}} {
		p.read.Store(c.read)
		text, hung := p.progress(at.Add(c.after))
		if hung != c.hung || hung != strings.Contains(text, "no read of it has ended for 1m0s, after 5 % of it") {
			t.Errorf("after %s: %v %s", c.after, hung, text)
		}
	}
}

// TestQuell kills by the kernel's file, and waits until it says that all have ended.
func TestQuell(t *testing.T) {
	dir := t.TempDir()
	d := New(Options{})
	d.pods = dir
	if some, err := populated(dir); err != nil || some {
		t.Errorf("a node that never ran a pod: %v, %v", some, err)
	}
	for name, text := range map[string]string{"cgroup.events": "populated 1\nfrozen 0\n", "cgroup.kill": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if some, err := populated(dir); err != nil || !some {
		t.Errorf("with pods: %v, %v", some, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- d.quell(t.Context()) }()
	for deadline := time.Now().Add(podsDeadline); ; time.Sleep(time.Millisecond) {
		if b, _ := os.ReadFile(filepath.Join(dir, "cgroup.kill")); string(b) == "1" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody is killed")
		}
	}
	select {
	case err := <-ended:
		t.Fatalf("it did not wait: %v", err)
	default:
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.events"), []byte("populated 0\nfrozen 0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestDamagedNote tells nothing.
func TestDamagedNote(t *testing.T) {
	d := New(Options{Run: t.TempDir()})
	d.want.MountPoint = "/var/lib/containerd"
	want := serving{DiskID: "disk-abc12345", Dev: "253:16", Seq: "9"}
	if err := d.setNote(want); err != nil {
		t.Fatal(err)
	}
	if got, err := d.note(); err != nil || got == nil || !reflect.DeepEqual(*got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, text := range []string{"", "{", `{"diskID":"disk-abc12345"}`} {
		if err := os.WriteFile(d.notePath(), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := d.note(); err != nil || got != nil {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
	if filepath.Base(d.notePath()) != "var-lib-containerd.json" {
		t.Errorf("note %s", d.notePath())
	}
}
