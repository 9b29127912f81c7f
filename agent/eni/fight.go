package eni

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// Something may keep undoing what the paths make: a script, systemd-networkd,
// another agent. They go on repairing, and say what does not last and, as far as
// the kernel tells, because of whom.
const (
	fightTimes  = 4                      // changes of one object, the first may be no repair, ...
	fightWithin = time.Hour              // ... in so long are a fight: timers undo things every few minutes
	fightQuiet  = time.Minute            // it is over after this at least
	fightRest   = 100 * time.Millisecond // between two repairs, while there is one
	fightsShown = 3
	fightsKept  = 4096 // objects that were repaired; somebody may make ever new ones
)

// fights knows what was repaired lately. Its zero value is ready.
type fights struct {
	mu      sync.Mutex         // guards the rest
	undone  map[string]*undone // by the text of the change
	culprit map[string]culprit // who changed something of ours last, by the kind of object
	told    bool
}

// undone is an object that was repaired.
type undone struct {
	key   string
	drop  bool // it was there, and is not wanted
	since time.Time
	times int
	last  []time.Time // the latest repairs, fightTimes of them at most
	by    string
}

// culprit is a process that has changed something of ours.
type culprit struct {
	name string // empty: it had ended when we looked
	pid  int
	at   time.Time
}

func (c culprit) String() string {
	return fmt.Sprintf("%s (pid %d)", cmp.Or(c.name, "a process that has ended"), c.pid)
}

// kindOf returns the kind of object, which is the first word of its key.
func kindOf(key string) string {
	kind, _, _ := strings.Cut(key, " ")
	return kind
}

// blame remembers who has changed an object of that kind.
func (f *fights) blame(kind string, c culprit) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.culprit == nil {
		f.culprit = map[string]culprit{}
	}
	f.culprit[kind] = c
}

// repaired counts a change that was made.
func (f *fights) repaired(o object, drop bool, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	name := changeText(text(o), drop)
	u := f.undone[name]
	if u == nil {
		if len(f.undone) >= fightsKept {
			return
		}
		if f.undone == nil {
			f.undone = map[string]*undone{}
		}
		u = &undone{key: o.key(), drop: drop, since: now}
		f.undone[name] = u
	}
	// One that did something before the last repair has not undone that.
	if c, ok := f.culprit[kindOf(u.key)]; ok && (u.times == 0 || c.at.After(u.last[len(u.last)-1])) && now.Sub(c.at) < fightQuiet {
		u.by = c.String()
	}
	u.times++
	if u.last = append(u.last, now); len(u.last) > fightTimes {
		u.last = u.last[1:]
	}
}

func changeText(object string, drop bool) string {
	if drop {
		return "delete " + object
	}
	return "add " + object
}

// want forgets what was repaired for another reason: it is wanted no more, or was
// not wanted before. An ENI may be plugged in often, under one name.
func (f *fights) want(want []object) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.undone) == 0 {
		return
	}
	texts, keys := map[string]bool{}, map[string]bool{}
	for _, o := range want {
		texts[changeText(text(o), false)], keys[o.key()] = true, true
	}
	maps.DeleteFunc(f.undone, func(name string, u *undone) bool {
		return u.drop && keys[u.key] || !u.drop && !texts[name]
	})
}

// lasts reports whether the object is in a fight. It is over when nothing has
// undone it for three times as long as it took on average.
func (u *undone) lasts(now time.Time) bool {
	if len(u.last) < fightTimes {
		return false
	}
	latest := u.last[fightTimes-1]
	span := latest.Sub(u.last[0])
	return span <= fightWithin && now.Sub(latest) < max(fightQuiet, 3*span/(fightTimes-1))
}

// warning returns the warning RepairsUndone, or nil while there is no fight.
func (f *fights) warning(now time.Time) *node.Condition {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.warn(now)
}

// warn is warning for who holds mu.
func (f *fights) warn(now time.Time) *node.Condition {
	var all []*undone
	for _, u := range f.undone {
		if u.lasts(now) {
			all = append(all, u)
		}
	}
	if len(all) == 0 {
		return nil
	}
	slices.SortFunc(all, func(a, b *undone) int {
		return cmp.Or(cmp.Compare(b.times, a.times), a.since.Compare(b.since), cmp.Compare(a.key, b.key))
	})
	c := &node.Condition{Type: node.RepairsUndone, Status: node.True, Reason: "UndoneAgain", Since: all[0].since}
	var parts []string
	for i, u := range all {
		if u.since.Before(c.Since) {
			c.Since = u.since
		}
		if i < fightsShown {
			parts = append(parts, u.String())
		}
	}
	if more := len(all) - fightsShown; more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more", more))
	}
	c.Message = strings.Join(parts, "; ")
	return c
}

func (u *undone) String() string {
	how := "made"
	if u.drop {
		how = "deleted"
	}
	s := fmt.Sprintf("%s had to be %s %d times since %s", u.key, how, u.times, u.since.UTC().Format(time.RFC3339))
	if u.by != "" {
		s += ", undone by " + u.by
	}
	return s
}

// news returns the warning as it is now, and whether there is one where there was
// none, or the other way round. What is over is forgotten.
func (f *fights) news(now time.Time) (c *node.Condition, changed bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c = f.warn(now)
	maps.DeleteFunc(f.undone, func(_ string, u *undone) bool {
		latest := u.last[len(u.last)-1]
		return !u.lasts(now) && now.Sub(latest) > fightWithin
	})
	changed, f.told = (c != nil) != f.told, c != nil
	return c, changed
}

// Undone returns the warning RepairsUndone, or nil. It never waits.
func (n *Network) Undone() *node.Condition { return n.paths.fights.warning(time.Now()) }
