package reconcile

import (
	"slices"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// Board holds the conditions of the node. Several sources may serve one type:
// the type is then True when all of them are, and shows the first that is not.
type Board struct {
	mu      sync.Mutex // guards everything below
	sources map[node.ConditionType][]source
	shown   map[node.ConditionType]node.Condition
	changed chan struct{} // closed and replaced at every visible change
}

type source struct {
	name string
	cond node.Condition
}

// NewBoard returns a board on which nothing is known yet.
func NewBoard() *Board {
	return &Board{
		sources: map[node.ConditionType][]source{},
		shown:   map[node.ConditionType]node.Condition{},
		changed: make(chan struct{}),
	}
}

// Set records what the named source says of a condition.
func (b *Board) Set(name string, t node.ConditionType, s node.Status, reason, message string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := node.Condition{Type: t, Status: s, Reason: reason, Message: message}
	all := b.sources[t]
	if i := slices.IndexFunc(all, func(x source) bool { return x.name == name }); i >= 0 {
		all[i].cond = c
	} else {
		b.sources[t] = append(all, source{name, c})
	}
	b.show(t)
}

// show recomputes the visible condition of t; Since moves only with the status.
func (b *Board) show(t node.ConditionType) {
	all := b.sources[t]
	now := all[0].cond
	for _, s := range all {
		if s.cond.Status != node.True {
			now = s.cond
			break
		}
	}
	before, known := b.shown[t]
	now.Since = before.Since
	if !known || before.Status != now.Status {
		now.Since = time.Now()
	}
	if known && before == now {
		return
	}
	b.shown[t] = now
	close(b.changed)
	b.changed = make(chan struct{})
}

// get returns the condition of type t; one that nobody has spoken of is Unknown.
// The caller holds mu.
func (b *Board) get(t node.ConditionType) node.Condition {
	if c, ok := b.shown[t]; ok {
		return c
	}
	return node.Condition{Type: t, Status: node.Unknown, Reason: "NotObservedYet"}
}

// Conditions returns every condition in launch order.
func (b *Board) Conditions() []node.Condition {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []node.Condition
	for _, t := range node.ConditionTypes {
		out = append(out, b.get(t))
	}
	return out
}

// Unmet returns those of types that are not True, in their order, and a channel
// that is closed at the next change of any condition.
func (b *Board) Unmet(types ...node.ConditionType) ([]node.Condition, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var unmet []node.Condition
	for _, t := range types {
		if c := b.get(t); c.Status != node.True {
			unmet = append(unmet, c)
		}
	}
	return unmet, b.changed
}
