package disk

import (
	"context"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"syscall"
	"testing"
)

// fault is what one read of a disk does instead of reading.
type fault struct {
	name string
	read func(r io.ReaderAt, b []byte, at int64) (int, error)
}

var faults = []fault{
	{"EIO", func(io.ReaderAt, []byte, int64) (int, error) { return 0, syscall.EIO }},
	{"short", func(r io.ReaderAt, b []byte, at int64) (int, error) { return r.ReadAt(b[:len(b)/2], at) }},
	{"garbage", func(_ io.ReaderAt, b []byte, _ int64) (int, error) {
		for i := 0; i < len(b); i += 64 { // a byte of each 64
			b[i] = byte(rand.Uint32()) | 1
		}
		return len(b), nil
	}},
	{"timeout", func(io.ReaderAt, []byte, int64) (int, error) { return 0, context.DeadlineExceeded }},
}

// faulty is a disk of which one read fails.
type faulty struct {
	io.ReaderAt
	reads atomic.Int64
	fail  int64 // number of the read, from 1; 0: none
	how   fault
}

func (f *faulty) ReadAt(b []byte, at int64) (int, error) {
	if f.reads.Add(1) == f.fail {
		return f.how.read(f.ReaderAt, b, at)
	}
	return f.ReaderAt.ReadAt(b, at)
}

// permitted reads a disk as it is read before it is formatted without the cloud's
// word: the plan's look, then the ends, superblocks and sample, then all of it.
func permitted(r io.ReaderAt, size int64) bool {
	return glance(r, size).Blank && inspect(r, size).Blank && readAll(r, size).Blank
}

// sweepFaults makes reads of the disk fail, one at a time and in every way, and
// returns how many of them there are, and how often it would have been formatted.
// Of the reads after the first 4 it takes one in stride.
func sweepFaults(s *sparse, stride int64) (clean bool, reads, tries, permits int64) {
	sound := &faulty{ReaderAt: s}
	clean = permitted(sound, s.size)
	reads = sound.reads.Load()
	for n := int64(1); n <= reads; n++ {
		if n > 4 && n%stride != 0 {
			continue
		}
		for _, how := range faults {
			tries++
			if permitted(&faulty{ReaderAt: s, fail: n, how: how}, s.size) {
				permits++
			}
		}
	}
	return clean, reads, tries, permits
}

// TestFaults is the fixed part of the sweep: contents that need no further tools,
// and of many reads some.
func TestFaults(t *testing.T) {
	dir := t.TempDir()
	for _, c := range basicContents() {
		clean, reads, tries, permits := sweepFaults(load(t, c.make(t, dir)), 150)
		if clean != (c.name == "blank") || permits > 0 || tries == 0 {
			t.Errorf("%s: formatted without a fault: %v; of %d reads %d faults: %d permits", c.name, clean, reads, tries, permits)
		}
	}
}
