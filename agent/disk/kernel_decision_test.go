//go:build kernel

package disk

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// TestKernelDecisions: what an operator may decide of disks that are not blank, and
// what not even then.
func TestKernelDecisions(t *testing.T) {
	order := Order{Act: actFormat, DiskID: serial, Serial: serial, UID: 0, PID: 4711}
	for name, prepare := range map[string]func(file string){
		"xfs": func(f string) { run(t, "mkfs.xfs", "-q", f) },
		"md": func(f string) {
			for _, at := range []int64{4096, 400<<20 - 64<<10, 400<<20 - 12<<10} {
				for i, c := range []byte("\xfc\x4e\x2b\xa9") {
					poke(t, f, at+int64(i), c)
				}
			}
		},
		"gpt": func(f string) {
			sfdisk := exec.CommandContext(t.Context(), "/usr/sbin/sfdisk", "-q", f)
			sfdisk.Stdin = strings.NewReader("label: gpt\n,100M\n,\n")
			if out, err := sfdisk.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		},
	} {
		t.Run("format "+name, func(t *testing.T) {
			b := newBench(t, node.Ext4, prepare)
			if p, err := b.plan(t); err == nil || !p.Empty() || !strings.Contains(err.Error(), "tkenode disk format "+serial) {
				t.Fatalf("%v%v", p, err)
			}
			for what, wrong := range map[string]Order{
				"serial": {Act: actFormat, DiskID: serial, Serial: "disk-other000"},
				"disk":   {Act: actFormat, DiskID: "disk-other000", Serial: "disk-other000"},
				"act":    {Act: "wipe", DiskID: serial, Serial: serial},
			} {
				if err := b.Decide(t.Context(), wrong); !errors.Is(err, ErrRefused) {
					t.Errorf("wrong %s: %v", what, err)
				}
			}
			if err := b.Decide(t.Context(), order); err != nil {
				t.Fatal(err)
			}
			if got := b.converge(t); !strings.Contains(got, "user id 0 (pid 4711) decided") {
				t.Errorf("plan:\n%s", got)
			}
			if st := b.State(); st.State != Mounted || !strings.Contains(st.Proof, "user id 0") {
				t.Errorf("state %+v", st)
			}
			if c := b.ledger.decision(serial); c == nil || c.Used.IsZero() {
				t.Errorf("the decision is not used up: %+v", c)
			}
			if err := b.Decide(t.Context(), order); !errors.Is(err, ErrRefused) {
				t.Errorf("formatting what is mounted: %v", err)
			}
		})
	}
	t.Run("adopt", func(t *testing.T) {
		b := newBench(t, node.XFS, func(f string) { run(t, "mkfs.xfs", "-q", f) })
		adopt := Order{Act: actAdopt, DiskID: serial, Serial: serial}
		if err := b.Decide(t.Context(), adopt); err != nil {
			t.Fatal(err)
		}
		if got := b.converge(t); !strings.HasPrefix(got, "adopt ") {
			t.Errorf("plan:\n%s", got)
		}
	})
	t.Run("adopt data", func(t *testing.T) {
		b := newBench(t, node.XFS, func(f string) { poke(t, f, 8192, 1) })
		if err := b.Decide(t.Context(), Order{Act: actAdopt, DiskID: serial, Serial: serial}); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
	})
	t.Run("in use", func(t *testing.T) {
		b := newBench(t, node.Ext4, func(f string) { run(t, "mkfs.ext4", "-q", f) })
		dir := t.TempDir()
		run(t, "mount", "-o", "ro", "/dev/"+b.loop, dir)
		defer run(t, "umount", dir)
		if err := b.Decide(t.Context(), order); !errors.Is(err, ErrRefused) {
			t.Error(err)
		}
	})
	t.Run("torn", func(t *testing.T) {
		b := newBench(t, node.Ext4, func(f string) { poke(t, f, 8192, 1) })
		if err := b.Decide(t.Context(), order); err != nil {
			t.Fatal(err)
		}
		path := string(b.ledger) + "/" + serial + ".decision"
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, whole[:len(whole)/2], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := b.plan(t); node.ReasonOf(err, "") != "Foreign" {
			t.Errorf("error %v", err)
		}
	})
}
