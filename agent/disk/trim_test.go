package disk

import (
	"fmt"
	"testing"
	"time"
)

// TestNextTrim: whenever the agent starts, a disk is trimmed at its time of the week.
func TestNextTrim(t *testing.T) {
	week := time.Unix(0, 0).UTC().Add(3000 * trimPeriod).Truncate(trimPeriod)
	const hour, day = time.Hour, 24 * time.Hour
	offset := 2*day + 5*hour
	slot := week.Add(offset)
	for name, c := range map[string]struct{ last, started, want time.Time }{
		"on time":                   {slot.Add(-trimPeriod), slot.Add(-10 * trimPeriod), slot},
		"a restart shifts nothing":  {slot.Add(-trimPeriod), slot.Add(-hour), slot},
		"formatted a day before":    {slot.Add(-day), slot.Add(-day), slot.Add(trimPeriod)},
		"formatted five days ago":   {slot.Add(-5 * day), slot.Add(-5 * day), slot},
		"off when it was":           {slot.Add(-trimPeriod), slot.Add(3 * day), slot.Add(3 * day).Add(offset / 28)},
		"off for long":              {slot.Add(-20 * trimPeriod), slot.Add(hour), slot.Add(hour).Add(offset / 28)},
		"late, and then its slot":   {slot.Add(3*day + hour), slot.Add(3 * day), slot.Add(trimPeriod)},
		"very late, the next is on": {slot.Add(5 * day), slot.Add(5 * day), slot.Add(2 * trimPeriod)},
	} {
		if got := nextTrim(c.last, c.started, offset); !got.Equal(c.want) {
			t.Errorf("%s: %s after its slot, want %s", name, got.Sub(slot), c.want.Sub(slot))
		}
	}
}

// TestFleetDoesNotTrimAtOnce counts how many of 10,000 instances trim in the same
// quarter of an hour, in the week and after a start of all of them.
func TestFleetDoesNotTrimAtOnce(t *testing.T) {
	const fleet = 10_000
	weekly, late := map[int64]int{}, map[int64]int{}
	now := time.Unix(1_800_000_000, 0)
	for i := range fleet {
		offset := trimOffset(fmt.Sprintf("ins-%08x", i), "disk-abc12345")
		if offset < 0 || offset >= trimPeriod {
			t.Fatalf("offset %s", offset)
		}
		weekly[nextTrim(now, now, offset).Unix()/900]++
		late[nextTrim(now.Add(-2*trimPeriod), now, offset).Unix()/900]++
	}
	for name, c := range map[string]struct {
		counts map[int64]int
		most   int
	}{"weekly": {weekly, 50}, "all started now": {late, 700}} {
		for at, n := range c.counts {
			if n > c.most {
				t.Errorf("%s: %d of %d at %s", name, n, fleet, time.Unix(at*900, 0))
			}
		}
	}
	if a, b := trimOffset("ins-1", "disk-a"), trimOffset("ins-1", "disk-b"); a == b {
		t.Error("two disks of an instance are trimmed at once")
	}
}

func TestParseTrim(t *testing.T) {
	if n, err := parseTrim([]byte("/proc/self/fd/3: 19.5 GiB (20937965568 bytes) trimmed on /dev/vdb\n")); err != nil || n != 20937965568 {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := parseTrim([]byte("something else\n")); err == nil {
		t.Error("what is not understood was taken for a number")
	}
}
