package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// instance is a Module with its own loop, back-off and status.
type instance struct {
	Module
	log   *slog.Logger
	board *Board
	woken chan struct{} // capacity 1: wakes coalesce
	asked chan struct{} // Alive hands over to the loop, wherever it waits

	// Consecutive errors, and answers that something is not there yet; only the
	// loop touches them. Waiting for long is no failure: an error after it is
	// tried again as soon as the first.
	failures, waits int

	mu     sync.Mutex // guards the rest
	st     InstanceStatus
	answer *answer // to who last asked for a plan; nil: nobody has
}

// answer is a plan that is made for everybody who asks while it is being made, and
// for a moment after: to plan may read a disk, or call the cloud.
type answer struct {
	done chan struct{} // closed when the rest is there
	plan InstancePlan
	at   time.Time
}

func (in *instance) wake() {
	select {
	case in.woken <- struct{}{}:
	default:
	}
}

// watch keeps Watch running; whenever it returns, everything is planned anew.
func (in *instance) watch(ctx context.Context) {
	for failures := 0; ctx.Err() == nil; failures++ {
		started := time.Now()
		err := in.Watch(ctx, in.wake)
		if ctx.Err() != nil {
			return
		}
		if time.Since(started) > backoffMax {
			failures = 0
		}
		in.log.Warn("watch ended, planning anew", "err", err)
		in.wake()
		sleep(ctx, backoff(failures))
	}
}

// run is the instance's loop.
func (in *instance) run(ctx context.Context) {
	for ctx.Err() == nil {
		if unmet, changed := in.board.Unmet(in.Needs()...); len(unmet) > 0 {
			in.set(InstanceStatus{State: Blocked, Reason: "Blocked", Message: blockedBy(unmet)})
			in.wait(ctx, changed)
			continue
		}
		floor, ceiling := in.step(ctx)
		in.rest(ctx, floor, ceiling)
	}
}

// wait returns when c is ready or ctx ends, and answers Alive meanwhile.
func (in *instance) wait(ctx context.Context, c <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c:
			return
		case <-in.asked:
		}
	}
}

// rest waits at least floor and then for a wake, at most until ceiling (zero:
// without end), or until what the instance needs is lost.
func (in *instance) rest(ctx context.Context, floor, ceiling time.Duration) {
	floor = max(floor, gap)
	rested, cancel := context.WithTimeout(ctx, floor)
	in.wait(rested, nil)
	cancel()
	var timeout <-chan time.Time
	if ceiling > 0 {
		t := time.NewTimer(max(ceiling-floor, 0))
		defer t.Stop()
		timeout = t.C
	}
	for {
		unmet, changed := in.board.Unmet(in.Needs()...)
		if len(unmet) > 0 {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-in.woken:
			return
		case <-timeout:
			return
		case <-changed:
		case <-in.asked:
		}
	}
}

// step plans and applies until the plan is empty or something is in the way. It
// returns how long to rest at least and at most.
func (in *instance) step(ctx context.Context) (floor, ceiling time.Duration) {
	// Whatever woke us until here is about to be seen.
	select {
	case <-in.woken:
	default:
	}
	var applied node.Plan // all that this step has applied
	outdated := ""        // the last plan of this step that the world has overtaken
	for round := 0; ; round++ {
		began := time.Now()
		plan, err := in.plan(ctx)
		// Wakes may come without end, as while pods are added: planning leaves most of
		// the time to what wakes it.
		pause := min(planPause*time.Since(began), gapMax)
		switch {
		case ctx.Err() != nil:
			return 0, 0
		case err != nil:
			return in.failed(err, node.Plan{Again: plan.Again})
		case plan.Empty():
			in.failures, in.waits = 0, 0
			in.set(InstanceStatus{State: Converged, Reason: "Converged", NextTry: after(plan.Again), quiet: plan.Rest > 0})
			return max(pause, plan.Rest), plan.Again
		case round == maxRounds || repeats(applied, plan):
			return in.notConverging(applied, plan)
		}
		in.set(InstanceStatus{State: Applying, Reason: "Applying", Message: plan.Changes[0].Text, Changes: texts(plan), serving: plan.Serving, quiet: plan.Rest > 0})
		started := time.Now()
		err = in.bounded(ctx, "apply", applyDeadline, func(ctx context.Context) error {
			return in.Apply(ctx, plan)
		})
		if ctx.Err() != nil {
			return 0, 0
		}
		if errors.Is(err, node.ErrOutdated) && plan.String() != outdated {
			outdated = plan.String()
			in.log.Info("outdated, planning anew", "err", err)
			continue
		}
		if err != nil {
			return in.failed(err, plan)
		}
		level := slog.LevelInfo
		if plan.Rest > 0 {
			level = slog.LevelDebug
		}
		for _, c := range plan.Changes {
			in.log.Log(ctx, level, "changed", "change", c.Text)
		}
		in.log.Log(ctx, level, "applied", "changes", len(plan.Changes), "took", time.Since(started).Round(time.Millisecond))
		applied.Changes = append(applied.Changes, plan.Changes...)
	}
}

