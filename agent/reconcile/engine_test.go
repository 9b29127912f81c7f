package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// thing is a module over a value in memory: it wants done to be true.
type thing struct {
	name  string
	cond  node.ConditionType
	needs []node.ConditionType

	mu      sync.Mutex // guards the rest
	done    bool
	sticky  bool // Apply has no effect
	plans   []time.Time
	applies int
	planErr error
	again   time.Duration
	serving bool
	urgent  bool
	rest    time.Duration
	onPlan  func(context.Context)
	onApply func(context.Context) error
	watch   func(context.Context, func()) error
}

func (m *thing) Name() string                  { return m.name }
func (m *thing) Condition() node.ConditionType { return m.cond }
func (m *thing) Needs() []node.ConditionType   { return m.needs }

func (m *thing) Watch(ctx context.Context, wake func()) error {
	if m.watch != nil {
		return m.watch(ctx, wake)
	}
	<-ctx.Done()
	return ctx.Err()
}

func (m *thing) Plan(ctx context.Context) (node.Plan, error) {
	if m.onPlan != nil {
		m.onPlan(ctx)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.plans = append(m.plans, time.Now())
	p := node.Plan{Again: m.again, Serving: m.serving, Urgent: m.urgent, Rest: m.rest}
	if m.planErr != nil {
		return p, m.planErr
	}
	if !m.done {
		p.Add(func(ctx context.Context) error {
			m.mu.Lock()
			m.applies++
			m.done = !m.sticky
			m.mu.Unlock()
			if m.onApply != nil {
				return m.onApply(ctx)
			}
			return nil
		}, "set %s", m.name)
	}
	return p, nil
}

func (m *thing) Apply(ctx context.Context, p node.Plan) error { return p.Apply(ctx) }

func (m *thing) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

func (m *thing) planned() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.plans)
}

// run starts an engine in the bubble of the test; stop ends it and waits.
func run(t *testing.T, modules ...Module) (e *Engine, b *Board, stop func()) {
	t.Helper()
	b = NewBoard()
	e = New(slog.New(slog.DiscardHandler), b, modules...)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { e.Run(ctx); close(ended) }()
	return e, b, func() { cancel(); <-ended }
}

func state(t *testing.T, e *Engine, name string) InstanceStatus {
	t.Helper()
	for _, st := range e.Status() {
		if st.Name == name {
			return st
		}
	}
	t.Fatalf("no instance %s", name)
	return InstanceStatus{}
}

func settle(d time.Duration) { time.Sleep(d); synctest.Wait() }

func TestConvergedMeansAnEmptyPlan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.DisksReady}
		e, b, stop := run(t, m)
		defer stop()
		settle(time.Second)
		if st := state(t, e, "a"); st.State != Converged || m.applies != 1 || m.planned() != 2 {
			t.Errorf("state %s after %d applies and %d plans, want Converged after 1 and 2", st.State, m.applies, m.planned())
		}
		if unmet, _ := b.Unmet(node.DisksReady); len(unmet) != 0 {
			t.Errorf("unmet: %v", unmet)
		}
		if p := e.Plan(t.Context()); len(p[0].Changes) != 0 || p[0].Error != "" {
			t.Errorf("plan of a converged instance: %+v", p[0])
		}
	})
}

// TestServing: changes for what may come take no condition away, others do.
func TestServing(t *testing.T) {
	for serving, want := range map[bool]int{true: 0, false: 1} {
		synctest.Test(t, func(t *testing.T) {
			m := &thing{name: "a", cond: node.DisksReady, serving: serving}
			m.onApply = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
			e, b, stop := run(t, m)
			defer stop()
			settle(time.Second)
			if unmet, _ := b.Unmet(node.DisksReady); len(unmet) != want || state(t, e, "a").State != Applying {
				t.Errorf("serving %v: unmet while changes are made: %v", serving, unmet)
			}
		})
	}
}

