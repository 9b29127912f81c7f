package disk

import (
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