// repeats reports whether a change that was applied is to be made again. One that
// is new is no failure: the world has moved on meanwhile.
func repeats(applied, plan node.Plan) bool {
	return slices.ContainsFunc(plan.Changes, func(c node.Change) bool { return slices.Contains(texts(applied), c.Text) })
}

// plan calls Plan with its deadline. A Plan that outlives it hands its result to
// nobody.
func (in *instance) plan(ctx context.Context) (node.Plan, error) {
	result := make(chan node.Plan, 1)
	err := in.bounded(ctx, "plan", planDeadline, func(ctx context.Context) error {
		p, err := in.Plan(ctx)
		result <- p
		return err
	})
	select {
	case p := <-result:
		return p, err
	default:
		return node.Plan{}, err
	}
}

// bounded calls f with a deadline. If f outlives it, the instance is shown as
// stuck until f returns; if the engine ends meanwhile, f is left behind.
func (in *instance) bounded(ctx context.Context, what string, limit time.Duration, f func(context.Context) error) error {
	fctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- f(fctx) }()
	late := time.NewTimer(limit + grace)
	defer late.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-in.asked: // the loop lives, whatever f does
		case <-late.C:
			in.set(InstanceStatus{
				State: Stuck, Reason: "Stuck",
				Message: fmt.Sprintf("%s has not returned for %s: it hangs in the kernel or on a peer; its stack is in the socket's /debug/pprof/goroutine?debug=2", what, limit+grace),
				Changes: in.status().Changes,
			})
		case <-ctx.Done():
			return in.leave(ctx, what, done)
		}
	}
}

// leave waits a last moment for what is under way when the engine ends.
func (in *instance) leave(ctx context.Context, what string, done <-chan error) error {
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case err := <-done:
		return err
	case <-t.C:
		in.log.Error("left behind, it does not return", "what", what)
		return ctx.Err()
	}
}

// failed records err and returns how long to rest: a waiting instance listens to
// wakes at once, a failing one only after its back-off, and a terminal one
// hardly ever asks by itself. What fails of a plan that is for what may come leaves
// the condition as it is, unless a human must act.
func (in *instance) failed(err error, plan node.Plan) (floor, ceiling time.Duration) {
	class := node.ClassOf(err)
	st := InstanceStatus{State: Failed, Reason: node.ReasonOf(err, "Error"), Message: err.Error(), Class: class.String(), serving: plan.Serving && class != node.ClassTerminal}
	if class == node.ClassWaiting {
		st.State = Waiting
		floor, ceiling = 0, min(backoff(in.waits), 5*time.Second)
		if plan.Again > 0 {
			ceiling = plan.Again
		}
		in.failures = 0
		in.waits++
	} else {
		floor = backoff(in.failures)
		ceiling = floor
		if class == node.ClassTerminal {
			ceiling = terminalRetry
		}
		in.failures++
		in.waits = 0
	}
	st.NextTry = after(ceiling)
	in.set(st)
	return floor, ceiling
}

