package eni

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func testPod(name, addr string) Pod {
	return Pod{Attachment: keyOf(name), Namespace: "default", Name: name, Addr: netip.MustParseAddr(addr), Slot: 3}
}

func TestPodOfLink(t *testing.T) {
	p := testPod("web", "10.0.16.5")
	name, _, _ := vethOf(p.Attachment)
	got, ok := podOf(name, alias(p))
	if !ok || got != p {
		t.Errorf("read back %+v, %v; want %+v", got, ok, p)
	}
	long := p
	long.Name = strings.Repeat("x", 253)
	if got, ok := podOf(name, alias(long)); !ok || got.Addr != p.Addr || got.Attachment != p.Attachment || alias(got) != alias(long) {
		t.Errorf("of a long name: %+v, %v", got, ok)
	}
	for _, text := range []string{
		"", "tkenode", strings.Replace(alias(p), "web", "other", 1), strings.Replace(alias(p), "10.0.16.5", "10.0.16", 1),
		strings.Replace(alias(p), " 3 ", " 16 ", 1), strings.Replace(alias(p), " 3 ", " -1 ", 1), strings.TrimPrefix(alias(p), aliasPrefix),
	} {
		if got, ok := podOf(name, text); ok {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

func TestLedgerIsCompleted(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	a, b := testPod("a", "10.0.16.5"), testPod("b", "10.0.16.6")
	knows := func(pods ...Pod) state {
		s := newState()
		s.Instance = "ins-1"
		for _, p := range pods {
			s.Pods[p.Attachment] = p
		}
		return s
	}
	resting := knows(a)
	resting.Rested[b.Addr] = now.Add(-time.Hour)
	double := b
	double.Addr = a.Addr
	for _, c := range []struct {
		name    string
		s       state
		w       witness
		damaged error
		why     string // in the error; empty: none
		pods    int
	}{
		{"whole", knows(a, b), witness{pods: []Pod{a, b}, configured: true}, nil, "", 2},
		{"new node", newState(), witness{}, nil, "", 0},
		{"link still to go", resting, witness{pods: []Pod{a, b}, configured: true}, nil, "", 1},
		{"record lost", knows(a), witness{pods: []Pod{a, b}, configured: true}, nil, "default/b", 2},
		{"missing", newState(), witness{instance: "ins-1", pods: []Pod{a, b}, configured: true}, nil, "2 pods", 2},
		{"missing, without pods", newState(), witness{instance: "ins-1", configured: true}, nil, "missing", 0},
		{"damaged", newState(), witness{instance: "ins-1", pods: []Pod{a}}, errors.New("line 1"), "line 1", 1},
		{"one address twice", newState(), witness{instance: "ins-1", pods: []Pod{a, double}}, nil, "2 pods", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.s.complete(c.w, c.damaged, now)
			if (err != nil) != (c.why != "") || err != nil && !strings.Contains(err.Error(), c.why) {
				t.Errorf("was wrong: %v, want %q", err, c.why)
			}
			if len(c.s.Pods) != c.pods {
				t.Errorf("pods %v, want %d", c.s.pods(), c.pods)
			}
			if rests := c.s.restsUntil(a.Addr).After(now); rests != (c.why != "") {
				t.Errorf("addresses rest: %v", rests)
			}
			if c.why != "" && c.s.Instance != "ins-1" {
				t.Errorf("instance %q", c.s.Instance)
			}
		})
	}
}
