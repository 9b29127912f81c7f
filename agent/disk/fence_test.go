package disk

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestLost: only a device that is not there in two looks that could be trusted is
// gone, or one whose number another device has.
func TestLost(t *testing.T) {
	there, away, blind := sight{sound: true, there: true, seq: "9"}, sight{sound: true}, sight{}
	other, old := sight{sound: true, there: true, seq: "12"}, sight{sound: true, there: true}
	for name, c := range map[string]struct {
		looks []sight
		want  string
	}{
		"there":                       {[]sight{there}, ""},
		"there before Linux 5.15":     {[]sight{old, old}, ""},
		"away for a moment":           {[]sight{away, there}, ""},
		"away, then sysfs unreadable": {[]sight{away, blind}, ""},
		"sysfs unreadable":            {[]sight{blind, blind}, ""},
		"no look":                     {nil, ""},
		"away":                        {[]sight{away, away}, "its block device 253:16 is not in /sys/dev/block any more"},
		"another has the number":      {[]sight{other, other}, "its device number 253:16 is another device's now (diskseq 12, it was 9)"},
		"away, then another":          {[]sight{away, other}, "its device number 253:16 is another device's now (diskseq 12, it was 9)"},
	} {
		if got := lost(serving{DiskID: "disk-abc12345", Dev: "253:16", Seq: "9"}, c.looks...); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// TestAnother: a serial that is another disk's is believed when it is told twice.
func TestAnother(t *testing.T) {
	const ours, theirs = "disk-abc12345", "disk-other000"
	for _, c := range []struct {
		told []string
		is   bool
	}{
		{nil, false}, {[]string{theirs}, false}, {[]string{ours, theirs}, false}, {[]string{theirs, ours}, false},
		{[]string{theirs, "disk-third000"}, false}, {[]string{"", ""}, false}, {[]string{theirs, theirs}, true}, {[]string{ours, theirs, theirs}, true},
	} {
		if got := another(serving{DiskID: ours, Dev: "253:16"}, c.told); (got != "") != c.is {
			t.Errorf("%q: %q", c.told, got)
		}
	}
	stripe := serving{DiskID: ours, Dev: "9:128", Disks: []serving{{DiskID: ours, Dev: "253:16"}, {DiskID: "disk-second00", Dev: "253:32"}}}
	for told, is := range map[string]bool{ours + "+disk-second00": false, ours + "+" + theirs: true, "disk-second00+" + ours: true, ours: true, "": false} {
		if got := another(stripe, []string{told, told}); (got != "") != is {
			t.Errorf("%q: %q", told, got)
		}
	}
}

// TestLostUnderAnArray: the array is there as before, and what one of its disks was is
// gone, or another's by now.
func TestLostUnderAnArray(t *testing.T) {
	d := New(Options{})
	d.sys = t.TempDir()
	was := serving{DiskID: "disk-first000", Dev: "9:128", Seq: "21", Disks: []serving{
		{DiskID: "disk-first000", Dev: "253:16", Seq: "9"}, {DiskID: "disk-second00", Dev: "253:32", Seq: "10"},
	}}
	at := func(dev string) string { return filepath.Join(d.sys, "dev", "block", dev) }
	plug := func(dev, seq string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(at(dev), 0o755), os.WriteFile(filepath.Join(at(dev), "diskseq"), []byte(seq+"\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	see := func(want string) {
		t.Helper()
		if got := d.lost(t.Context(), was); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	plug("9:128", "21")
	plug("253:16", "9")
	plug("253:32", "10")
	see("")
	if err := os.RemoveAll(at("253:32")); err != nil {
		t.Fatal(err)
	}
	see("of disk-second00 its block device 253:32 is not in /sys/dev/block any more")
	plug("253:32", "12")
	see("of disk-second00 its device number 253:32 is another device's now (diskseq 12, it was 10)")
	plug("253:32", "10")
	// Somebody has stopped the array, which is mounted no more: its disks are there.
	if err := os.RemoveAll(at("9:128")); err != nil {
		t.Fatal(err)
	}
	see("")
}

// TestSerialsThatWereNotTold do not stand between two that were.
func TestSerialsThatWereNotTold(t *testing.T) {
	var d tended
	d.mounted("disk-abc12345")
	for _, s := range []string{"disk-other000", "", "disk-other000"} {
		d.found(&probeResult{Serial: s})
	}
	if got := another(serving{DiskID: "disk-abc12345"}, d.serials()); got == "" {
		t.Errorf("told %q", d.serials())
	}
	if d.mounted("disk-abc12345"); len(d.serials()) > 0 {
		t.Errorf("a new mount is judged by what the last one told: %q", d.serials())
	}
	if now := time.Now(); d.due(now) || !d.due(now.Add(tendEvery)) {
		t.Error("a mount that was just verified is probed at once, or never")
	}
}
