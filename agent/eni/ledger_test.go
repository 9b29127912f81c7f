package eni

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
)

func openLedger(t *testing.T, dir, boot string) *ledger {
	t.Helper()
	l := newLedger(dir, slog.New(slog.DiscardHandler))
	if err := l.openIn(boot); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close() })
	return l
}

var testSlot = Slot{
	Number: 0, ENI: "eni-a", MAC: "52:54:00:00:00:02", Subnet: netip.MustParsePrefix("10.0.16.0/20"),
	Primary: netip.MustParseAddr("10.0.16.4"), Addrs: []netip.Addr{netip.MustParseAddr("10.0.16.5"), netip.MustParseAddr("10.0.16.6")},
}

func keyOf(container string) cni.Attachment {
	return cni.Attachment{ContainerID: container, IfName: "eth0"}
}

func (l *ledger) mustAllocate(t *testing.T, container string, now time.Time) netip.Addr {
	t.Helper()
	rested, _ := l.unclean(now)
	l.cleaned(rested)
	p, _, err := l.allocate(Pod{Attachment: keyOf(container)}, map[int]int{0: 1500}, now)
	if err != nil {
		t.Fatal(err)
	}
	return p.Addr
}

func TestLedgerAllocates(t *testing.T) {
	dir, now := t.TempDir(), time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	l := openLedger(t, dir, "boot-1")
	if err := l.begin("ins-00000001"); err != nil {
		t.Fatal(err)
	}
	if err := l.record(record{Slot: &testSlot}); err != nil {
		t.Fatal(err)
	}
	a, b := l.mustAllocate(t, "a", now), l.mustAllocate(t, "b", now)
	if a != testSlot.Addrs[0] || b != testSlot.Addrs[1] {
		t.Fatalf("allocated %s and %s", a, b)
	}
	if again := l.mustAllocate(t, "a", now); again != a {
		t.Errorf("a repeated allocation is %s, was %s", again, a)
	}
	p, short, err := l.allocate(Pod{Attachment: keyOf("c")}, map[int]int{0: 1500}, now)
	if err != nil || p.Addr.IsValid() || short.String() != "2 of 2 addresses in use" {
		t.Errorf("third of two: %s, %s, %v", p.Addr, short, err)
	}
	if _, short, _ := l.allocate(Pod{Attachment: keyOf("c")}, nil, now); short.String() != "no ENI is ready" {
		t.Errorf("without a slot: %s", short)
	}

	// The address rests, also across a restart of the agent.
	if err := l.release(keyOf("b"), now); err != nil {
		t.Fatal(err)
	}
	l.close()
	l = openLedger(t, dir, "boot-1")
	if _, short, _ := l.allocate(Pod{Attachment: keyOf("c")}, map[int]int{0: 1500}, now.Add(120*time.Second)); short.String() !=
		"1 of 2 addresses in use, 1 resting until 2026-11-23T12:02:10Z at the earliest" {
		t.Errorf("after a release: %s", short)
	}
	if addrs, next := l.unclean(now.Add(120 * time.Second)); len(addrs) != 0 || !next.Equal(now.Add(coolDown)) {
		t.Errorf("to be made ready: %s, next at %s", addrs, next)
	}
	if p, short, err := l.allocate(Pod{Attachment: keyOf("c")}, map[int]int{0: 1500}, now.Add(coolDown)); err != nil || p.Addr.IsValid() ||
		short.String() != "1 of 2 addresses in use, 1 being made ready" {
		t.Errorf("before its connections are forgotten: %s, %s, %v", p.Addr, short, err)
	}
	if addrs, next := l.unclean(now.Add(coolDown)); !slices.Equal(addrs, []netip.Addr{b}) || !next.IsZero() {
		t.Errorf("to be made ready after the rest: %s, next at %s", addrs, next)
	}
	if c := l.mustAllocate(t, "c", now.Add(coolDown)); c != b {
		t.Errorf("after the rest: %s", c)
	}
	if p, ok, err := l.pod(keyOf("a")); err != nil || !ok || p.Addr != a || p.MTU != 1500 || p.ENI != "eni-a" {
		t.Errorf("pod %+v, %v, %v", p, ok, err)
	}
	if err := l.release(keyOf("nobody"), now); err != nil {
		t.Error(err)
	}
}

