package eni

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/tencent"
)

// twoPods is one ENI with two addresses, and the pods that have them.
func twoPods(now time.Time) state {
	s := newState()
	s.Slots[0] = Slot{
		ENI: "eni-pods0001", MAC: "52:54:00:00:00:02", Subnet: netip.MustParsePrefix("10.0.16.0/20"),
		Addrs: []netip.Addr{netip.MustParseAddr("10.0.16.5"), netip.MustParseAddr("10.0.16.6")},
	}
	for i, name := range []string{"a", "b"} {
		p := Pod{
			Attachment: cni.Attachment{ContainerID: name, IfName: "eth0"}, Namespace: "default", Name: name,
			Addr: s.Slots[0].Addrs[i], ENI: "eni-pods0001", Since: now.Add(time.Duration(i-9) * time.Minute),
		}
		s.Pods[p.Attachment] = p
	}
	return s
}

func TestDescribe(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	s := twoPods(now)
	a, b := cni.Attachment{ContainerID: "a", IfName: "eth0"}, cni.Attachment{ContainerID: "b", IfName: "eth0"}
	seen := []tencent.ENI{{ID: "eni-pods0001", SubnetID: "subnet-pods0001", SecurityGroups: []string{"sg-1"}}}
	eth1 := map[string]device{"52:54:00:00:00:02": {name: "eth1"}}
	for _, c := range []struct {
		name string
		sc   scene
		want string // states of a and b
	}{
		{"wired", scene{devices: eth1, wired: map[cni.Attachment]bool{a: true, b: true}}, "wired wired"},
		{"just added", scene{devices: eth1, wired: map[cni.Attachment]bool{a: true}}, "wired wired"},
		{"link deleted", scene{devices: eth1, wired: map[cni.Attachment]bool{a: true, b: false}, alive: map[cni.Attachment]bool{b: true}}, "wired no veth"},
		{"died", scene{devices: eth1, wired: map[cni.Attachment]bool{a: false, b: true}}, "dead wired"},
	} {
		st := describe(s, c.sc, map[int]int{0: 1500}, seen, now)
		if got := st.Pods[0].State + " " + st.Pods[1].State; got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		e := st.ENIs[0]
		if e.Device != "eth1" || !e.Ready || e.SubnetID != "subnet-pods0001" || len(e.SecurityGroups) != 1 {
			t.Errorf("%s: ENI is %+v", c.name, e)
		}
	}
	slot := s.Slots[0]
	slot.Addrs = slot.Addrs[1:]
	s.Slots[0] = slot
	st := describe(s, scene{}, nil, nil, now)
	if st.Pods[0].State != "address gone" || st.ENIs[0].Ready || st.ENIs[0].Device != "" || st.Exhausted != "" {
		t.Errorf("an address was taken away, and nothing is ready: %+v", st)
	}
}

func TestExhausted(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	ready := map[int]int{0: 1500}
	s := twoPods(now)
	c := s.exhausted(ready, false, now)
	if c == nil || !strings.Contains(c.Message, "2 of 2 addresses in use") || !c.Since.Equal(now.Add(-8*time.Minute)) {
		t.Fatalf("all in use: %+v", c)
	}
	if c := s.exhausted(nil, false, now); c != nil {
		t.Errorf("no ENI is ready, which NetworkReady says: %+v", c)
	}
	b := cni.Attachment{ContainerID: "b", IfName: "eth0"}
	s.apply(record{Rest: &rest{Attachment: b, Addr: s.Pods[b].Addr, Until: now.Add(coolDown)}})
	if c := s.exhausted(ready, false, now); c == nil || !strings.Contains(c.Message, "1 resting until 2026-01-02T03:06:15Z") {
		t.Errorf("one rests: %+v", c)
	}
	if c := s.exhausted(ready, false, now.Add(coolDown)); c != nil {
		t.Errorf("one has rested: %+v", c)
	}
}

// TestExhaustedOfOneFamily holds that a pod that needs both has none while one lacks.
func TestExhaustedOfOneFamily(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	s := twoPods(now)
	slot := s.Slots[0]
	slot.Addrs = append(slot.Addrs, netip.MustParseAddr("10.0.16.7"))
	s.Slots[0] = slot
	if c := s.exhausted(map[int]int{0: 1500}, true, now); c == nil || !strings.Contains(c.Message, "IPv4: 2 of 3 addresses in use; IPv6: no ENI that is ready has an address for pods") {
		t.Errorf("without an address of IPv6: %+v", c)
	}
	slot.Addrs6 = addrsOf("2402:4e00::5")
	s.Slots[0] = slot
	if c := s.exhausted(map[int]int{0: 1500}, true, now); c != nil {
		t.Errorf("there is one of both: %+v", c)
	}
}

func addrsOf(all ...string) (out []netip.Addr) {
	for _, a := range all {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}
