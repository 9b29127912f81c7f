package unit

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// asker counts how often it is asked, and answers with that number.
type asker struct {
	asked int
	files string
	err   error
}

func (a *asker) ask(context.Context) (State, error) {
	a.asked++
	return State{Active: "active", ExitStatus: a.asked, Up: time.Minute, Files: a.files}, a.err
}

func TestStates(t *testing.T) {
	const unit = "containerd.service"
	synctest.Test(t, func(t *testing.T) {
		var s states
		a := asker{files: "d1935t"}
		want := func(n int, why string) State {
			t.Helper()
			st, err := s.of(t.Context(), unit, a.ask)
			if err != nil || st.ExitStatus != n || a.asked != n {
				t.Errorf("%s: answer %d of %d, %v; want %d", why, st.ExitStatus, a.asked, err, n)
			}
			return st
		}
		want(1, "first")
		want(2, "nobody tells of changes")
		s.told(true)
		want(3, "first since signals come")
		time.Sleep(2 * time.Second)
		if st := want(3, "remembered"); st.Up != time.Minute+2*time.Second {
			t.Errorf("a unit that is remembered for 2 s has been up for %s", st.Up)
		}
		s.forget("kubelet.service")
		want(3, "another one has changed")
		s.forget(unit)
		want(4, "it has changed")
		s.forget()
		want(5, "all may have changed")
		time.Sleep(stateAge)
		want(6, "too old")
		s.told(false)
		want(7, "signals come no more")
		s.told(true)
		a.err = errors.New("no answer")
		if _, err := s.of(t.Context(), unit, a.ask); err == nil {
			t.Error("the error is lost")
		}
		a.err = nil
		want(9, "after an error")
	})
}

// TestStatesNobodyTellsOf: what may change without a signal is asked for each time.
func TestStatesNobodyTellsOf(t *testing.T) {
	for _, c := range []struct{ why, unit, files string }{
		{"no signals of it are received", "sshd.service", "d1935t"},
		// Remembered for a second, it would look like a unit that runs with other files.
		{"its process has yet to be executed", "kubelet.service", ""},
	} {
		var s states
		s.told(true)
		a := asker{files: c.files}
		for n := range 2 {
			if st, err := s.of(t.Context(), c.unit, a.ask); err != nil || st.ExitStatus != n+1 {
				t.Errorf("%s: answer %d, %v; want %d", c.why, st.ExitStatus, err, n+1)
			}
		}
	}
}

// TestStateAskedForBeforeAChange: an answer that was under way when the unit
// changed answers who asked before, and nobody after.
func TestStateAskedForBeforeAChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s states
		s.told(true)
		s.forget()
		answer := make(chan int)
		ask := func(context.Context) (State, error) { return State{ExitStatus: <-answer}, nil }
		var old, same, fresh State
		var wg sync.WaitGroup
		get := func(to *State) { wg.Go(func() { *to, _ = s.of(t.Context(), "kubelet.service", ask) }); synctest.Wait() }
		get(&old)
		get(&same)
		s.forget("kubelet.service")
		get(&fresh)
		answer <- 1 // to the one or the other
		answer <- 2
		wg.Wait()
		if old != same || old == fresh {
			t.Errorf("before the change: %d and %d, after it: %d", old.ExitStatus, same.ExitStatus, fresh.ExitStatus)
		}
		var later State
		get(&later)
		if later != fresh {
			t.Errorf("remembered %d, not %d", later.ExitStatus, fresh.ExitStatus)
		}
	})
}

func TestStateOfWhoGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s states
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		release := make(chan struct{})
		defer close(release)
		_, err := s.of(ctx, "kubelet.service", func(context.Context) (State, error) { <-release; return State{}, nil })
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}

// TestSignals: who watches is told of its own units, from when signals come until
// they do no more.
func TestSignals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSystemd(nil)
		ctx, stop := context.WithCancel(t.Context())
		var told int
		ended := make(chan error, 1)
		watch := func() { ended <- s.Watch(ctx, []string{"kubelet.service"}, func() { told++ }) }
		want := func(n int, why string) {
			t.Helper()
			if synctest.Wait(); told != n {
				t.Errorf("%s: told %d times, want %d", why, told, n)
			}
		}
		go watch()
		want(0, "no signals yet")
		s.receiving(true)
		want(1, "signals come")
		s.signals.tell("kubelet.service")
		s.signals.tell("containerd.service")
		want(2, "one is for it")
		s.receiving(false)
		if err := <-ended; err == nil {
			t.Error("the loss is not told")
		}
		go watch()
		s.signals.tell("kubelet.service")
		want(2, "no signals again")
		s.receiving(true)
		want(3, "signals come again")
		stop()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// TestSignalsLostAtOnce: who waits for signals that come and are lost before it has
// noticed either waits for the next, or is told of the loss; it does not watch what
// nobody tells.
func TestSignalsLostAtOnce(t *testing.T) {
	for range 100 {
		synctest.Test(t, func(t *testing.T) {
			s := NewSystemd(nil)
			var told int
			ended := make(chan error, 1)
			go func() { ended <- s.Watch(t.Context(), []string{"kubelet.service"}, func() { told++ }) }()
			synctest.Wait()
			s.receiving(true)
			s.receiving(false)
			synctest.Wait()
			select {
			case <-ended:
				return
			default:
			}
			if told != 0 {
				t.Fatal("it watches although no signals come")
			}
			s.receiving(true)
			defer s.receiving(false)
			if synctest.Wait(); told != 1 {
				t.Fatalf("told %d times that signals come", told)
			}
		})
	}
}

// TestSignalsLostForgetsStates: who is told that signals were lost finds nothing
// that was remembered while they came.
func TestSignalsLostForgetsStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSystemd(nil)
		a := asker{files: "d1935t"}
		s.receiving(true)
		for range 2 {
			if _, err := s.states.of(t.Context(), "kubelet.service", a.ask); err != nil || a.asked != 1 {
				t.Fatalf("asked %d times, %v", a.asked, err)
			}
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := s.Watch(t.Context(), []string{"kubelet.service"}, func() {}); err == nil {
				t.Error("the loss is not told")
			}
			if _, err := s.states.of(t.Context(), "kubelet.service", a.ask); err != nil || a.asked != 2 {
				t.Errorf("asked %d times, %v", a.asked, err)
			}
		})
		synctest.Wait()
		s.receiving(false)
		wg.Wait()
	})
}

// TestSignalsDoNotCome: a bus that is ill for long is not asked, and told of, every
// second; after signals have come for long they are asked for again soon.
func TestSignalsDoNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithTimeout(t.Context(), 10*time.Minute)
		defer stop()
		began, calls := time.Now(), 0
		var lost time.Time
		NewSystemd(slog.New(slog.DiscardHandler)).keep(ctx, func(ctx context.Context) error {
			if calls++; !lost.IsZero() {
				if again := time.Since(lost); again > 2*time.Second {
					t.Errorf("asked for again %s after a loss", again)
				}
				stop()
			} else if time.Since(began) > 5*time.Minute {
				time.Sleep(time.Minute)
				lost = time.Now()
			}
			return errors.New("refused")
		})
		if calls < 10 || calls > 20 || lost.IsZero() {
			t.Errorf("asked %d times", calls)
		}
	})
}
