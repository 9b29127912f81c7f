package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

// ledger remembers what took how long until each instance first converged in
// this life of the agent.
type ledger struct {
	mu    sync.Mutex // guards steps
	steps []api.Step
}

// note takes down how the instances stand.
func (l *ledger) note(instances []reconcile.InstanceStatus) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, in := range instances {
		if in.State == reconcile.Starting || in.State == reconcile.Blocked {
			continue
		}
		s := l.step(in.Name, in.Since)
		if s.Ended.IsZero() && in.State == reconcile.Converged {
			s.Ended = in.Since
		}
	}
}

// step returns the named step, begun now if it is new. The caller holds mu.
func (l *ledger) step(name string, began time.Time) *api.Step {
	for i := range l.steps {
		if l.steps[i].Name == name {
			return &l.steps[i]
		}
	}
	l.steps = append(l.steps, api.Step{Name: name, Began: began})
	return &l.steps[len(l.steps)-1]
}

// boot returns the whole ledger: bootstrap's steps first, which it keeps in its
// report, then the agent's.
func (l *ledger) boot(report string) api.Boot {
	b := api.Boot{Began: kernelBegan(), Steps: []api.Step{}}
	if r, err := readReport(report); err == nil {
		for _, s := range r.Steps {
			b.Steps = append(b.Steps, api.Step{Name: "bootstrap/" + s.Name, Began: s.Began, Ended: s.Ended})
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	b.Steps = append(b.Steps, l.steps...)
	return b
}

// kernelBegan returns when the kernel started, by /proc/uptime (proc(5)).
func kernelBegan() time.Time {
	text, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return time.Time{}
	}
	first, _, _ := strings.Cut(string(text), " ")
	up, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return time.Time{}
	}
	return time.Now().Add(-time.Duration(up * float64(time.Second)))
}

func readReport(path string) (node.Report, error) {
	var r node.Report
	text, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("decode %s: %w", path, err)
	}
	return r, nil
}