// TestServingFails: what fails of changes for what may come takes no condition away
// either, unless a human must act, nor does one that is undone.
func TestServingFails(t *testing.T) {
	for name, c := range map[string]struct {
		err   error
		state State
		unmet int
	}{
		"transient": {errors.New("no answer"), Failed, 0},
		"terminal":  {node.Terminal("Denied", "allow it", errors.New("denied")), Failed, 1},
		"undone":    {nil, NotConverging, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			m := &thing{name: "a", cond: node.DisksReady, serving: true, sticky: true}
			m.onApply = func(context.Context) error { return c.err }
			e, b, stop := run(t, m)
			defer stop()
			settle(10 * time.Millisecond)
			if unmet, _ := b.Unmet(node.DisksReady); len(unmet) != c.unmet || state(t, e, "a").State != c.state {
				t.Errorf("%s: state %s, unmet %v", name, state(t, e, "a").State, unmet)
			}
		})
	}
}

func TestLaw1NotConvergingShowsBothPlans(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.DisksReady, sticky: true}
		e, b, stop := run(t, m)
		defer stop()
		settle(10 * time.Millisecond)
		st := state(t, e, "a")
		if st.State != NotConverging || strings.Join(st.Changes, "|") != "applied: set a|left: set a" {
			t.Fatalf("state %s, changes %q", st.State, st.Changes)
		}
		if c, _ := b.Unmet(node.DisksReady); len(c) != 1 || c[0].Reason != "NotConverging" {
			t.Errorf("condition %v", c)
		}
		settle(10 * time.Minute)
		// The shortest pauses are half of each: 7 in 32 s, and then one of 30 s each.
		if m.applies > 28 {
			t.Errorf("applied %d times in 10 minutes: no back-off", m.applies)
		}
		m.set(func() { m.sticky = false })
		settle(2 * time.Minute)
		if st := state(t, e, "a"); st.State != Converged {
			t.Errorf("state %s once the cause is gone", st.State)
		}
	})
}

// TestLaw1UrgentIsTriedAgainSoon: what was undone once is repaired at once; what
// never lasts is tried about every second.
func TestLaw1UrgentIsTriedAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.NetworkReady, sticky: true, urgent: true}
		e, _, stop := run(t, m)
		defer stop()
		settle(10 * time.Millisecond)
		if st := state(t, e, "a"); st.State != NotConverging {
			t.Fatalf("state %s", st.State)
		}
		settle(time.Minute)
		if m.applies < 60 || m.applies > 130 { // the pauses are of half a second to a second
			t.Errorf("applied %d times in a minute", m.applies)
		}
		m.set(func() { m.sticky = false })
		settle(urgentMax)
		if st := state(t, e, "a"); st.State != Converged {
			t.Errorf("state %s once the cause is gone", st.State)
		}
		m.set(func() { m.done, m.sticky = false, true })
		e.Wake("a")
		settle(gap)
		m.set(func() { m.sticky = false })
		settle(urgentMin)
		if st := state(t, e, "a"); st.State != Converged {
			t.Errorf("state %s after it was undone once", st.State)
		}
	})
}

// TestRest: what is undone at once each time is repaired no more often than its
// plan says, and without a line in the log each time.
func TestRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.NetworkReady, rest: 100 * time.Millisecond}
		var log strings.Builder
		e := New(slog.New(slog.NewTextHandler(&log, nil)), NewBoard(), m)
		m.onPlan = func(context.Context) { m.set(func() { m.done = m.applies > len(m.plans)/2 }) }
		m.watch = func(ctx context.Context, wake func()) error {
			for ctx.Err() == nil {
				wake()
				time.Sleep(time.Millisecond)
			}
			return ctx.Err()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		e.Run(ctx)
		if m.applies < 95 || m.applies > 101 || strings.Contains(log.String(), "level=INFO") {
			t.Errorf("applied %d times in 10 s, log:\n%.1000s", m.applies, &log)
		}
	})
}

