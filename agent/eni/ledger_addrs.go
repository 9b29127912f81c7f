package eni

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

// shortage says how many addresses there are, and when the first's rest ends.
type shortage struct {
	usable, used, resting int
	next                  time.Time
}

// free is how many addresses a pod can get now.
func (s shortage) free() int { return s.usable - s.used - s.resting }

func (s shortage) String() string {
	switch {
	case s.usable == 0:
		return "no ENI is ready"
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

// allocate gives p an address of a slot that is ready, the one that has rested
// longest; ready maps slots to the MTU of their ENI. A pod that has an address
// keeps it.
func (l *ledger) allocate(p Pod, ready map[int]int, now time.Time) (Pod, shortage, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(); err != nil {
		return Pod{}, shortage{}, err
	}
	if old, ok := l.now.Pods[p.Attachment]; ok {
		p.Addr, p.Slot, p.ENI, p.MTU, p.Since = old.Addr, old.Slot, old.ENI, old.MTU, old.Since
		if p == old {
			return old, shortage{}, nil
		}
		return p, shortage{}, l.put(record{Pod: &p})
	}
	var short shortage
	var best time.Time
	for number, mtu := range ready {
		slot := l.now.Slots[number]
		for _, a := range slot.Addrs {
			short.usable++
			if _, ok := l.used[a]; ok {
				short.used++
				continue
			}
			until := l.now.restsUntil(a)
			if until.After(now) {
				if short.resting++; short.next.IsZero() || until.Before(short.next) {
					short.next = until
				}
				continue
			}
			if !until.IsZero() && !l.clean[a] {
				short.resting++ // the paths are about to clean it, which wakes
				continue
			}
			if !p.Addr.IsValid() || until.Before(best) || until.Equal(best) && a.Less(p.Addr) {
				p.Addr, p.Slot, p.ENI, p.MTU, best = a, number, slot.ENI, mtu, until
			}
		}
	}
	if !p.Addr.IsValid() {
		return Pod{}, short, nil
	}
	p.Since = now.UTC().Truncate(time.Millisecond)
	if err := l.put(record{Pod: &p}); err != nil {
		return Pod{}, short, err
	}
	l.used[p.Addr] = p.Attachment
	short.used++
	return p, short, nil
}

// release ends an attachment; its address rests.
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
	if err := l.put(record{Rest: &rest{Attachment: key, Addr: p.Addr, Until: until}}); err != nil {
		return err
	}
	delete(l.used, p.Addr)
	delete(l.clean, p.Addr)
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
		for _, a := range slot.Addrs {
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
