//go:build kernel

package disk

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/lab/proc"
)

// storage is disks that fail as they are told to: QEMU's block layer keeps them,
// FUSE exports each as a file, and a loop device makes a disk of it. Everything goes
// with the test.
type storage struct {
	t    *testing.T
	dir  string
	conn net.Conn
	in   *bufio.Scanner

	daemon *proc.Group
	disks  []*sick
}

// close ends the disks.
func (s *storage) close() {
	for _, d := range s.disks {
		d.end()
	}
	s.disks = nil
	s.daemon.Close() // it was told to end, and how it did is of no interest
	os.RemoveAll(s.dir)
}

func newStorage(t *testing.T) *storage {
	t.Helper()
	dir, err := os.MkdirTemp("", "disk") // a socket's path is limited
	if err != nil {
		t.Fatal(err)
	}
	s := &storage{t: t, dir: dir}
	t.Cleanup(s.close)
	if err := s.start(); err != nil {
		t.Fatalf("qemu-storage-daemon: %v", err)
	}
	return s
}

// start starts the daemon, and says hello to it. It is the daemon that connects: where
// it listens, a client that comes while it starts is heard by two of its threads, each
// of which takes some of the bytes.
func (s *storage) start() error {
	s.daemon = proc.NewGroup() // ends with this process, however that ends
	path := filepath.Join(s.dir, "qmp")
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return err
	}
	defer socket.Close()
	_, err = s.daemon.Start(proc.Command{
		Path: "qemu-storage-daemon", Args: []string{"--chardev", "socket,id=qmp,path=" + path, "--monitor", "qmp"},
		Log: filepath.Join(s.dir, "log"),
	})
	if err != nil {
		return err
	}
	deadline := time.Now().Add(20 * time.Second)
	if err := socket.SetDeadline(deadline); err != nil {
		return err
	}
	if s.conn, err = socket.Accept(); err != nil {
		return err
	}
	if err := s.conn.SetDeadline(deadline); err != nil {
		return err
	}
	s.in = bufio.NewScanner(s.conn)
	if !s.in.Scan() { // the greeting
		return fmt.Errorf("no greeting: %w", s.in.Err())
	}
	return s.ask("qmp_capabilities", args{})
}

type args map[string]any

// do has the daemon carry a command out.
func (s *storage) do(command string, a args) {
	s.t.Helper()
	if err := errors.Join(s.conn.SetDeadline(time.Now().Add(time.Minute)), s.ask(command, a)); err != nil {
		s.t.Fatal(err)
	}
}

func (s *storage) ask(command string, a args) error {
	if err := json.NewEncoder(s.conn).Encode(map[string]any{"execute": command, "arguments": a}); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	for s.in.Scan() {
		var answer struct {
			Return json.RawMessage
			Error  struct{ Desc string }
		}
		if err := json.Unmarshal(s.in.Bytes(), &answer); err != nil {
			return fmt.Errorf("%s: %w", command, err)
		}
		if answer.Error.Desc != "" {
			return fmt.Errorf("%s: %s", command, answer.Error.Desc)
		}
		if answer.Return != nil {
			return nil
		}
	}
	return fmt.Errorf("%s: no answer: %w", command, cmp.Or(s.in.Err(), io.EOF))
}

// sick is a disk of a storage.
type sick struct {
	s    *storage
	name string
	file string // what the disk holds; to be changed only while nobody has the disk open
	path string // the file of FUSE
	loop string
	bad  bool
}

