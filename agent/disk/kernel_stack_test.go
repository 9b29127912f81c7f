//go:build kernel

package disk

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

var stripeIDs = []string{"disk-stripe00", "disk-stripe01", "disk-stripe02"}

// newStripe returns a stripe of loop devices, and the files behind them. The machine
// that runs it need have no md: what is tested is all that comes before mdadm.
func newStripe(t *testing.T, prepare func(i int, file string)) (*Disk, []string) {
	t.Helper()
	dir := t.TempDir()
	d := New(Options{
		Want:   node.DiskConfig{DiskIDs: stripeIDs, FileSystem: node.Ext4, MountPoint: filepath.Join(dir, "mnt")},
		Ledger: filepath.Join(dir, "ledger"), Log: slog.New(slog.DiscardHandler),
	})
	d.sys = filepath.Join(dir, "sys")
	var files []string
	for i, id := range stripeIDs {
		file := filepath.Join(dir, id)
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		truncate(t, file, 200<<20)
		if prepare != nil {
			prepare(i, file)
		}
		b := &bench{Disk: d, file: file}
		b.loop = strings.TrimPrefix(strings.TrimSpace(run(t, "losetup", "--direct-io=on", "--find", "--show", file)), "/dev/")
		t.Cleanup(func() { run(t, "losetup", "--detach", "/dev/"+b.loop) })
		b.plug(t, b.loop, id)
		files = append(files, file)
	}
	t.Cleanup(d.Close)
	return d, files
}

// permitOf returns what prove does, once all has been read.
func permitOf(t *testing.T, d *Disk) (*permit, observed, error) {
	t.Helper()
	for range 600 {
		have, err := d.observe(t.Context(), true)
		if err != nil {
			t.Fatal(err)
		}
		at, err := raise(d.want, have)
		if err != nil {
			t.Fatal(err)
		}
		p, err := d.prove(t.Context(), at, have)
		if node.ReasonOf(err, "") != "Proving" {
			return p, have, err
		}
	}
	t.Fatal("no end")
	return nil, observed{}, nil
}

// TestKernelStripePermit: all disks are held at once, and the ledger has their order
// before anything is written.
func TestKernelStripePermit(t *testing.T) {
	d, files := newStripe(t, nil)
	p, _, err := permitOf(t, d)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.claims) != 3 || p.made.Array == nil || strings.Join(p.made.Array.Members, " ") != strings.Join(stripeIDs, " ") {
		t.Errorf("permit %+v", p)
	}
	all, err := d.ledger.read()
	if err != nil || len(all) != 3 {
		t.Fatalf("ledger %v, %v", all, err)
	}
	for i, id := range stripeIDs {
		if e := all[id]; e.State != stateFormatting || e.Boot != d.boot || e.Array.UUID != p.made.Array.UUID || e.DiskID != stripeIDs[0] {
			t.Errorf("ledger of %s: %+v", id, e)
		}
		if f, err := os.Open("/dev/" + p.claims[i].dev.Name); err != nil || !errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK) {
			t.Errorf("%s is not locked: %v", id, err)
		} else {
			f.Close()
		}
		if st, err := os.Stat(files[i]); err != nil || st.Size() != 200<<20 {
			t.Error(err)
		}
	}
	uuid := p.made.Array.UUID
	p.close()
	// Cut off, and taken up again: under the same UUIDs.
	if p, _, err = permitOf(t, d); err != nil || p.made.Array.UUID != uuid {
		t.Fatalf("the second permit: %+v, %v", p, err)
	}
	p.close()
}

// TestKernelStripeOneDiskRefused: what one disk holds keeps all from being made an
// array, and none stays claimed.
func TestKernelStripeOneDiskRefused(t *testing.T) {
	for name, at := range map[string]int64{"in the middle": 99<<20 + 77, "at the end": 200<<20 - 1, "at the start": 0} {
		t.Run(name, func(t *testing.T) {
			d, _ := newStripe(t, func(i int, file string) {
				if i == 1 {
					poke(t, file, at, 1)
				}
			})
			p, have, err := permitOf(t, d)
			if p != nil || node.ReasonOf(err, "") != "Foreign" || !strings.Contains(err.Error(), stripeIDs[1]) {
				t.Errorf("permit %v, %v", p, err)
			}
			for _, dev := range have.Devices {
				f, err := os.OpenFile("/dev/"+dev.Name, os.O_RDONLY|unix.O_EXCL, 0)
				if err != nil {
					t.Errorf("%s is still claimed: %v", dev, err)
					continue
				}
				f.Close()
			}
			if all, _ := d.ledger.read(); len(all) > 0 {
				t.Errorf("ledger %v", all)
			}
		})
	}
}

