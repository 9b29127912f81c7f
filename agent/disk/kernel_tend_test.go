//go:build kernel

package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// stored is how much of the disk the file behind it takes.
func (b *bench) stored(t *testing.T) int64 {
	t.Helper()
	unix.Sync()
	var st unix.Stat_t
	if err := unix.Stat(b.file, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestKernelTrim: what was deleted is given back to the disk, in time and once.
func TestKernelTrim(t *testing.T) {
	for _, fs := range []node.FileSystem{node.Ext4, node.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			b := newMounted(t, fs)
			waste := filepath.Join(b.want.MountPoint, "waste")
			if err := os.WriteFile(waste, bytes.Repeat([]byte{7}, 100<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			full := b.stored(t)
			if err := os.Remove(waste); err != nil {
				t.Fatal(err)
			}
			// xfs frees what was deleted when it gets to it, at the latest here.
			must(t, unix.Unmount(b.want.MountPoint, 0))
			b.converge(t)

			s, _ := b.account.watch()
			s.MountPoint = b.want.MountPoint
			now := time.Now()
			if next := b.tendTrim(t.Context(), s, now); !next.After(now) || b.State().Trim == nil || b.State().Trim.Last != (Trim{}) {
				t.Errorf("trimmed although it was just formatted; next at %s, %+v", next, b.State().Trim)
			}
			// Three weeks later, of which the agent has run two.
			old := now.Add(-3 * trimPeriod)
			s.Ledger = &Past{At: old}
			next := b.tendTrim(t.Context(), s, old.Add(trimPeriod))
			st := b.State().Trim
			if st == nil || st.Last.Error != "" || st.Last.Bytes < 100<<20 || !next.After(now.Add(trimPeriod/2)) || !st.Next.Equal(next) {
				t.Fatalf("%+v, next at %s", st, next)
			}
			if left := b.stored(t); full-left < 90<<20 {
				t.Errorf("%s before, %s after %s were trimmed", Size(full), Size(left), Size(st.Last.Bytes))
			}
			// Another agent finds it done.
			again := New(Options{Want: b.want, Ledger: string(b.ledger), Run: b.run, Log: slog.New(slog.DiscardHandler)})
			again.sys = b.sys
			if n := again.tendTrim(t.Context(), s, now); !n.Equal(next) || again.State().Trim.Last != st.Last {
				t.Errorf("next at %s, before at %s; %+v", n, next, again.State().Trim)
			}
		})
	}
}

// TestKernelTrimOtherDisk: a disk that is another one by now is not trimmed, nor is
// one that takes no discards, nor what is mounted over the mount point.
func TestKernelTrimOtherDisk(t *testing.T) {
	b := newMounted(t, node.Ext4)
	s, _ := b.account.watch()
	s.MountPoint = b.want.MountPoint
	b.setSerial(t, "disk-other000")
	if _, err := b.trim(t.Context(), s); !errors.Is(err, errChanged) {
		t.Errorf("another serial: %v", err)
	}
	b.setSerial(t, serial)
	if err := unix.Mount("tmpfs", b.want.MountPoint, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := b.trim(t.Context(), s); !errors.Is(err, errChanged) {
		t.Errorf("mounted over: %v", err)
	}
	if err := unix.Unmount(b.want.MountPoint, 0); err != nil {
		t.Fatal(err)
	}
	queue := filepath.Join(b.sys, "block", b.loop, "queue")
	if err := errors.Join(os.Remove(queue), os.Mkdir(queue, 0o755), os.WriteFile(filepath.Join(queue, "discard_max_bytes"), []byte("0\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if next := b.tendTrim(t.Context(), s, time.Now().Add(-10*trimPeriod)); !next.IsZero() || b.State().Trim.Never == "" {
		t.Errorf("next at %s, %+v", next, b.State().Trim)
	}
}

// TestKernelOthersAreLeftAlone: a disk of the CSI driver's, larger than its file
// system and long not trimmed, is listed, and nothing is done to it.
func TestKernelOthersAreLeftAlone(t *testing.T) {
	ours := newMounted(t, node.Ext4)
	theirs := newMounted(t, node.XFS)
	theirs.enlarge(t, 600<<20)
	const id = "disk-csi00001"
	loop := theirs.loop
	sysfsEntry(t, ours.sys, loop, id)
	before, used := theirs.hash(t), theirs.used(t)
	if p, err := ours.plan(t); err != nil || !p.Empty() {
		t.Errorf("plan %q, %v", p, err)
	}
	o := NewOthers(func() []State { return []State{ours.State()} }, slog.New(slog.DiscardHandler))
	o.sys = ours.sys
	all, err := o.observe()
	if err != nil || len(all) != 1 || all[0].DiskID != id || all[0].Mount != theirs.want.MountPoint || all[0].SizeBytes != 600<<20 {
		t.Errorf("others: %+v, %v", all, err)
	}
	s, _ := ours.account.watch()
	s.MountPoint, s.Ledger = ours.want.MountPoint, &Past{At: time.Now().Add(-5 * trimPeriod)}
	ours.tendTrim(t.Context(), s, time.Now().Add(-4*trimPeriod))
	if theirs.hash(t) != before || theirs.used(t) != used {
		t.Error("the other disk has changed")
	}
	if _, err := os.Stat(filepath.Join(string(ours.ledger), id+".trim")); err == nil {
		t.Error("the other disk was trimmed")
	}
}

// TestKernelOthersVolumeData reads what kubelet writes beside a volume.
func TestKernelOthersVolumeData(t *testing.T) {
	b := newMounted(t, node.Ext4)
	dir := fmt.Sprintf("%s%s/%x", volumesDir, CSIDriver, sha256.Sum256([]byte("disk-kerneltest")))
	target := dir + globalMount
	if err := os.MkdirAll(target, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	text := fmt.Sprintf(`{"driverName":%q,"volumeHandle":"disk-kerneltest"}`, CSIDriver)
	if err := errors.Join(unix.Mount(b.want.MountPoint, target, "", unix.MS_BIND, ""), os.WriteFile(filepath.Join(dir, volumeData), []byte(text), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(target, 0) })
	o := NewOthers(func() []State { return nil }, slog.New(slog.DiscardHandler))
	o.sys = b.sys
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { o.Run(ctx); close(ended) }()
	t.Cleanup(func() { cancel(); <-ended })
	for deadline := time.Now().Add(time.Minute); ; {
		all, changed, known := o.All()
		if known {
			if len(all) != 1 || !strings.Contains(all[0].Mismatch, "is the volume disk-kerneltest and has /dev/"+b.loop+" mounted, whose live serial is "+serial) {
				t.Errorf("%+v", all)
			}
			break
		}
		select {
		case <-changed:
		case <-time.After(time.Until(deadline)):
			t.Fatal("it does not look")
		}
	}
}