// TestLaw1TheWorldMovesOn: what is new after an apply is applied as well; a change
// that has to be made again, or no end of new ones, is not converging.
func TestLaw1TheWorldMovesOn(t *testing.T) {
	for _, c := range []struct {
		more, names int // plans that are not empty, and different ones among them
		want        State
		applies     int
	}{{3, 3, Converged, 3}, {4, 2, NotConverging, 2}, {100, 100, NotConverging, maxRounds}} {
		synctest.Test(t, func(t *testing.T) {
			m := &thing{name: "0", cond: node.DisksReady, sticky: true}
			plans := 0
			m.onPlan = func(context.Context) {
				m.set(func() { m.name, m.done = strconv.Itoa(plans%c.names), plans >= c.more })
				plans++
			}
			e, _, stop := run(t, m)
			defer stop()
			settle(10 * time.Millisecond)
			if st := e.Status()[0]; st.State != c.want || m.applies != c.applies {
				t.Errorf("%+v: state %s after %d applies", c, st.State, m.applies)
			}
		})
	}
}

func TestLaw2FailedWatchForcesAPlan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := make(chan struct{})
		m := &thing{name: "a", cond: node.DisksReady}
		m.watch = func(ctx context.Context, wake func()) error {
			select {
			case <-fail:
				return errors.New("no buffer space available")
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		_, _, stop := run(t, m)
		defer stop()
		settle(time.Second)
		before := m.planned()
		m.set(func() { m.done = false }) // a change whose message was lost
		fail <- struct{}{}
		settle(time.Second)
		if m.planned() == before || !m.done {
			t.Errorf("not planned again after the watch failed")
		}
		fail <- struct{}{} // the watch is running again
	})
}

// TestLaw2ChangeBesideTheWatch changes the world while the watch rests after a
// failure, when nobody tells.
func TestLaw2ChangeBesideTheWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.DisksReady}
		down := make(chan struct{})
		var watches atomic.Int32
		m.watch = func(ctx context.Context, wake func()) error {
			watches.Add(1)
			wake()
			select {
			case <-down:
				return errors.New("no buffer space available")
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		_, _, stop := run(t, m)
		defer stop()
		settle(time.Second)
		down <- struct{}{}
		settle(100 * time.Millisecond) // the forced plan is over, the watch rests
		if n := watches.Load(); n != 1 {
			t.Fatalf("%d watches: this test comes too late", n)
		}
		m.set(func() { m.done = false })
		settle(time.Second)
		done := false
		if m.set(func() { done = m.done }); watches.Load() != 2 || !done {
			t.Errorf("a change beside the watch is not seen (%d watches)", watches.Load())
		}
	})
}

func TestLaw3WakesCoalesce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.DisksReady}
		e, _, stop := run(t, m)
		defer stop()
		settle(time.Second)
		before := m.planned()
		for range 1000 {
			e.Wake("a")
		}
		settle(time.Second)
		if n := m.planned() - before; n < 1 || n > 2 {
			t.Errorf("1000 wakes caused %d plans", n)
		}
		if e.Wake("nobody") {
			t.Error("woke an instance that is not there")
		}
	})
}

func TestLaw4BackoffIsPerInstanceJitteredAndReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bad := &thing{name: "bad", cond: node.DisksReady, planErr: errors.New("timeout")}
		good := &thing{name: "good", cond: node.NetworkReady}
		e, _, stop := run(t, bad, good)
		defer stop()
		settle(30 * time.Minute)
		if st := state(t, e, "good"); st.State != Converged {
			t.Errorf("good is %s beside a failing instance", st.State)
		}
		n := bad.planned()
		if n < 30 || n > 75 { // a minute at most, half of it at least, between tries
			t.Errorf("%d tries in 30 minutes", n)
		}
		var gaps []time.Duration
		for i := n - 5; i < n; i++ {
			gaps = append(gaps, bad.plans[i].Sub(bad.plans[i-1]))
		}
		same := true
		for _, g := range gaps {
			same = same && g == gaps[0]
		}
		if same {
			t.Errorf("no jitter: %v", gaps)
		}
		bad.set(func() { bad.planErr = nil })
		settle(2 * time.Minute)
		bad.set(func() { bad.planErr = errors.New("again"); bad.done = false })
		before := bad.planned()
		e.Wake("bad")
		settle(1500 * time.Millisecond)
		if got := bad.planned() - before; got < 2 {
			t.Errorf("%d tries in the first 1.5 s: the back-off was not reset by success", got)
		}
	})
}

