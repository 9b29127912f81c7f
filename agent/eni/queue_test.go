package eni

import (
	"testing"
	"time"
)

// TestLost holds that a pod is judged lost only if the runtime, answering, has not
// known it at any look for long enough.
func TestLost(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	pods := twoPods(start).pods() // a and b, 9 and 8 min old
	both, onlyA, none := map[string]bool{"a": true, "b": true}, map[string]bool{"a": true}, map[string]bool{}
	l := lost{}
	for _, step := range []struct {
		name  string
		after time.Duration
		known map[string]bool
		want  int
	}{
		{"both known", 0, both, 0},
		{"b missing", time.Minute, onlyA, 0},
		{"not for long enough", 5 * time.Minute, onlyA, 0},
		{"b is back", 5*time.Minute + time.Second, both, 0},
		{"missing again", 7 * time.Minute, onlyA, 0},
		{"a runtime without any store", 10 * time.Minute, none, 0},
		{"what was missed before it counts no more", 12 * time.Minute, onlyA, 0},
		{"long enough", 17 * time.Minute, onlyA, 1},
	} {
		got := l.judge(pods, step.known, start.Add(step.after))
		if len(got) != step.want || step.want == 1 && got[0].Name != "b" {
			t.Errorf("%s: %v lost, want %d", step.name, got, step.want)
		}
	}
	if l.judge(pods[:1], onlyA, start.Add(18*time.Minute)); len(l) != 0 {
		t.Errorf("it remembers pods that have ended: %v", l)
	}
	young := pods[1]
	young.Since = start.Add(16 * time.Minute)
	l = lost{young.Attachment: start}
	if got := l.judge([]Pod{young}, onlyA, start.Add(17*time.Minute)); len(got) != 0 {
		t.Errorf("a pod that was just added is lost: %v", got)
	}
}
