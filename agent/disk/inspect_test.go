package disk

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// fakeDisk is a disk of zeros with some bytes set, and with a fault in one read.
type fakeDisk struct {
	size  int64
	set   map[int64]byte
	reads atomic.Int64
	fail  int64                              // number of the read that fails, from 1
	how   func(b []byte, n int) (int, error) // what the failing read does
}

//go:norace // as that of sparse
func (d *fakeDisk) ReadAt(b []byte, at int64) (int, error) {
	read := d.reads.Add(1)
	if at < 0 || at+int64(len(b)) > d.size {
		return 0, fmt.Errorf("read outside of the disk: %d bytes at %d", len(b), at)
	}
	clear(b)
	for i, c := range d.set {
		if i >= at && i < at+int64(len(b)) {
			b[i-at] = c
		}
	}
	if read == d.fail {
		return d.how(b, len(b))
	}
	return len(b), nil
}

// sizes of disks; small ones are read in full as well.
var sizes = []int64{1 << 20, 32<<20 - 512, 64 << 20, 20 << 30, 3 << 40}

const small = 64 << 20

// judged reads a disk as it is read before it is formatted without the cloud's word.
func judged(r io.ReaderAt, size int64) content {
	c := glance(r, size) // the plan's
	if c.Blank {
		c = inspect(r, size)
	}
	if c.Blank && size <= small {
		c = readAll(r, size)
	}
	return c
}

func TestZerosAreBlank(t *testing.T) {
	for _, size := range sizes {
		if c := judged(&fakeDisk{size: size}, size); !c.Blank || c.Unreadable != "" {
			t.Errorf("%d bytes of zeros: %v", size, c)
		}
	}
}

func TestNothingToReadIsNotBlank(t *testing.T) {
	if c := judged(&fakeDisk{}, 0); c.Blank || c.Unreadable == "" {
		t.Errorf("a disk without capacity: %+v", c)
	}
}

// TestNoFaultIsBlank makes every single read fail: the first ones in every way,
// the later ones in one way each.
func TestNoFaultIsBlank(t *testing.T) {
	faults := []func([]byte, int) (int, error){
		func(_ []byte, _ int) (int, error) { return 0, syscall.EIO },
		func(_ []byte, n int) (int, error) { return n, syscall.EIO },
		func(_ []byte, n int) (int, error) { return n - 1, nil },
		func(_ []byte, _ int) (int, error) { return 0, nil },
		func(_ []byte, n int) (int, error) { return n / 2, io.EOF },
		func(b []byte, n int) (int, error) { b[n-1] = 0x80; return n, nil },
	}
	for _, size := range []int64{32<<20 - 512, 20 << 30} {
		good := &fakeDisk{size: size}
		judged(good, size)
		reads := good.reads.Load()
		for fail := int64(1); fail <= reads; fail++ {
			if fail > 30 && reads-fail > 10 && fail%200 != 0 {
				continue // of the sample, some
			}
			for i, how := range faults {
				if fail > 3 && fail%int64(len(faults)) != int64(i) {
					continue
				}
				if c := judged(&fakeDisk{size: size, fail: fail, how: how}, size); c.Blank {
					t.Fatalf("fault %d in read %d of %d of a disk of %d bytes: blank", i, fail, reads, size)
				}
			}
		}
	}
}

// TestOneByteIsNotBlank sets one byte at both ends, and at both ends of every
// window.
func TestOneByteIsNotBlank(t *testing.T) {
	for _, size := range sizes {
		at := []int64{0, 1, front - 1, front, edge - 1, size - edge, size - 1}
		for _, sb := range superblocks(size) {
			at = append(at, sb+rand.Int64N(spot))
		}
		if size <= small {
			at = append(at, 37<<20+5, size/2+1, size/3*2, rand.Int64N(size))
		}
		for range 8 {
			at = append(at, rand.Int64N(min(edge, size)), size-1-rand.Int64N(min(edge, size)))
		}
		for _, i := range at {
			if i < 0 || i >= size {
				continue
			}
			if c := judged(&fakeDisk{size: size, set: map[int64]byte{i: 1}}, size); c.Blank || c.Unreadable != "" {
				t.Errorf("byte %d of %d is not zero: %v", i, size, c)
			}
		}
	}
}