func TestLaw4AWakeDoesNotShortenTheBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.DisksReady, planErr: errors.New("refused")}
		m.watch = func(ctx context.Context, wake func()) error {
			for ctx.Err() == nil {
				wake()
				sleep(ctx, time.Millisecond)
			}
			return ctx.Err()
		}
		_, _, stop := run(t, m)
		defer stop()
		settle(5 * time.Minute)
		if n := m.planned(); n > 25 {
			t.Errorf("%d tries in 5 minutes under a storm of wakes", n)
		}
	})
}

// TestLaw4WaitingIsNoFailure: an error after a long wait is the first one.
func TestLaw4WaitingIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.NetworkReady, planErr: node.Waiting("Attaching", "eni-1 is being attached")}
		e, _, stop := run(t, m)
		defer stop()
		settle(10 * time.Minute)
		m.set(func() { m.planErr = errors.New("timeout") })
		e.Wake("a")
		settle(50 * time.Millisecond)
		if st := state(t, e, "a"); st.State != Failed || time.Until(st.NextTry) > backoffMin {
			t.Errorf("%s, tried again in %s", st.State, time.Until(st.NextTry))
		}
	})
}

func TestLaw5DeadlineAndStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		hung := &thing{name: "hung", cond: node.DisksReady}
		hung.onApply = func(context.Context) error { <-release; return nil } // deaf to its context
		slow := &thing{name: "slow", cond: node.RuntimeReady}
		slow.onApply = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		good := &thing{name: "good", cond: node.NetworkReady}
		e, b, stop := run(t, hung, slow, good)
		defer stop()
		settle(applyDeadline + grace + time.Second)
		if st := state(t, e, "hung"); st.State != Stuck || !strings.Contains(st.Message, "apply has not returned") {
			t.Errorf("hung is %s: %s", st.State, st.Message)
		}
		if c, _ := b.Unmet(node.DisksReady); len(c) != 1 || c[0].Status != node.Unknown {
			t.Errorf("condition of the stuck instance: %v", c)
		}
		if slow.applies == 0 || state(t, e, "slow").State == Stuck {
			t.Errorf("slow is %s", state(t, e, "slow").State)
		}
		if st := state(t, e, "good"); st.State != Converged {
			t.Errorf("good is %s beside a hung instance", st.State)
		}
		close(release)
		settle(time.Second)
		if st := state(t, e, "hung"); st.State != Converged {
			t.Errorf("hung is %s after it was released", st.State)
		}
	})
}

func TestLaw5TheEngineEndsBesideAHungInstance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		m := &thing{name: "hung", cond: node.DisksReady}
		m.onPlan = func(context.Context) { <-release }
		_, _, stop := run(t, m)
		settle(time.Second)
		started := time.Now()
		stop()
		if took := time.Since(started); took > grace+time.Second {
			t.Errorf("the engine took %s to end", took)
		}
		close(release)
	})
}

// TestLaw5Alive: a module that hangs starves nobody, a loop that is dead does.
func TestLaw5Alive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		hung := &thing{name: "hung", cond: node.DisksReady}
		hung.onPlan = func(context.Context) { <-release }
		failing := &thing{name: "failing", cond: node.RuntimeReady, planErr: errors.New("timeout")}
		blocked := &thing{name: "blocked", cond: node.KubeletReady, needs: []node.ConditionType{node.NodeJoined}}
		idle := &thing{name: "idle", cond: node.NetworkReady}
		e, _, stop := run(t, hung, failing, blocked, idle)
		for range 100 {
			settle(7 * time.Second)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			if err := e.Alive(ctx); err != nil {
				t.Fatal(err)
			}
			cancel()
		}
		close(release)
		stop()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := e.Alive(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "loop of hung") {
			t.Errorf("loops that have ended: %v", err)
		}
	})
}