func (in *instance) notConverging(applied, left node.Plan) (floor, ceiling time.Duration) {
	delay := backoff(in.failures)
	if left.Urgent {
		delay = jittered(in.failures, urgentMin, urgentMax)
	}
	delay = max(delay, left.Rest)
	in.failures++
	in.set(InstanceStatus{
		State: NotConverging, Reason: "NotConverging",
		Message: fmt.Sprintf("%d changes are left although the plan was applied without an error: something undoes them, or this is a bug", len(left.Changes)),
		Changes: append(prefixed("applied: ", applied), prefixed("left: ", left)...),
		NextTry: after(delay),
		serving: left.Serving,
		quiet:   left.Rest > 0,
	})
	return delay, delay
}

// planNow plans for somebody who asks, beside the loop.
func (in *instance) planNow(ctx context.Context) InstancePlan {
	out := InstancePlan{Name: in.Name(), Changes: []string{}}
	if unmet, _ := in.board.Unmet(in.Needs()...); len(unmet) > 0 {
		out.Error = blockedBy(unmet)
		return out
	}
	a := in.ask()
	select {
	case <-a.done:
		return a.plan
	case <-ctx.Done():
		out.Error = fmt.Sprintf("no answer: %v", context.Cause(ctx))
		return out
	}
}

// ask returns the answer under way or one that is fresh, or has a new one made.
func (in *instance) ask() *answer {
	in.mu.Lock()
	defer in.mu.Unlock()
	if a := in.answer; a != nil {
		select {
		case <-a.done:
			if time.Since(a.at) < shareFor {
				return a
			}
		default:
			return a
		}
	}
	a := &answer{done: make(chan struct{}), plan: InstancePlan{Name: in.Name()}}
	in.answer = a
	go func() { // one that hangs in the kernel cannot be waited for
		// Not of one who asks: others wait for it as well.
		ctx, cancel := context.WithTimeout(context.Background(), planDeadline)
		defer cancel()
		p, err := in.Plan(ctx)
		a.plan.Changes, a.at = texts(p), time.Now()
		if err != nil {
			a.plan.Error = err.Error()
		}
		close(a.done)
	}()
	return a
}

func (in *instance) status() InstanceStatus {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.st
}

// set records the status and passes it on to the board; transitions are logged.
func (in *instance) set(st InstanceStatus) {
	st.Name, st.Condition, st.Since = in.Name(), in.Condition(), time.Now()
	in.mu.Lock()
	before := in.st
	moved := before.State != st.State || before.Reason != st.Reason
	if !moved {
		st.Since = before.Since
	}
	in.st = st
	in.mu.Unlock()
	if moved && st.State != Starting {
		level := slog.LevelInfo
		if st.State == Failed || st.State == Stuck || st.State == NotConverging {
			level = slog.LevelError
		}
		if st.quiet {
			level = slog.LevelDebug
		}
		in.log.Log(context.Background(), level, string(st.State), "reason", st.Reason, "message", st.Message)
	}
	status := node.False
	switch {
	case st.State == Converged, st.serving:
		status = node.True
	case st.State == Starting, st.State == Stuck:
		status = node.Unknown
	}
	in.board.Set(in.Name(), st.Condition, status, st.Reason, st.Message)
}

func blockedBy(unmet []node.Condition) string {
	c := unmet[0]
	text := fmt.Sprintf("blocked by %s, which is %s", c.Type, c.Status)
	if c.Reason != "" && c.Reason != "Blocked" {
		text += " (" + c.Reason + ")"
	}
	return text
}

func texts(p node.Plan) []string { return prefixed("", p) }

func prefixed(prefix string, p node.Plan) []string {
	out := make([]string, len(p.Changes))
	for i, c := range p.Changes {
		out[i] = prefix + c.Text
	}
	return out
}

// backoff returns the delay after n earlier failures: doubling, capped, and with
// a jitter of half of it, so that a fleet does not retry at once.
func backoff(n int) time.Duration { return jittered(n, backoffMin, backoffMax) }

func jittered(n int, least, most time.Duration) time.Duration {
	d := most
	if n < 7 { // least << 7 exceeds the cap
		d = min(least<<n, most)
	}
	return d/2 + rand.N(d/2)
}

func after(d time.Duration) time.Time {
	if d <= 0 {
		return time.Time{}
	}
	return time.Now().Add(d)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
