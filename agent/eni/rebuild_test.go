package eni

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
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
	six := p
	six.Addr6 = netip.MustParseAddr("2402:4e00:0:16::5")
	if got, ok := podOf(name, alias(six)); !ok || got != six {
		t.Errorf("of both families: read back %+v, %v; want %+v", got, ok, six)
	}
	if got, ok := podOf(name, strings.Replace(alias(six), "::5", "::x", 1)); ok {
		t.Errorf("of a damaged address: %+v", got)
	}
	long := p
	long.Name = strings.Repeat("x", 253)
	if got, ok := podOf(name, alias(long)); !ok || got.Addr != p.Addr || got.Attachment != p.Attachment || alias(got) != alias(long) {
		t.Errorf("of a long name: %+v, %v", got, ok)
	}
	for _, text := range []string{
		"", "tkenode", strings.Replace(alias(p), "web", "other", 1), strings.Replace(alias(p), "10.0.16.5", "10.0.16", 1),
		strings.Replace(alias(p), " 3 ", " 16 ", 1), strings.Replace(alias(p), " 3 ", " -1 ", 1), strings.Replace(alias(p), " 3 ", " 99 ", 1), strings.Replace(alias(p), " 3 ", " 200 ", 1), strings.TrimPrefix(alias(p), aliasPrefix),
	} {
		if got, ok := podOf(name, text); ok {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

// TestPodOfWholeENI: a pod that has its ENI whole is known by its link, and what it
// has to know of the ENI once the cloud has said which that is.
func TestPodOfWholeENI(t *testing.T) {
	p := testPod("web", "10.0.16.23")
	p.Slot = exclusiveSlot
	name, _, _ := vethOf(p.Attachment)
	got, ok := podOf(name, alias(p))
	if !ok || got != p || !got.exclusive() {
		t.Fatalf("read back %+v, %v; want %+v", got, ok, p)
	}
	s := newState()
	s.Pods[got.Attachment] = got
	s.apply(record{Slot: &Slot{Number: exclusiveSlot, ENI: "eni-3", MAC: "52:54:00:00:00:03", Subnet: netip.MustParsePrefix("10.0.16.0/20")}})
	if got = s.Pods[p.Attachment]; got.ENI != "eni-3" || got.MAC != "52:54:00:00:00:03" || got.Gateway.String() != "10.0.16.1" {
		t.Errorf("%+v", got)
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
	resting, rested := knows(a), knows(a)
	resting.Rested[b.Addr] = now.Add(time.Minute)
	rested.Rested[b.Addr] = now.Add(-time.Hour)
	before := testPod("before", b.Addr.String())
	double := b
	double.Addr = a.Addr
	six, doubleSix := a, b
	six.Addr6 = netip.MustParseAddr("2402:4e00:0:16::5")
	doubleSix.Addr6 = six.Addr6
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
		{"record lost of an address that had rested", rested, witness{instance: "ins-1", pods: []Pod{a, b}, configured: true}, nil, "default/b", 2},
		{"DEL lost, and the record of the next pod", knows(a, before), witness{instance: "ins-1", pods: []Pod{a, b}, configured: true}, nil, "default/b", 2},
		{"record lost", knows(a), witness{pods: []Pod{a, b}, configured: true}, nil, "default/b", 2},
		{"missing", newState(), witness{instance: "ins-1", pods: []Pod{a, b}, configured: true}, nil, "2 pods", 2},
		{"missing, without pods", newState(), witness{instance: "ins-1", configured: true}, nil, "missing", 0},
		{"damaged", newState(), witness{instance: "ins-1", pods: []Pod{a}}, errors.New("line 1"), "line 1", 1},
		{"one IPv6 address twice", newState(), witness{instance: "ins-1", pods: []Pod{six, doubleSix}}, nil, "2 pods", 0},
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

// TestSlotsAfterRebuild holds that an ENI comes back into the slot that its pods
// name, whatever the order in which the cloud shows it, and that no other ENI does.
func TestSlotsAfterRebuild(t *testing.T) {
	s := newState()
	for i, a := range []string{"10.0.16.5", "10.0.16.25"} {
		p := testPod(fmt.Sprint("p", i), a)
		p.Slot = i
		s.Pods[p.Attachment] = p
	}
	eni := func(id string, addrs ...string) tencent.ENI {
		e := tencent.ENI{ID: id, Attachment: &tencent.Attachment{InstanceID: "ins-1"}}
		for _, a := range addrs {
			e.IPs = append(e.IPs, tencent.IP{Addr: netip.MustParseAddr(a)})
		}
		return e
	}
	want := poolWant{facts: node.Facts{InstanceID: "ins-1"}, network: node.NetworkConfig{Allocator: node.AllocatorObserve}}
	view := cloudView{enis: []tencent.ENI{eni("eni-new", "10.0.16.30"), eni("eni-1", "10.0.16.24", "10.0.16.25"), eni("eni-0", "10.0.16.4", "10.0.16.5")}}
	in, _ := view.claim(want, s)
	if len(in) != 3 || in[0].ID != "eni-0" || in[1].ID != "eni-1" || in[2].ID != "eni-new" {
		t.Errorf("ENIs by slot: %+v", in)
	}
	if b := (&balance{state: s}); b.emptySlot() != 0 || b.slots[0].slot.Number != 2 {
		t.Errorf("a new ENI would go into the slot of another: %+v", b.slots)
	}
	s.apply(record{Slot: &Slot{Number: 0, ENI: "eni-0", MAC: "52:54:00:00:00:02"}})
	if p, ok := s.homeless(); !ok || p.Slot != 1 || s.awaits(0) || !s.awaits(1) {
		t.Errorf("homeless once slot 0 is known: %v, %v", p, ok)
	}
}