// TestLaw6OutdatedIsPlannedAnew: a plan that the world has overtaken costs no
// back-off; one that is never in time does.
func TestLaw6OutdatedIsPlannedAnew(t *testing.T) {
	for _, c := range []struct {
		names, outdated int // different plans, and applies that are too late
		want            State
		applies         int
	}{{2, 1, Converged, 2}, {5, 4, Converged, 5}, {1, 1, Converged, 2}, {1, 2, Failed, 2}, {100, 100, NotConverging, maxRounds}} {
		synctest.Test(t, func(t *testing.T) {
			m := &thing{name: "0", cond: node.NetworkReady, sticky: true}
			plans := 0
			m.onPlan = func(context.Context) {
				m.set(func() { m.name, m.done = strconv.Itoa(plans%c.names), m.applies > c.outdated })
				plans++
			}
			m.onApply = func(context.Context) error {
				if m.applies <= c.outdated {
					return fmt.Errorf("add route: %w: network is down", node.ErrOutdated)
				}
				return nil
			}
			e, _, stop := run(t, m)
			defer stop()
			settle(10 * time.Millisecond)
			if st := e.Status()[0]; st.State != c.want || m.applies != c.applies {
				t.Errorf("%+v: state %s after %d applies: %s", c, st.State, m.applies, st.Message)
			}
			settle(10 * time.Minute)
			if c.want == Failed && e.Status()[0].State != Converged || m.applies > 200 {
				t.Errorf("%+v: state %s after %d applies in 10 minutes", c, e.Status()[0].State, m.applies)
			}
		})
	}
}

func TestLaw6Classes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		waiting := &thing{name: "waiting", cond: node.NetworkReady,
			planErr: node.Waiting("Attaching", "eni-1 is being attached"), again: 700 * time.Millisecond}
		terminal := &thing{name: "terminal", cond: node.DisksReady,
			planErr: node.Terminal("Foreign", "detach it", errors.New("disk-1 holds an xfs file system"))}
		e, _, stop := run(t, waiting, terminal)
		defer stop()
		settle(time.Hour)
		st := state(t, e, "waiting")
		if st.State != Waiting || st.Reason != "Attaching" || st.Class != "waiting" {
			t.Errorf("waiting: %+v", st)
		}
		if gap := waiting.plans[5].Sub(waiting.plans[4]); gap != 700*time.Millisecond {
			t.Errorf("Plan.Again of 700ms became %s", gap)
		}
		st = state(t, e, "terminal")
		if st.State != Failed || st.Reason != "Foreign" || st.Message != "disk-1 holds an xfs file system; detach it" {
			t.Errorf("terminal: %+v", st)
		}
		if n := terminal.planned(); n > 14 {
			t.Errorf("a terminal error was retried %d times in an hour", n)
		}
		waiting.set(func() { waiting.planErr = nil; waiting.again = 0 })
		settle(time.Second)
		if st := state(t, e, "waiting"); st.State != Converged {
			t.Errorf("waiting is %s once there is nothing to wait for", st.State)
		}
	})
}

func TestBlockedIsNotAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.RuntimeReady, needs: []node.ConditionType{node.DisksReady}}
		e, b, stop := run(t, m)
		defer stop()
		settle(time.Hour)
		if st := state(t, e, "a"); st.State != Blocked || m.planned() != 0 || st.Class != "" {
			t.Fatalf("%+v after %d plans", st, m.planned())
		}
		if p := e.Plan(t.Context()); !strings.Contains(p[0].Error, "blocked by DisksReady") {
			t.Errorf("plan: %+v", p[0])
		}
		b.Set("test", node.DisksReady, node.True, "Converged", "")
		settle(50 * time.Millisecond)
		if st := state(t, e, "a"); st.State != Converged {
			t.Fatalf("%s once the need is met", st.State)
		}
		b.Set("test", node.DisksReady, node.False, "Gone", "")
		settle(50 * time.Millisecond)
		if st := state(t, e, "a"); st.State != Blocked || st.Message != "blocked by DisksReady, which is False (Gone)" {
			t.Errorf("%+v once the need is lost", st)
		}
	})
}

func TestPlansThatAreAskedForAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.DisksReady, done: true}
		e, _, stop := run(t, m)
		defer stop()
		settle(time.Second)
		before := m.planned()
		m.onPlan = func(context.Context) { sleep(t.Context(), 2*time.Second) }
		ctx, cancel := context.WithCancel(t.Context())
		go e.Plan(ctx)
		settle(time.Second)
		cancel() // the first one hangs up: the others are answered
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if p := e.Plan(t.Context()); p[0].Error != "" || p[0].Name != "a" {
					t.Errorf("%+v", p)
				}
			})
		}
		wg.Wait()
		e.Plan(t.Context())
		if n := m.planned() - before; n != 1 {
			t.Errorf("52 questions made %d plans", n)
		}
		settle(2 * time.Second)
		e.Plan(t.Context())
		if n := m.planned() - before; n != 2 {
			t.Errorf("a question of later was answered with what was: %d plans", n)
		}
	})
}

func TestPlanAgainWithoutAWake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &thing{name: "a", cond: node.NetworkReady, done: true, again: 30 * time.Second}
		_, _, stop := run(t, m)
		defer stop()
		settle(5*time.Minute + time.Second)
		if n := m.planned(); n != 11 {
			t.Errorf("%d plans in 5 minutes with Again of 30 s, want 11", n)
		}
	})
}

func TestBoard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := NewBoard()
		b.Set("disk/1", node.DisksReady, node.True, "Converged", "")
		b.Set("disk/2", node.DisksReady, node.False, "Absent", "disk-2 is not attached")
		first := b.Conditions()[1]
		if first.Status != node.False || first.Message != "disk-2 is not attached" {
			t.Errorf("two sources: %+v", first)
		}
		_, changed := b.Unmet()
		settle(time.Minute)
		b.Set("disk/2", node.DisksReady, node.False, "Foreign", "")
		select {
		case <-changed:
		default:
			t.Error("no notice of a change of reason")
		}
		if c := b.Conditions()[1]; c.Since != first.Since || c.Reason != "Foreign" {
			t.Errorf("since moved without a transition: %+v", c)
		}
		b.Set("disk/2", node.DisksReady, node.True, "Converged", "")
		if c := b.Conditions()[1]; c.Status != node.True || c.Since == first.Since {
			t.Errorf("both True: %+v", c)
		}
		if c := b.Conditions()[0]; c.Status != node.Unknown {
			t.Errorf("nobody spoke of %s: %+v", c.Type, c)
		}
	})
}

// TestWakesLeaveTime holds that planning takes a fifth of the time at most while
// wakes come without end, and that a single wake is answered at once.
func TestWakesLeaveTime(t *testing.T) {
	for took, most := range map[time.Duration]int{10 * time.Millisecond: 20, 100 * time.Millisecond: 3} {
		synctest.Test(t, func(t *testing.T) {
			busy := &thing{name: "busy", done: true, onPlan: func(context.Context) { time.Sleep(took) }}
			e, _, stop := run(t, busy)
			defer stop()
			settle(2 * time.Second)
			before := busy.planned()
			e.Wake("busy")
			settle(took)
			if busy.planned() != before+1 {
				t.Errorf("a plan of %s: not planned at once", took)
			}
			for range 1000 {
				e.Wake("busy")
				settle(time.Millisecond)
			}
			if n := busy.planned() - before - 1; n > most {
				t.Errorf("a plan of %s: %d in a second, want at most %d", took, n, most)
			}
		})
	}
}
