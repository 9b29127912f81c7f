package eni

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

// wantsIPv6 is the Addr6 of a pod that asks for one.
var wantsIPv6 = netip.IPv6Unspecified()

// shortage says how many addresses there are, and when the first's rest ends.
type shortage struct {
	usable, used, resting int
	next                  time.Time
	pairs                 int       // a pod can get now, of both families
	six                   *shortage // of IPv6, where pods get it
}

// free is how many pods can get what they need now.
func (s shortage) free() int {
	if s.six != nil {
		return s.pairs
	}
	return s.usable - s.used - s.resting
}

func (s shortage) String() string {
	switch {
	case s.usable == 0:
		return "no ENI is ready"
	case s.six != nil:
		four, six := s, *s.six
		four.six = nil
		if six.usable == 0 {
			return fmt.Sprintf("IPv4: %s; IPv6: no ENI that is ready has an address for pods", four)
		}
		return fmt.Sprintf("IPv4: %s; IPv6: %s", four, six)
	case !s.next.IsZero():
		return fmt.Sprintf("%d of %d addresses in use, %d resting until %s at the earliest",
			s.used, s.usable, s.resting, s.next.UTC().Format(time.RFC3339))
	}
	text := fmt.Sprintf("%d of %d addresses in use", s.used, s.usable)
	if s.resting > 0 {
		text += fmt.Sprintf(", %d being made ready", s.resting)
	}
	return text
}

// until returns when the first address ends its rest that a pod may be waiting for.
func (s shortage) until() time.Time {
	if s.six == nil || s.six.next.IsZero() || !s.next.IsZero() && s.next.Before(s.six.next) {
		return s.next
	}
	return s.six.next
}

// candidate is an address that a pod can get, and since when it could have.
type candidate struct {
	addr  netip.Addr
	since time.Time
}

// candidates counts addresses, and returns of those that are free the one that has
// rested longest, and how many there are. An address that has rested is free once it
// is clean, or if that is not asked for: clean is nil.
func (s state) candidates(addrs []netip.Addr, used map[netip.Addr]cni.Attachment, clean map[netip.Addr]bool, now time.Time, short *shortage) (best candidate, free int) {
	for _, a := range addrs {
		short.usable++
		if _, ok := used[a]; ok {
			short.used++
			continue
		}
		until := s.restsUntil(a)
		if until.After(now) {
			if short.resting++; short.next.IsZero() || until.Before(short.next) {
				short.next = until
			}
			continue
		}
		if !until.IsZero() && clean != nil && !clean[a] {
			short.resting++ // the paths are about to clean it, which wakes
			continue
		}
		free++
		if c := (candidate{a, until}); c.before(best) {
			best = c
		}
	}
	return best, free
}

// before reports whether c is to be taken rather than o.
func (c candidate) before(o candidate) bool {
	return c.addr.IsValid() && (!o.addr.IsValid() || c.since.Before(o.since) || c.since.Equal(o.since) && c.addr.Less(o.addr))
}

// offer returns what a pod can get of a slot: an address and, where short counts those
// of IPv6, one of them, or nothing if either is lacking.
func (s state) offer(slot Slot, used map[netip.Addr]cni.Attachment, clean map[netip.Addr]bool, now time.Time, short *shortage) (four, six candidate) {
	four, free := s.candidates(slot.Addrs, used, clean, now, short)
	if short.six == nil {
		return four, candidate{}
	}
	six, free6 := s.candidates(slot.Addrs6, used, clean, now, short.six)
	pairs := min(free, free6)
	if short.pairs += pairs; pairs == 0 {
		return candidate{}, candidate{}
	}
	return four, six
}

// shortageOf begins to count, of both families if pods get both.
func shortageOf(dual bool) shortage {
	if dual {
		return shortage{six: &shortage{}}
	}
	return shortage{}
}