// disk makes a disk of a file; driver, if any, stands between the two.
func (s *storage) disk(name, file string, driver args) *sick {
	s.t.Helper()
	d := &sick{s: s, name: name, file: file, path: filepath.Join(s.dir, name)}
	s.do("blockdev-add", args{"driver": "raw", "node-name": name + "-file", "discard": "unmap", "file": args{"driver": "file", "filename": file, "discard": "unmap"}})
	below := name + "-file"
	if driver != nil {
		driver["node-name"], driver["file"] = name+"-driver", below
		s.do("blockdev-add", driver)
		below = name + "-driver"
	}
	s.do("blockdev-add", args{"driver": "raw", "node-name": name + "-base", "discard": "unmap", "file": below})
	s.do("blockdev-add", args{"driver": "raw", "node-name": name, "discard": "unmap", "file": name + "-base"})
	if err := os.WriteFile(d.path, nil, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.do("block-export-add", args{"type": "fuse", "id": name, "node-name": name, "mountpoint": d.path, "writable": true})
	s.oneByOne(d.path)
	d.loop = attachLoop(s.t, d.path)
	s.disks = append(s.disks, d)
	return d
}

// end lets what the disk holds be read whole.
func (d *sick) end() {
	d.s.t.Helper()
	if d.loop != "" {
		detachLoop(d.s.t, d.loop)
		d.s.do("block-export-del", args{"id": d.name, "mode": "hard"})
		d.loop = ""
	}
}

// oneByOne has the kernel send FUSE one request after the other: with QEMU 7.2 the
// data of one is overwritten by the next that arrives while it is carried out.
func (s *storage) oneByOne(path string) {
	s.t.Helper()
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	control := filepath.Join(s.dir, "control")
	if err == nil {
		err = errors.Join(os.MkdirAll(control, 0o700), unix.Mount("fusectl", control, "fusectl", 0, ""))
	}
	if err == nil {
		err = errors.Join(
			os.WriteFile(filepath.Join(control, fmt.Sprint(unix.Minor(st.Dev)), "max_background"), []byte("1"), 0),
			unix.Unmount(control, 0))
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// fail makes reads or writes of a sector fail, or of any if it is negative.
func (d *sick) fail(what string, sector int64) {
	d.s.t.Helper()
	d.heal()
	rule := args{"event": "none", "iotype": what, "errno": int(unix.EIO)}
	if sector >= 0 {
		rule["sector"] = sector
	}
	rules := []args{rule}
	if what == "all" {
		rules = nil
		for _, kind := range []string{"read", "write", "discard", "write-zeroes"} {
			rules = append(rules, args{"event": "none", "iotype": kind, "errno": int(unix.EIO)})
		}
	}
	d.s.do("blockdev-add", args{"driver": "blkdebug", "node-name": d.name + "-bad", "image": d.name + "-base", "inject-error": rules})
	d.below(d.name + "-bad")
	d.bad = true
}

func (d *sick) heal() {
	if d.bad {
		d.below(d.name + "-base")
		d.s.do("blockdev-del", args{"node-name": d.name + "-bad"})
		d.bad = false
	}
}

func (d *sick) below(node string) {
	d.s.t.Helper()
	d.s.do("blockdev-reopen", args{"options": []args{{"driver": "raw", "node-name": d.name, "discard": "unmap", "file": node}}})
}

func attachLoop(t *testing.T, file string, more ...string) string {
	t.Helper()
	return strings.TrimPrefix(strings.TrimSpace(run(t, "losetup", append(more, "--direct-io=on", "--find", "--show", file)...)), "/dev/")
}

func detachLoop(t *testing.T, name string) {
	t.Helper()
	run(t, "losetup", "--detach", "/dev/"+name)
}

// hashFile hashes a sparse file from an offset on: where there is no data, it reads
// nothing.
func hashFile(t *testing.T, path string, at int64) (sum [32]byte, blank bool) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	blank = true
	b := make([]byte, 1<<16)
	for {
		from, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return [32]byte(h.Sum(nil)), blank
		}
		if err != nil {
			t.Fatal(err)
		}
		from -= from % int64(len(b))
		n, err := f.ReadAt(b, from)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if nonZero(b[:n]) >= 0 { // zeros that take room are nothing
			blank = false
			binary.Write(h, binary.LittleEndian, from)
			h.Write(b[:n])
		}
		at = from + int64(len(b))
	}
}

// clearFile makes a file all zeros, of a size.
func clearFile(t *testing.T, path string, size int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		err = errors.Join(f.Truncate(0), f.Truncate(size), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestKernelStorageFails(t *testing.T) {
	s := newStorage(t)
	file := filepath.Join(s.dir, "file")
	clearFile(t, file, 16<<20)
	d := s.disk("a", file, nil)
	read := func(at int64) error {
		f, err := os.OpenFile("/dev/"+d.loop, os.O_RDONLY|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		_, err = f.ReadAt(aligned(blockSize), at)
		return err
	}
	if err := read(8192); err != nil {
		t.Fatal(err)
	}
	d.fail("read", 16)
	if err := errors.Join(read(4096), read(12288)); err != nil {
		t.Errorf("beside the broken sector: %v", err)
	}
	if err := read(8192); !errors.Is(err, unix.EIO) {
		t.Errorf("of the broken sector: %v", err)
	}
	d.heal()
	if err := read(8192); err != nil {
		t.Error(err)
	}
	if _, blank := hashFile(t, file, 0); !blank {
		t.Error("not blank")
	}
	poke(t, file, 5<<20, 1)
	if _, blank := hashFile(t, file, 0); blank {
		t.Error("blank")
	}
}