// TestLedgerPairs holds that a pod that asks for both families gets them of one ENI, or
// nothing and is told what is lacking; and that both of its addresses rest, and come
// back with the ledger.
func TestLedgerPairs(t *testing.T) {
	dir, now := t.TempDir(), time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	l := openLedger(t, dir, "boot-1")
	first, second := testSlot, testSlot
	first.Addrs6 = addrsOf("2402:4e00::5")
	second.Number, second.ENI, second.Addrs, second.Addrs6 = 1, "eni-b", addrsOf("10.0.16.15"), addrsOf("2402:4e00::15", "2402:4e00::16")
	for _, slot := range []Slot{first, second} {
		if err := l.record(record{Slot: &slot}); err != nil {
			t.Fatal(err)
		}
	}
	ready := map[int]int{0: 1500, 1: 1500}
	ask := func(container string) Pod { return Pod{Attachment: keyOf(container), Addr6: wantsIPv6} }
	for _, want := range []string{"10.0.16.5,2402:4e00::5", "10.0.16.15,2402:4e00::15"} {
		p, short, err := l.allocate(ask("c"+want), ready, now)
		if err != nil || p.texts() != want || p.Slot != 0 && p.ENI != "eni-b" {
			t.Fatalf("allocated %+v, %s, %v; want %s", p, short, err, want)
		}
	}
	const lacking = "IPv4: 2 of 3 addresses in use; IPv6: 2 of 3 addresses in use"
	p, short, err := l.allocate(ask("third"), ready, now)
	if err != nil || p.Addr.IsValid() || p.Addr6.IsValid() || short.free() != 0 || short.String() != lacking {
		t.Errorf("an address of each of two ENIs: %+v, %s, %v", p, short, err)
	}
	if p, _, err := l.allocate(Pod{Attachment: keyOf("four")}, ready, now); err != nil || p.texts() != "10.0.16.6" {
		t.Errorf("a pod that asks for IPv4 only: %+v, %v", p, err)
	}
	if again, _, err := l.allocate(ask("four"), ready, now); err != nil || again.texts() != "10.0.16.6" {
		t.Errorf("a pod that has none of IPv6 keeps that: %+v, %v", again, err)
	}
	if err := l.release(keyOf("c10.0.16.15,2402:4e00::15"), now); err != nil {
		t.Fatal(err)
	}
	l.close()
	l = openLedger(t, dir, "boot-1")
	s, err := l.state()
	if p := s.Pods[keyOf("c10.0.16.5,2402:4e00::5")]; err != nil || p.texts() != "10.0.16.5,2402:4e00::5" {
		t.Errorf("read back %+v, %v", p, err)
	}
	for _, a := range addrsOf("10.0.16.15", "2402:4e00::15") {
		if !s.Rested[a].Equal(now.Add(coolDown)) {
			t.Errorf("%s rests until %s", a, s.Rested[a])
		}
	}
	if err := l.withdraw(second, addrsOf("2402:4e00::15"), now); err == nil || !strings.Contains(err.Error(), "it rests until") {
		t.Errorf("given back while it rests: %v", err)
	}
	if err := l.withdraw(first, addrsOf("2402:4e00::5"), now); err == nil || !strings.Contains(err.Error(), "has got it") {
		t.Errorf("given back under a pod: %v", err)
	}
	l.close()
	if s, err := openLedger(t, dir, "boot-2").state(); err != nil || len(s.Pods) != 0 || !s.Rested[netip.MustParseAddr("2402:4e00::5")].After(time.Now()) {
		t.Errorf("after a reboot: %+v, %v", s, err)
	}
}

// TestLedgerPrefersTheLongestRested holds that addresses are used in turn.
func TestLedgerPrefersTheLongestRested(t *testing.T) {
	l, now := openLedger(t, t.TempDir(), "boot"), time.Now()
	l.record(record{Slot: &testSlot})
	for i := range 6 {
		want := testSlot.Addrs[i%2]
		if got := l.mustAllocate(t, "a", now); got != want {
			t.Fatalf("round %d: %s, want %s", i, got, want)
		}
		l.release(keyOf("a"), now)
		now = now.Add(coolDown + time.Second)
	}
}

func TestLedgerAfterReboot(t *testing.T) {
	dir := t.TempDir()
	l := openLedger(t, dir, "boot-1")
	l.begin("ins-00000001")
	l.record(record{Slot: &testSlot})
	addr := l.mustAllocate(t, "a", time.Now())
	l.close()
	l = openLedger(t, dir, "boot-2")
	s, err := l.state()
	if err != nil || len(s.Pods) != 0 || s.Slots[0].ENI != "eni-a" || s.Instance != "ins-00000001" {
		t.Fatalf("after a reboot: %+v, %v", s, err)
	}
	if !s.Rested[addr].After(time.Now()) {
		t.Errorf("%s does not rest", addr)
	}
}