// allocate gives p an address of a slot that is ready, the one that has rested
// longest, and one of IPv6 of the same ENI if p asks for it; ready maps slots to the
// MTU of their ENI. A pod that has an address keeps it.
func (l *ledger) allocate(p Pod, ready map[int]int, now time.Time) (Pod, shortage, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(); err != nil {
		return Pod{}, shortage{}, err
	}
	if old, ok := l.now.Pods[p.Attachment]; ok {
		p.Addr, p.Addr6, p.Slot, p.ENI, p.MTU, p.Since = old.Addr, old.Addr6, old.Slot, old.ENI, old.MTU, old.Since
		if p == old {
			return old, shortage{}, nil
		}
		return p, shortage{}, l.put(record{Pod: &p})
	}
	dual := p.Addr6 == wantsIPv6
	short := shortageOf(dual)
	var best candidate
	for number, mtu := range ready {
		slot := l.now.Slots[number]
		four, six := l.now.offer(slot, l.used, l.clean, now, &short)
		if four.before(best) {
			p.Addr, p.Addr6, p.Slot, p.ENI, p.MTU, best = four.addr, six.addr, number, slot.ENI, mtu, four
		}
	}
	if !p.Addr.IsValid() {
		return Pod{}, short, nil
	}
	p.Since = now.UTC().Truncate(time.Millisecond)
	if err := l.put(record{Pod: &p}); err != nil {
		return Pod{}, short, err
	}
	short.used++
	if dual {
		short.six.used++
		short.pairs--
	}
	for _, a := range p.addrs() {
		l.used[a] = p.Attachment
	}
	return p, short, nil
}

// release ends an attachment; its addresses rest.
func (l *ledger) release(key cni.Attachment, now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(); err != nil {
		return err
	}
	p, ok := l.now.Pods[key]
	if !ok {
		return nil
	}
	until := now.Add(coolDown).UTC().Truncate(time.Second)
	if err := l.put(record{Rest: &rest{Attachment: key, Addr: p.Addr, Addr6: p.Addr6, Until: until}}); err != nil {
		return err
	}
	for _, a := range p.addrs() {
		delete(l.used, a)
		delete(l.clean, a)
	}
	return nil
}

// withdraw records a slot without addresses that it had, so that they can be
// given back. It refuses if a pod has got one since that was planned. They rest:
// should the cloud keep them, or show them once more, no pod gets them at once.
func (l *ledger) withdraw(slot Slot, addrs []netip.Addr, now time.Time) error {
	l.mu.Lock()
	err := l.withdrawLocked(slot, addrs, now)
	l.mu.Unlock()
	if err != nil {
		return err
	}
	return l.sync()
}

func (l *ledger) withdrawLocked(slot Slot, addrs []netip.Addr, now time.Time) error {
	if err := l.open(); err != nil {
		return err
	}
	for _, a := range addrs {
		if key, ok := l.used[a]; ok {
			return fmt.Errorf("give back %s: container %.12s has got it meanwhile", a, key.ContainerID)
		}
		if until := l.now.restsUntil(a); until.After(now) {
			return fmt.Errorf("give back %s: it rests until %s", a, until.UTC().Format(time.RFC3339))
		}
	}
	if err := l.put(record{Slot: &slot}); err != nil {
		return err
	}
	until := now.Add(coolDown).UTC().Truncate(time.Second)
	for _, a := range addrs {
		if err := l.put(record{Rest: &rest{Addr: a, Until: until}}); err != nil {
			return err
		}
		delete(l.clean, a)
	}
	return nil
}

// unclean returns the addresses that have rested while the kernel may remember
// connections of their last pod, and when the next address has rested.
func (l *ledger) unclean(now time.Time) (addrs []netip.Addr, next time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, slot := range l.now.Slots {
		for _, a := range slot.addrs() {
			until := l.now.restsUntil(a)
			_, used := l.used[a]
			switch {
			case until.IsZero() || used || l.clean[a]:
			case !until.After(now):
				addrs = append(addrs, a)
			case next.IsZero() || until.Before(next):
				next = until
			}
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	return addrs, next
}

// cleaned says that the kernel has forgotten connections of addresses. Whoever
// waits for an address is woken.
func (l *ledger) cleaned(addrs []netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range addrs {
		l.clean[a] = true
	}
	l.wake()
}
