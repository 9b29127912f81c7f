//go:build node

package cvm

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tkenode/tkenode/images"
)

func cacheDir(t *testing.T) string {
	t.Helper()
	dir, err := images.CacheDir()
	must(t, err)
	return dir
}

// nodeImage returns the node image that was built last.
func nodeImage(t *testing.T) string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(cacheDir(t), "images", "node-*.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	var newest string
	var at time.Time
	for _, path := range paths {
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.ModTime().After(at) {
			newest, at = path, fi.ModTime()
		}
	}
	if newest == "" {
		t.Fatal("no node image has been built")
	}
	return newest
}

// port is the far end of a NIC's socket.
type port struct {
	path   string
	frames atomic.Int64
	dhcp   chan struct{} // closed at the first DHCP request
}

// newPort counts the frames that arrive in the form that lab/vpc expects.
func newPort(t *testing.T, path string) *port {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	p := &port{path: path, dhcp: make(chan struct{})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		p.read(conn)
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return p
}

func (p *port) read(conn net.Conn) {
	seen := false
	for {
		var size [4]byte
		if _, err := io.ReadFull(conn, size[:]); err != nil {
			return
		}
		n := binary.BigEndian.Uint32(size[:])
		if n > 65536 {
			return
		}
		frame := make([]byte, n)
		if _, err := io.ReadFull(conn, frame); err != nil {
			return
		}
		p.frames.Add(1)
		// UDP over IPv4 to port 67.
		if n > 38 && frame[12] == 8 && frame[13] == 0 && frame[23] == 17 && frame[36] == 0 && frame[37] == 67 && !seen {
			seen = true
			close(p.dhcp)
		}
	}
}

func newDisk(t *testing.T, id string, size int64) Disk {
	t.Helper()
	d := Disk{ID: id, Path: filepath.Join(t.TempDir(), id)}
	if err := os.WriteFile(d.Path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(d.Path, size); err != nil {
		t.Fatal(err)
	}
	return d
}

// shortDir is for sockets, whose paths are limited.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// waitReads waits until the guest has read more than so often from the disk
// behind a block node, as firmware does when it starts and udev does with a disk
// that is new or has changed, and has then left it alone.
func waitReads(ctx context.Context, t *testing.T, m *Machine, node string, more int) int {
	t.Helper()
	for last := more; ; {
		now := reads(ctx, t, m, node)
		if now > more && now == last {
			return now
		}
		last = now
		select {
		case <-ctx.Done():
			t.Fatalf("the guest has read %d times from %s, not more than %d", now, node, more)
		case <-time.After(time.Second):
		}
	}
}

// reads asks QEMU how often the guest has read from a disk.
func reads(ctx context.Context, t *testing.T, m *Machine, node string) int {
	t.Helper()
	var disks []struct {
		Node  string `json:"node-name"`
		Stats struct {
			Reads int `json:"rd_operations"`
		}
	}
	must(t, m.qmp.do(ctx, "query-blockstats", nil, &disks))
	for _, d := range disks {
		if d.Node == node {
			return d.Stats.Reads
		}
	}
	t.Fatalf("no disk %s in %+v", node, disks)
	return 0
}

// booted is how many reads a kernel and its initramfs take at least: they have
// 40 MiB, and the BIOS reads no more than 127 sectors at once.
const booted = 600

func pause(ctx context.Context, t *testing.T) {
	t.Helper()
	select {
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	case <-time.After(100 * time.Millisecond):
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestNodeImage does to the shipped image what happens to a CVM: it goes on from
// a snapshot, is given a network interface and disks, loses them, is shut down,
// starts again and loses its power.
func TestNodeImage(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 12*time.Minute)
	defer cancel()
	image := nodeImage(t)
	began := time.Now()
	mark := func(what string) {
		t.Logf("%-10s %v", what, time.Since(began).Round(10*time.Millisecond))
		began = time.Now()
	}
	snapshot, err := Cached(ctx, filepath.Join(cacheDir(t), "lab", "snapshots"), "cvm-test", Spec{Image: image}, "login: ")
	must(t, err)
	mark("snapshot")

	dir := shortDir(t)
	p := newPort(t, filepath.Join(dir, "eni"))
	spec := Spec{
		Name: "ins-test0001", Dir: filepath.Join(dir, "ins"), Image: image,
		NICs: []NIC{{ID: "eni-test0001", MAC: net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}, Socket: p.path}},
	}
	m, err := Restore(ctx, spec, snapshot)
	must(t, err)
	defer func() { m.Kill() }()
	mark("restored")
	t.Logf("accelerator %s", m.Accel())
	select {
	case <-p.dhcp:
	case <-ctx.Done():
		t.Fatalf("no DHCP request in %d frames; console:\n%s", p.frames.Load(), m.ConsoleTail(30))
	}
	mark("DHCP")

	d := newDisk(t, "disk-test0001", 1<<30)
	must(t, m.PlugDisk(ctx, d))
	probed := waitReads(ctx, t, m, blockNode(d.ID), 0)
	mark("plugged")
	must(t, m.ResizeDisk(ctx, d.ID, 2<<30))
	waitReads(ctx, t, m, blockNode(d.ID), probed)
	mark("resized")
	must(t, m.PullDisk(ctx, d.ID))
	mark("pulled")
	must(t, m.UnplugNIC(ctx, "eni-test0001"))
	mark("unplugged")
	must(t, m.PlugDisk(ctx, d)) // its slot and its name are free again
	must(t, m.UnplugDisk(ctx, d.ID))
	if err := m.UnplugDisk(ctx, d.ID); err == nil || !strings.Contains(err.Error(), "there is no device disk-test0001") {
		t.Errorf("unplugged twice: %v", err)
	}

	began = time.Now()
	must(t, m.Stop(ctx))
	must(t, m.Err())
	mark("stopped")
	spec.NICs = nil
	m, err = Start(ctx, spec)
	must(t, err)
	for reads(ctx, t, m, "root") < booted {
		pause(ctx, t)
	}
	mark("started")
	must(t, m.Reset(ctx))
	before := reads(ctx, t, m, "root")
	for reads(ctx, t, m, "root") < before+booted {
		pause(ctx, t)
	}
	mark("reset")
	must(t, m.Kill())
	must(t, m.Err())
	old, err := os.ReadFile(m.Console() + ".1")
	must(t, err)
	if !strings.Contains(string(old), "reboot: Power down") {
		t.Errorf("the console of the first start ends with %q", old[max(0, len(old)-200):])
	}
}

func TestNodeQEMURefuses(t *testing.T) {
	dir := shortDir(t)
	_, err := Start(t.Context(), Spec{Name: "ins-test0002", Dir: dir, Image: nodeImage(t), MemoryMiB: -1})
	if err == nil || !strings.Contains(err.Error(), "start ins-test0002: ") || !strings.Contains(err.Error(), "-m") {
		t.Errorf("err = %v", err)
	}
}
