package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestStepFitsTheTerminal(t *testing.T) {
	s := &step{name: strings.Repeat("a long name ", 4), began: time.Now(), fraction: 0.5, note: strings.Repeat("note ", 40)}
	for _, width := range []int{1, 39, 79, 120} {
		if got := text(s, time.Now(), width); utf8.RuneCountInString(got) > width || strings.Contains(got, "\n") {
			t.Errorf("width %d: %q", width, got)
		}
	}
}

// Two steps run beside each other: each has a line, and both are removed before
// anything else is written.
func TestStepsBesideEachOther(t *testing.T) {
	var out bytes.Buffer
	p := &progress{w: &out, tty: true, size: func() int { return 80 }}
	p.Begin("one")
	p.Begin("two")
	if !strings.Contains(out.String(), "one") || !strings.Contains(out.String(), "\n  two") {
		t.Errorf("%q", out.String())
	}
	out.Reset()
	p.End("one", nil)
	if got := out.String(); !strings.HasPrefix(got, "\r\x1b[K\x1b[A\x1b[K") || strings.Count(got, "two") != 1 {
		t.Errorf("%q", got)
	}
}

func TestStartIsSaidAtOnceWithoutATerminal(t *testing.T) {
	var out bytes.Buffer
	p := &progress{w: &out}
	p.Begin("one")
	if got := out.String(); !strings.Contains(got, "one") || !strings.HasSuffix(got, "\n") {
		t.Errorf("%q", got)
	}
}
