package bootstrap

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"

	"github.com/tkenode/tkenode/agent/node"
)

// When a wait is spoken of: after a while for the first time, since most are
// short, and then ever more rarely.
const (
	firstWord   = 5 * time.Second
	longestHush = 10 * time.Minute
)

// ledger keeps the report on disk, and tells the journal and the console what is
// new in it. The console's lines are for reading at a glance: who, what, how long.
type ledger struct {
	o      Options
	report node.Report
	file   string
	sealed node.Sealed

	waitSince time.Time       // the wait under way began then; zero: none is
	nextWord  time.Duration   // how old it must be to be spoken of again
	spoken    map[string]bool // kinds of causes that were spoken of
	lastWord  time.Time
}

func newLedger(o Options) *ledger {
	l := &ledger{o: o, file: filepath.Join("/", o.Root, node.ReportFile)}
	l.report.Steps, l.report.PID = []node.ReportStep{}, os.Getpid()
	if err := os.MkdirAll(filepath.Dir(l.file), 0o755); err != nil {
		o.Log.Error("report is not written", "err", err)
	}
	return l
}

// say writes one line for humans.
func (l *ledger) say(format string, args ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		fmt.Fprintf(l.o.Console, "tkenode: %s\n", clean(strings.TrimSuffix(line, "\n")))
	}
}

// clean replaces what could drive the terminal that shows a text: servers and
// users have a say in it.
func clean(text string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && !unicode.IsPrint(r) {
			return '�'
		}
		return r
	}, text)
}

// step carries out one step, and enters it.
func (l *ledger) step(name string, do func() error) error {
	began := time.Now()
	l.report.Steps = append(l.report.Steps, node.ReportStep{Name: name, Began: began})
	l.enter(name, began, nil)
	err := do()
	if err == nil {
		l.report.Steps[len(l.report.Steps)-1].Ended = time.Now()
		l.o.Log.Info("step done", "step", name, "took", time.Since(began))
		l.write()
	}
	return err
}

// enter puts phase and error into the report.
func (l *ledger) enter(phase string, since time.Time, err error) {
	l.report.Phase, l.report.Since = phase, since
	l.report.Class, l.report.Reason, l.report.Message = "", "", ""
	if err != nil {
		l.report.Class, l.report.Reason, l.report.Message = node.ClassOf(err).String(), node.ReasonOf(err, ReasonState), clean(err.Error())
	}
	l.write()
}

// waiting is told the reason after each attempt of a wait. The report has the last
// one; journal and console are told when the cause is one that they have not heard
// of, and when the wait has grown.
func (l *ledger) waiting(err error) {
	if l.waitSince.IsZero() {
		l.waitSince, l.nextWord, l.spoken = time.Now(), firstWord, map[string]bool{}
	}
	l.enter(l.report.Phase, l.waitSince, err)
	age, kind := time.Since(l.waitSince), kindOf(err)
	unheard := !l.spoken[kind] && len(l.spoken) < maxKinds && age >= firstWord && time.Since(l.lastWord) >= firstWord
	if age < l.nextWord && !unheard {
		return
	}
	for l.nextWord <= age {
		l.nextWord += min(l.nextWord, longestHush)
	}
	l.spoken[kind], l.lastWord = true, time.Now()
	l.o.Log.Warn("waiting", "step", l.report.Phase, "reason", l.report.Reason, "since", l.waitSince, "err", err)
	l.say("waiting for %s: %v", age.Round(time.Second), err)
}

// maxKinds bounds how many causes of one wait are news.
const maxKinds = 8

// kindOf is what two errors of one kind have in common: the innermost cause,
// without times and port numbers.
func kindOf(err error) string {
	for inner := err; inner != nil; inner = errors.Unwrap(inner) {
		err = inner
	}
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, err.Error())
}

// waited ends a wait; err is why in vain.
func (l *ledger) waited(err error) {
	if len(l.spoken) > 0 && err == nil {
		l.say("%s is over, after %s", l.report.Reason, time.Since(l.waitSince).Round(time.Second))
	}
	if l.waitSince.IsZero() {
		return
	}
	l.waitSince, l.spoken = time.Time{}, nil
	l.enter(l.report.Phase, time.Now(), nil)
}

// confirm enters which sealed configuration is this instance's own.
func (l *ledger) confirm(s node.Sealed) {
	l.sealed = s
	l.report.Digest = s.Digest
	l.write()
}

// end enters how it all ended.
func (l *ledger) end(err error) {
	if err == nil {
		l.report.Done = true
		l.enter("done", time.Now(), nil)
		l.o.Log.Info("joined", "generation", l.sealed.Generation, "node", l.sealed.Config.Name(l.sealed.Facts))
		l.say("node %s of %s: joined, generation %d", l.sealed.Config.Name(l.sealed.Facts), l.sealed.Config.Cluster.ID, l.sealed.Generation)
		return
	}
	phase := l.report.Phase
	l.enter(phase, time.Now(), err)
	l.o.Log.Error("not joined", "step", phase, "class", l.report.Class, "reason", l.report.Reason, "err", err)
	l.say("NOT JOINED, stopped at %s: %s", phase, l.report.Reason)
	l.say("%v", err)
}

// write replaces the report. One that cannot be written is worth a line, and no
// reason to stop.
func (l *ledger) write() {
	b, err := json.MarshalIndent(l.report, "", "  ")
	if err == nil {
		err = writeFile(l.file, append(b, '\n'), 0o644)
	}
	if err != nil {
		l.o.Log.Error("report is not written", "err", err)
	}
}
