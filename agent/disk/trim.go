package disk

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"
)

const (
	trimPeriod = 7 * 24 * time.Hour
	// trimSpread is within which time those disks are trimmed that were off when
	// their time was.
	trimSpread = 6 * time.Hour
	// trimDeadline is far above the minutes that a full disk of 32 TiB takes.
	trimDeadline = 2 * time.Hour
)

// Trim is the last time that a disk was told which of its blocks are in use no more.
type Trim struct {
	At    time.Time     `json:"at"`
	Took  time.Duration `json:"tookNanoseconds"`
	Bytes int64         `json:"bytes"`
	Error string        `json:"error,omitempty"`
}

// TrimState is how the trimming of a disk stands.
type TrimState struct {
	Never string    `json:"never,omitempty"` // why it is not done
	Last  Trim      `json:"last,omitzero"`   // zero: it was not done yet
	Since time.Time `json:"since,omitzero"`  // of one under way
	Next  time.Time `json:"next,omitzero"`
}

// trimOffset is when in each week a disk is trimmed: no two instances of a fleet
// do it at once, nor two disks of one.
func trimOffset(instance, disk string) time.Duration {
	h := fnv.New64a()
	fmt.Fprintf(h, "%s %s", instance, disk)
	return time.Duration(h.Sum64() % uint64(trimPeriod))
}

// nextTrim returns when a disk is to be trimmed that was trimmed last, or first
// seen, at last. Its times are the same in every week, whenever the agent started.
func nextTrim(last, started time.Time, offset time.Duration) time.Time {
	// A trim that comes late is not followed by one that is in time.
	after := last.Add(trimPeriod / 2)
	next := after.Truncate(trimPeriod).Add(offset)
	if !next.After(after) {
		next = next.Add(trimPeriod)
	}
	if next.Before(started) {
		return started.Add(offset / time.Duration(trimPeriod/trimSpread))
	}
	return next
}

// trimmed reads when a disk was trimmed last. What cannot be read was never written.
func (l ledger) trimmed(id string) Trim {
	var t Trim
	b, err := os.ReadFile(filepath.Join(string(l), id+".trim"))
	if err != nil || json.NewDecoder(bytes.NewReader(b)).Decode(&t) != nil {
		return Trim{}
	}
	return t
}

// trimmedBytes finds in what fstrim says how much it has trimmed.
// Source: util-linux sys-utils/fstrim.c: "/data: 19.5 GiB (20937965568 bytes) trimmed"
var trimmedBytes = regexp.MustCompile(`\((\d{1,18}) bytes\) trimmed`)

func parseTrim(out []byte) (int64, error) {
	m := trimmedBytes.FindSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("fstrim says %.200q", out)
	}
	return strconv.ParseInt(string(m[1]), 10, 64)
}

// base is since when a disk waits to be trimmed.
func (d *Disk) base(s State, started time.Time) time.Time {
	since := started
	if s.Ledger != nil {
		since = s.Ledger.At
	}
	t := d.ledger.trimmed(s.DiskID).At
	if now := time.Now(); t.After(now) || since.After(now) {
		return now // the clock was wrong then
	}
	if t.Before(since) {
		return since
	}
	return cmp.Or(t, since)
}

// discards reports whether the device can be told of blocks that are not in use.
func discards(sys, name string) (bool, error) {
	text, err := attribute(filepath.Join(sys, "block", name), "queue/discard_max_bytes")
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read %s: %w", name, err)
	}
	n, err := strconv.ParseUint(text, 10, 64)
	return n > 0, err
}
