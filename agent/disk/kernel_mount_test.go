//go:build kernel

package disk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// TestKernelClones: a disk that was made from a snapshot of another has its UUID and
// label. Nothing happens to it until somebody decides; then both are mounted, each at
// its own place.
func TestKernelClones(t *testing.T) {
	for _, fs := range []node.FileSystem{node.Ext4, node.XFS} {
		t.Run(string(fs), func(t *testing.T) {
			a := newBench(t, fs, nil)
			a.converge(t)
			must(t, os.WriteFile(filepath.Join(a.want.MountPoint, "whose"), []byte("the first"), 0o600))
			must(t, unix.Unmount(a.want.MountPoint, 0))
			b := newBench(t, fs, func(file string) { run(t, "cp", "--sparse=always", a.file, file) })
			const other = "disk-other000"
			b.want.DiskID, b.ledger, b.sys = other, a.ledger, a.sys
			sysfsEntry(t, b.sys, b.loop, other)
			a.converge(t)

			before := b.hash(t)
			if _, err := b.plan(t); node.ReasonOf(err, "") != "Foreign" {
				t.Errorf("a disk made from a snapshot of the other: %v", err)
			}
			if b.hash(t) != before {
				t.Error("it has changed")
			}
			must(t, b.Decide(t.Context(), Order{Act: actAdopt, DiskID: other, Serial: other}))
			b.converge(t)
			must(t, os.WriteFile(filepath.Join(b.want.MountPoint, "whose"), []byte("the second"), 0o600))
			for d, want := range map[*bench]string{a: "the first", b: "the second"} {
				if got, err := os.ReadFile(filepath.Join(d.want.MountPoint, "whose")); err != nil || string(got) != want {
					t.Errorf("%s: %q, %v", d.want.MountPoint, got, err)
				}
			}
			// A reboot, after which the other one is looked at first.
			must(t, errors.Join(unix.Unmount(a.want.MountPoint, 0), unix.Unmount(b.want.MountPoint, 0)))
			for _, d := range []*bench{b, a} {
				if got := d.converge(t); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "mount "+d.want.DiskID) {
					t.Errorf("plan after a reboot:\n%s", got)
				}
			}
			if got, err := os.ReadFile(filepath.Join(b.want.MountPoint, "whose")); err != nil || string(got) != "the second" {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

// TestKernelUnmountable: what the kernel does not mount is a case for a human.
func TestKernelUnmountable(t *testing.T) {
	b := newBench(t, node.XFS, nil)
	b.converge(t)
	must(t, unix.Unmount(b.want.MountPoint, 0))
	for at := int64(512); at < 2048; at += 64 { // the other headers of the first group
		poke(t, b.file, at, 0xaa)
	}
	p, err := b.plan(t)
	if err == nil {
		err = b.Apply(t.Context(), p)
	}
	if node.ReasonOf(err, "") != "Unmountable" || node.ClassOf(err) != node.ClassTerminal {
		t.Errorf("plan %q: %v", p, err)
	}
}

// TestKernelRefusedProofIsShown: what a sample has found is what the next plan says.
func TestKernelRefusedProofIsShown(t *testing.T) {
	b := newBench(t, node.Ext4, func(f string) { poke(t, f, 10<<20, 7) }) // of both ends, and so always read
	p, err := b.plan(t)
	if err != nil || p.Empty() {
		t.Fatalf("%v%v", p, err)
	}
	if err := b.Apply(t.Context(), p); node.ReasonOf(err, "") != "Foreign" || b.proof != nil {
		t.Errorf("error %v", err)
	}
	if p, err := b.plan(t); node.ReasonOf(err, "") != "Foreign" || !p.Empty() || b.State().State != "Foreign" {
		t.Errorf("the next plan: %v%v, state %+v", p, err, b.State())
	}
}
