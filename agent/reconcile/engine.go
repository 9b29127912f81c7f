// Package reconcile is the one engine that runs every module of the agent: it
// plans, applies, plans again, backs off, and says on a Board of conditions how
// each instance stands.
//
// It knows nothing of networks, disks or units, and it never stops a module's
// work because another one hangs. What a Module must keep is written at its
// methods; what the engine keeps (the laws of ARCHITECTURE.md) is held by this
// package's tests.
package reconcile

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// Module is one instance of something kept as it is wanted: a disk, a unit, the
// pool of addresses, the paths in the kernel.
type Module interface {
	// Name is unique: "disk/disk-1a2b3c4d". It is the log scope and the name in
	// `tkenode status`.
	Name() string
	// Condition is what the instance serves: True while its plan is empty.
	Condition() node.ConditionType
	// Needs lists conditions without which planning makes no sense. While one is
	// unmet the instance is blocked, which is not an error.
	Needs() []node.ConditionType
	// Watch calls wake once it would notice a change, since what has changed before
	// nobody tells, and then whenever the world may have changed. It returns only
	// on failure or when ctx ends; after a failure the engine forces a full re-plan,
	// because whatever it watched may have lost messages, and starts it anew.
	Watch(ctx context.Context, wake func()) error
	// Plan observes, compares with what is wanted and mutates nothing.
	// Plan.Again is honoured also beside an error.
	Plan(ctx context.Context) (node.Plan, error)
	// Apply carries p out, idempotently; it may be cut off after any step. With
	// node.ErrOutdated it is planned anew at once, unless the same plan was outdated.
	Apply(ctx context.Context, p node.Plan) error
}

// Limits of the engine. They are ours: long enough for a slow disk or a slow
// cloud, short enough for somebody who waits in front of a screen.
const (
	planDeadline  = 30 * time.Second
	applyDeadline = 2 * time.Minute
	grace         = 5 * time.Second        // after a deadline, before the instance counts as stuck
	gap           = 20 * time.Millisecond  // between two plans of one instance: wakes coalesce
	planPause     = 4                      // times as long as a plan took, the next one of its instance waits at least
	gapMax        = 250 * time.Millisecond // but not longer: what was broken is repaired within 1 s
	shareFor      = time.Second            // a plan that was asked for answers others, too
	maxRounds     = 8                      // of applying what is new before an instance counts as not converging
	backoffMin    = 500 * time.Millisecond
	backoffMax    = time.Minute
	urgentMin     = 50 * time.Millisecond // instead, where an urgent plan does not converge
	urgentMax     = time.Second
	terminalRetry = 5 * time.Minute // a look whether the human has acted
)

// State is where an instance stands.
type State string

// The states of an instance.
const (
	Starting      State = "Starting"
	Blocked       State = "Blocked"       // a needed condition is unmet
	Applying      State = "Applying"      // changes are being made
	Converged     State = "Converged"     // the plan is empty
	Waiting       State = "Waiting"       // for something outside of this node
	Failed        State = "Failed"        // see Class for whether it is retried
	NotConverging State = "NotConverging" // the plan after a successful apply was not empty
	Stuck         State = "Stuck"         // a plan or an apply has outlived its deadline
)

// InstanceStatus is how one instance stands.
type InstanceStatus struct {
	Name      string             `json:"name"`
	Condition node.ConditionType `json:"condition"`
	State     State              `json:"state"`
	Since     time.Time          `json:"since"`
	Reason    string             `json:"reason,omitempty"`
	Message   string             `json:"message,omitempty"`
	Class     string             `json:"class,omitempty"`   // of the error, if there is one
	Changes   []string           `json:"changes,omitempty"` // being made, or that did not lead anywhere
	NextTry   time.Time          `json:"nextTry,omitzero"`  // zero: when woken

	serving bool // the condition holds beside the changes
	quiet   bool // it comes again and again, so it is logged as debug
}

// InstancePlan is what one instance would change now.
type InstancePlan struct {
	Name    string   `json:"name"`
	Changes []string `json:"changes"`
	Error   string   `json:"error,omitempty"`
}

// Engine runs modules.
type Engine struct {
	instances []*instance
}

// New returns an engine for modules, in the order in which they are shown.
func New(log *slog.Logger, board *Board, modules ...Module) *Engine {
	e := &Engine{}
	for _, m := range modules {
		in := &instance{
			Module: m,
			log:    log.With("module", m.Name()),
			board:  board,
			woken:  make(chan struct{}, 1),
			asked:  make(chan struct{}),
		}
		in.set(InstanceStatus{State: Starting})
		e.instances = append(e.instances, in)
	}
	return e
}

// Run runs every module until ctx ends and all of them have stopped. A module
// that hangs in the kernel is left behind after a grace, so that the agent can
// always be restarted.
func (e *Engine) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, in := range e.instances {
		wg.Go(func() { in.watch(ctx) })
		wg.Go(func() { in.run(ctx) })
	}
	wg.Wait()
}

// Wake makes the named instance plan soon; it reports whether there is one.
func (e *Engine) Wake(name string) bool {
	for _, in := range e.instances {
		if in.Name() == name {
			in.wake()
			return true
		}
	}
	return false
}

// Alive returns an error unless the loop of every instance takes notice before ctx
// ends. One whose module hangs does; one that is dead does not.
func (e *Engine) Alive(ctx context.Context) error {
	for _, in := range e.instances {
		select {
		case in.asked <- struct{}{}:
		case <-ctx.Done():
			return fmt.Errorf("the engine's loop of %s does not turn: %w", in.Name(), ctx.Err())
		}
	}
	return nil
}

// Status returns how every instance stands.
func (e *Engine) Status() []InstanceStatus {
	out := make([]InstanceStatus, len(e.instances))
	for i, in := range e.instances {
		out[i] = in.status()
	}
	return out
}

// Plan plans every instance anew, all at once, and applies nothing.
func (e *Engine) Plan(ctx context.Context) []InstancePlan {
	ctx, cancel := context.WithTimeout(ctx, planDeadline)
	defer cancel()
	out := make([]InstancePlan, len(e.instances))
	var wg sync.WaitGroup
	for i, in := range e.instances {
		wg.Go(func() { out[i] = in.planNow(ctx) })
	}
	wg.Wait()
	return out
}