// TestKernelStripeSuperblockLeft: of an attempt that was cut off, the superblock that
// is the ledger's counts as blank, and nothing beside it does.
func TestKernelStripeSuperblockLeft(t *testing.T) {
	head := unpack(t, mdHead, front)
	for name, c := range map[string]struct {
		uuid string
		poke int64 // -1: nothing
		ok   bool
	}{
		"ours alone":        {"ad97b612-c3bc-8ca7-8cf5-ceaac9d23673", -1, true},
		"and data":          {"ad97b612-c3bc-8ca7-8cf5-ceaac9d23673", dataAt, false},
		"and more data":     {"ad97b612-c3bc-8ca7-8cf5-ceaac9d23673", 150<<20 + 3, false},
		"and a boot sector": {"ad97b612-c3bc-8ca7-8cf5-ceaac9d23673", 510, false},
		"another's":         {"11111111-c3bc-8ca7-8cf5-ceaac9d23673", -1, false},
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := newStripe(t, func(i int, file string) {
				if i != 1 {
					return
				}
				f, err := os.OpenFile(file, os.O_WRONLY, 0)
				if err == nil {
					_, err = f.WriteAt(head[superAt:superAt+4096], superAt)
					err = errors.Join(err, f.Close())
				}
				if err != nil {
					t.Fatal(err)
				}
				if c.poke >= 0 {
					poke(t, file, c.poke, 1)
				}
			})
			if err := d.ledger.write(entry{
				DiskID: stripeIDs[0], MountPoint: d.want.MountPoint, FileSystem: node.Ext4, UUID: "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ab",
				State: stateFormatting, Array: &madeArray{UUID: c.uuid, Members: stripeIDs, ChunkBytes: chunkBytes},
			}); err != nil {
				t.Fatal(err)
			}
			p, _, err := permitOf(t, d)
			if (err == nil) != c.ok {
				t.Errorf("permit %v, %v", p, err)
			}
			if p != nil {
				p.close()
			}
		})
	}
}

// TestKernelHeaderLeft: the same of a header that cryptsetup has made.
func TestKernelHeaderLeft(t *testing.T) {
	const uuid = "068b17ba-006b-8074-8201-ceaac9d23673"
	for name, c := range map[string]struct {
		poke int64
		ok   bool
	}{"alone": {-1, true}, "and data": {headerBytes, false}, "and more data": {300<<20 + 3, false}, "and the end": {400<<20 - 1, false}} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, node.Ext4, func(file string) {
				key := filepath.Join(t.TempDir(), "key")
				if err := os.WriteFile(key, []byte(strings.Repeat("k", keyMin)), 0o600); err != nil {
					t.Fatal(err)
				}
				run(t, "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
					"--uuid", uuid, "--label", label(serial), "--key-file", key, file)
				if c.poke >= 0 {
					poke(t, file, c.poke, 1)
				}
			})
			b.want.Encryption = &node.DiskEncryption{KeyFrom: node.KeyFromInstance}
			if err := b.ledger.write(entry{
				DiskID: serial, MountPoint: b.want.MountPoint, FileSystem: node.Ext4, UUID: "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ab", State: stateFormatting, Crypt: uuid,
			}); err != nil {
				t.Fatal(err)
			}
			p, have, err := permitOf(t, b.Disk)
			if (err == nil) != c.ok || have.Content.Header == nil && p != nil {
				t.Errorf("permit %v, %v; found %v", p, err, have.Content)
			}
			if p != nil {
				p.close()
			}
		})
	}
}

// TestKernelKeys: a key that others can have read is none, and one that is derived from
// the instance is the same every time, of this disk alone, and never in the ledger.
func TestKernelKeys(t *testing.T) {
	b := newBench(t, node.Ext4, nil)
	path := filepath.Join(t.TempDir(), "key")
	b.want.Encryption = &node.DiskEncryption{KeyFile: path}
	for name, c := range map[string]struct {
		size int
		mode os.FileMode
		want string // in the problem; empty: it is good
	}{
		"short": {31, 0o600, "31 bytes"}, "long": {513, 0o600, "513 bytes"}, "readable": {32, 0o640, "mode 0640"}, "good": {32, 0o600, ""}, "read only": {512, 0o400, ""},
	} {
		if err := errors.Join(os.RemoveAll(path), os.WriteFile(path, make([]byte, c.size), 0o600), os.Chmod(path, c.mode)); err != nil {
			t.Fatal(err)
		}
		if got := b.keyState(serial); (got.Problem == "") != (c.want == "") || !strings.Contains(got.Problem, c.want) {
			t.Errorf("%s: %+v", name, got)
		}
	}
	os.Remove(path)
	if got := b.keyState(serial); !strings.Contains(got.Problem, "no such file") || got.New {
		t.Errorf("missing: %+v", got)
	}

	b.want.Encryption = &node.DiskEncryption{KeyFrom: node.KeyFromInstance}
	b.sealed.Facts.InstanceID = "ins-1"
	if got := b.keyState(serial); !got.New {
		t.Errorf("before the first disk: %+v", got)
	}
	one, err := b.key(serial, true)
	if err != nil || len(one.Reveal()) != keyMin {
		t.Fatal(err)
	}
	for id, same := range map[string]bool{serial: true, "disk-other000": false} {
		if k, err := b.key(id, true); err != nil || (k.Reveal() == one.Reveal()) != same {
			t.Errorf("%s: %v", id, err)
		}
	}
	b.sealed.Facts.InstanceID = "ins-2"
	if k, err := b.key(serial, false); err != nil || k.Reveal() == one.Reveal() {
		t.Errorf("another instance has the same key: %v", err)
	}
	if all, err := b.ledger.read(); err != nil || len(all) > 0 {
		t.Errorf("the key is taken for an entry: %v, %v", all, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if said, err := program(ctx, invocation{args: []string{"sh", "-c", "wc -c; exit 2"}, stdin: one}); said != "32" || err == nil || strings.Contains(err.Error(), one.Reveal()) {
		t.Errorf("a program is given %s bytes: %v", said, err)
	}
}