func TestLedgerOfAnotherInstance(t *testing.T) {
	l := openLedger(t, t.TempDir(), "boot")
	l.begin("ins-00000001")
	l.record(record{Slot: &testSlot})
	l.mustAllocate(t, "a", time.Now())
	l.begin("ins-00000002")
	if s, _ := l.state(); len(s.Pods)+len(s.Slots) != 0 || s.Instance != "ins-00000002" || s.Boot != "boot" {
		t.Errorf("state %+v", s)
	}
	l.record(record{Slot: &testSlot})
	if addr := l.mustAllocate(t, "b", time.Now()); addr != testSlot.Addrs[0] {
		t.Errorf("allocated %s", addr)
	}
}

func TestLedgerIsOpenedOnce(t *testing.T) {
	dir := t.TempDir()
	openLedger(t, dir, "boot")
	err := newLedger(dir, slog.New(slog.DiscardHandler)).openIn("boot")
	if err == nil || !strings.Contains(err.Error(), "is another agent running?") {
		t.Errorf("second opening: %v", err)
	}
}

// TestLedgerIsRewritten fills the journal beyond its bound.
func TestLedgerIsRewritten(t *testing.T) {
	dir := t.TempDir()
	l := openLedger(t, dir, "boot")
	l.record(record{Slot: &testSlot})
	now := time.Now()
	for range 4000 {
		l.mustAllocate(t, "a", now)
		if err := l.release(keyOf("a"), now); err != nil {
			t.Fatal(err)
		}
		now = now.Add(2 * coolDown)
	}
	before, _ := l.state()
	l.close()
	fi, err := os.Stat(filepath.Join(dir, "ledger"))
	if err != nil || fi.Size() > maxJournal+maxRecord {
		t.Errorf("%d bytes, %v", fi.Size(), err)
	}
	if after, _ := openLedger(t, dir, "boot").state(); !reflect.DeepEqual(before.Slots, after.Slots) || !reflect.DeepEqual(before.Rested, after.Rested) {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
}

func journalText(t testing.TB) []byte {
	var b bytes.Buffer
	for _, r := range []record{
		{Begin: &begin{Instance: "ins-00000001", Boot: "boot"}}, {Slot: &testSlot},
		{Pod: &Pod{Attachment: keyOf("a"), Addr: testSlot.Addrs[0], Addr6: netip.MustParseAddr("2402:4e00::5")}},
		{Rest: &rest{Attachment: keyOf("a"), Addr: testSlot.Addrs[0], Addr6: netip.MustParseAddr("2402:4e00::5"), Until: time.Unix(1e9, 0)}},
	} {
		line, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		b.Write(line)
	}
	return b.Bytes()
}

// TestJournalDamage cuts the journal at every byte, which loses at most the last
// record, and flips every bit, which is always noticed.
func TestJournalDamage(t *testing.T) {
	whole := journalText(t)
	all, n, err := readJournal(bytes.NewReader(whole))
	if err != nil || len(all) != 4 || n != int64(len(whole)) {
		t.Fatalf("%d records, %d bytes, %v", len(all), n, err)
	}
	for i := range whole {
		got, n, err := readJournal(bytes.NewReader(whole[:i]))
		if lines := bytes.Count(whole[:i], []byte{'\n'}); err != nil || len(got) != lines || int(n) != bytes.LastIndexByte(whole[:i], '\n')+1 {
			t.Fatalf("cut at %d: %d records, %d bytes, %v; want %d", i, len(got), n, err, lines)
		}
		for bit := range 8 {
			flipped := bytes.Clone(whole)
			flipped[i] ^= 1 << bit
			got, _, err := readJournal(bytes.NewReader(flipped))
			// The last newline, flipped, makes the last line an unfinished one.
			if err == nil && !(i == len(whole)-1 && len(got) == 3) {
				t.Fatalf("bit %d of byte %d flipped: no error", bit, i)
			}
		}
	}
}

func TestLedgerRefusesDamage(t *testing.T) {
	dir := t.TempDir()
	text := journalText(t)
	text[20] ^= 1
	if err := os.WriteFile(filepath.Join(dir, "ledger"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	err := newLedger(dir, slog.New(slog.DiscardHandler)).openIn("boot")
	if node.ClassOf(err) != node.ClassTerminal || node.ReasonOf(err, "") != "LedgerDamaged" || !strings.Contains(err.Error(), "line 1") {
		t.Errorf("opened damage: %v", err)
	}
}

func FuzzJournal(f *testing.F) {
	f.Add(journalText(f))
	f.Add([]byte("00000000 {}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		all, n, err := readJournal(bytes.NewReader(b))
		if err != nil {
			return
		}
		if n > int64(len(b)) || bytes.Count(b[:n], []byte{'\n'}) != len(all) {
			t.Errorf("%d records in %d bytes", len(all), n)
		}
		s := newState()
		for _, r := range all {
			s.apply(r)
		}
	})
}