func TestWindows(t *testing.T) {
	for _, size := range sizes {
		all := append([]span{{0, min(front, size)}}, windows(size)...)
		if all[len(all)-1].to != size {
			t.Errorf("%d: ends at %d", size, all[len(all)-1].to)
		}
		for i, s := range all {
			if s.from%blockSize != 0 || s.to <= s.from || s.to > size || s.to%512 != 0 {
				t.Errorf("%d: window %+v", size, s)
			}
			if i > 0 && s.from < all[i-1].from {
				t.Errorf("%d: window %+v after %+v", size, s, all[i-1])
			}
		}
	}
}

// TestEveryStratumIsVisited, so that much data anywhere has a chance to be seen.
func TestEveryStratumIsVisited(t *testing.T) {
	for _, size := range sizes[3:] {
		r := &recorder{at: map[int64]bool{}}
		if c := sample(r, size); !c.Blank {
			t.Fatalf("%d: %v", size, c)
		}
		seen := map[int64]bool{}
		for at := range r.at {
			if at%blockSize != 0 || at+blockSize > size {
				t.Errorf("%d: read at %d", size, at)
			}
			seen[(at+blockSize-1)/(size/strata)] = true
		}
		if len(r.at) != strata || len(seen) < strata*9/10 {
			t.Errorf("%d: %d reads in %d of %d strata", size, len(r.at), len(seen), strata)
		}
	}
}

// recorder is a disk of zeros that remembers where it was read.
type recorder struct {
	mu sync.Mutex // guards at
	at map[int64]bool
}

func (r *recorder) ReadAt(b []byte, at int64) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.at[at] = true
	return len(b), nil
}

// TestIdentifyRealFileSystems reads what the real tools write. No root is needed:
// they work on files as well.
func TestIdentifyRealFileSystems(t *testing.T) {
	const uuid = "6c1f3ab8-0d0a-4bdc-8a3e-0123456789ab"
	tests := []struct {
		args  []string
		names []string
		label string
	}{
		{[]string{"mkfs.ext4", "-q", "-U", uuid, "-L", "tke-abc12345"}, []string{"ext4"}, "tke-abc12345"},
		{[]string{"mkfs.ext4", "-q", "-O", "^metadata_csum", "-U", uuid}, []string{"ext4"}, ""},
		{[]string{"mkfs.ext3", "-q", "-U", uuid}, []string{"ext3"}, ""},
		{[]string{"mkfs.ext2", "-q", "-U", uuid}, []string{"ext2"}, ""},
		{[]string{"mkfs.xfs", "-q", "-m", "uuid=" + uuid, "-L", "tke-abc12345"}, []string{"xfs"}, "tke-abc12345"},
		{[]string{"mkswap", "-q", "-U", uuid}, []string{"swap"}, ""},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk")
			const size = 320 << 20
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, size); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(tt.args[0], append(tt.args[1:], path)...)
			cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
			if cmd.Path, _ = exec.LookPath("/usr/sbin/" + tt.args[0]); cmd.Path == "" {
				t.Fatalf("%s is not installed", tt.args[0])
			}
			cmd.Err = nil
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			c := inspect(f, size)
			if !reflect.DeepEqual(c.Signatures, tt.names) || c.Label != tt.label || c.Blank {
				t.Errorf("%+v (%v)", c, c)
			}
			known := tt.names[0] != "swap"
			if known && c.UUID != uuid {
				t.Errorf("uuid %q", c.UUID)
			}
			if tt.label == "" {
				return
			}
			// A superblock with one flipped bit is not ours any more.
			for _, at := range []int64{0x70, 1024 + 0x70} {
				b := make([]byte, 1)
				f.ReadAt(b, at)
				f.WriteAt([]byte{b[0] ^ 4}, at)
				defer f.WriteAt(b, at)
			}
			if c := inspect(f, size); c.UUID != "" || !strings.HasPrefix(c.Signatures[0], "damaged") {
				t.Errorf("damaged: %+v", c)
			}
		})
	}
}

