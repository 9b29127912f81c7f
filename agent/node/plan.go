package node

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// Change is one step of a Plan: its text, the same in golden tests, in
// `tkenode plan`, on the socket and in the journal, and the step itself.
type Change struct {
	Text string
	// Do carries the change out. It checks its own precondition again, is
	// idempotent, and returns when ctx ends.
	Do func(ctx context.Context) error
}

func (c Change) String() string { return c.Text }

// Plan lists what would have to change for an instance to be as it is wanted.
// An empty plan means that it is.
type Plan struct {
	Changes []Change
	// Again asks to be planned again after this long although nothing may wake
	// the instance: a cool-down that ends, a budget that refills. Zero: only
	// when woken.
	Again time.Duration
	// Serving says that the condition holds although there are changes: they are
	// for what may come, as one more spare address is.
	Serving bool
	// Urgent says that what is not as it is wanted hurts at once, and that a try
	// costs little: changes that do not last are made again soon, as those are that
	// somebody undoes while they are made.
	Urgent bool
	// Rest is how long to rest at least before the next plan. One that is not zero
	// also says that changes come again and again, so they are logged as debug.
	Rest time.Duration
}

// Add appends a change.
func (p *Plan) Add(do func(context.Context) error, format string, args ...any) {
	p.Changes = append(p.Changes, Change{Text: fmt.Sprintf(format, args...), Do: do})
}

// Empty reports whether there is nothing to change.
func (p Plan) Empty() bool { return len(p.Changes) == 0 }

// Apply carries the changes out in order and stops at the first that fails.
func (p Plan) Apply(ctx context.Context) error {
	for _, c := range p.Changes {
		if err := c.Do(ctx); err != nil {
			return fmt.Errorf("%s: %w", c.Text, err)
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("after %s: %w", c.Text, err)
		}
	}
	return nil
}

// String returns one line a change.
func (p Plan) String() string {
	var b strings.Builder
	for _, c := range p.Changes {
		b.WriteString(c.Text)
		b.WriteByte('\n')
	}
	return b.String()
}
