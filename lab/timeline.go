package lab

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// Step is one step of a launch, in the order in which a person thinks of them.
type Step string

// The steps of a launch, from power-on until the Node is Ready.
const (
	PowerOn      Step = "power on"
	Kernel       Step = "kernel"
	Metadata     Step = "metadata asked"
	ConfigSealed Step = "config sealed"
	DiskMounted  Step = "disk mounted"
	ContainerdUp Step = "containerd up"
	ENIReady     Step = "ENI ready"
	TLSBootstrap Step = "TLS bootstrap"
	KubeletUp    Step = "kubelet up"
	NodeReady    Step = "Node Ready"
)

// Steps lists them all.
var Steps = []Step{PowerOn, Kernel, Metadata, ConfigSealed, DiskMounted, ContainerdUp, ENIReady, TLSBootstrap, KubeletUp, NodeReady}

// conditionSteps are the steps that the agent tells of on the console.
var conditionSteps = map[node.ConditionType]Step{
	node.ConfigSealed: ConfigSealed,
	node.DisksReady:   DiskMounted,
	node.RuntimeReady: ContainerdUp,
	node.NetworkReady: ENIReady,
	node.NodeJoined:   TLSBootstrap,
	node.KubeletReady: KubeletUp,
}

// Mark is when a step was reached, as seen from outside of the machine.
type Mark struct {
	Step Step          `json:"step"`
	At   time.Time     `json:"at"`
	Took time.Duration `json:"took"` // since power-on
}

// Timeline is how far a launch is.
type Timeline struct {
	mu      sync.Mutex // guards the rest
	marks   []Mark
	changed chan struct{} // closed and replaced at every mark
}

func newTimeline() *Timeline { return &Timeline{changed: make(chan struct{})} }

// mark takes down that a step is reached; only the first time counts.
func (t *Timeline) mark(s Step) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if slices.ContainsFunc(t.marks, func(m Mark) bool { return m.Step == s }) {
		return
	}
	m := Mark{Step: s, At: time.Now()}
	if len(t.marks) > 0 {
		m.Took = m.At.Sub(t.marks[0].At)
	}
	t.marks = append(t.marks, m)
	close(t.changed)
	t.changed = make(chan struct{})
}

// Marks returns the steps that were reached, in the order in which they were, and
// a channel that is closed at the next one.
func (t *Timeline) Marks() ([]Mark, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.marks), t.changed
}

// Wait waits until the step is reached.
func (t *Timeline) Wait(ctx context.Context, s Step) (Mark, error) {
	for {
		marks, changed := t.Marks()
		if i := slices.IndexFunc(marks, func(m Mark) bool { return m.Step == s }); i >= 0 {
			return marks[i], nil
		}
		select {
		case <-ctx.Done():
			return Mark{}, context.Cause(ctx)
		case <-changed:
		}
	}
}

// readLine marks what a line of the serial console tells.
func (t *Timeline) readLine(line string) {
	if strings.Contains(line, "Linux version ") {
		t.mark(Kernel)
		return
	}
	for c, step := range conditionSteps {
		if strings.Contains(line, string(c)+" is True") {
			t.mark(step)
		}
	}
}