func TestSignaturesAreFound(t *testing.T) {
	const size = 40 << 20
	for _, s := range signatures {
		d := &fakeDisk{size: size, set: map[int64]byte{}}
		at := int64(s.at)
		if at < 0 {
			at += size
		}
		for i := range len(s.magic) {
			d.set[at+int64(i)] = s.magic[i]
		}
		if c := inspect(d, size); c.Blank || !slices.Contains(c.Signatures, s.name) {
			t.Errorf("%s at %d: %+v", s.name, s.at, c)
		}
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add([]byte("XFSB"), []byte{})
	f.Add(make([]byte, 8192), make([]byte, 4096))
	f.Fuzz(func(t *testing.T, head, tail []byte) {
		found, uuid, _ := identify(head, tail)
		if uuid != "" && len(found) != 1 {
			t.Errorf("uuid %s with %v", uuid, found)
		}
	})
}

func FuzzMountinfo(f *testing.F) {
	f.Add("36 35 98:0 / /mnt\\040x rw,noatime master:1 - ext4 /dev/vdb ro,errors=remount-ro\n")
	f.Add("1 1 0:1 / / rw - rootfs rootfs rw\n")
	f.Fuzz(func(t *testing.T, text string) {
		all, err := parseMountinfo(text)
		if lines := strings.Count(text, " - "); err == nil && len(all) > lines {
			t.Errorf("%d mounts in %d lines", len(all), lines)
		}
	})
}

func TestMountinfo(t *testing.T) {
	all, err := parseMountinfo(`21 1 253:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
90 21 253:16 / /data\040disk rw,noatime shared:9 - ext4 /dev/vdb ro,errors=remount-ro
91 21 0:50 /a\040b /x ro - tmpfs a\134b rw
`)
	want := []mount{
		{Dev: "253:1", Target: "/", FSType: "ext4", Source: "/dev/vda1"},
		{Dev: "253:16", Target: "/data disk", FSType: "ext4", Source: "/dev/vdb", ReadOnly: true},
		{Dev: "0:50", Subdir: "/a b", Target: "/x", FSType: "tmpfs", Source: `a\b`, ReadOnly: true},
	}
	if err != nil || !reflect.DeepEqual(all, want) {
		t.Errorf("%+v, %v", all, err)
	}
	for _, bad := range []string{"x", "1 2 3 - 4", "36 35 98:0 / /mnt rw ext4 /dev/vdb rw"} {
		if _, err := parseMountinfo(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestLedger(t *testing.T) {
	l := ledger(filepath.Join(t.TempDir(), "disk"))
	if all, err := l.read(); err != nil || len(all) != 0 {
		t.Fatalf("a ledger that is not there: %v, %v", all, err)
	}
	e := entry{DiskID: "disk-abc12345", MountPoint: "/data", FileSystem: "ext4", State: stateFormatting,
		UUID: newUUID("cls-abc"), SizeBytes: 1 << 30}
	if err := l.write(e); err != nil {
		t.Fatal(err)
	}
	all, err := l.read()
	if got := all[e.DiskID]; err != nil || got.UUID != e.UUID || got.At.IsZero() {
		t.Fatalf("%+v, %v", all, err)
	}
	path := filepath.Join(string(l), e.DiskID+".json")
	whole, _ := os.ReadFile(path)
	for n := range len(whole) - 1 { // cut off anywhere, but for the newline
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := l.read(); err == nil {
			t.Fatalf("an entry torn after %d of %d bytes was accepted", n, len(whole))
		}
	}
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(whole), e.DiskID, "disk-other")), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := l.read(); err == nil {
		t.Error("another disk's entry was accepted")
	}
	if _, err := ledger(path).read(); err == nil || errors.Is(err, os.ErrNotExist) {
		t.Errorf("a ledger that cannot be listed: %v", err)
	}
}
