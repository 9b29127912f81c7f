package bench

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/lab"
)

// step is one step of a boot.
type step struct {
	name        string
	start, took float64 // seconds, start since power-on
}

// readSteps asks a node what took how long: it runs the command there and reads
// its output. Times begin with the kernel.
type readSteps struct {
	command string
	read    func(out string) ([]step, error)
}

// ourSteps asks the agent.
var ourSteps = readSteps{"tkenode boot -o json", func(out string) ([]step, error) {
	var b api.Boot
	if err := json.Unmarshal([]byte(out), &b); err != nil {
		return nil, fmt.Errorf("decode boot ledger: %w", err)
	}
	var steps []step
	for _, s := range b.Steps {
		if s.Ended.IsZero() { // what Ready does not wait for may go on
			continue
		}
		steps = append(steps, step{s.Name, s.Began.Sub(b.Began).Seconds(), s.Ended.Sub(s.Began).Seconds()})
	}
	return steps, nil
}}

// unitSteps asks systemd, which knows when units began to start and had started.
var unitSteps = readSteps{
	"systemctl show --property=Id,InactiveExitTimestampMonotonic,ActiveEnterTimestampMonotonic " +
		"systemd-networkd-wait-online var-lib-containerd.mount containerd kubelet",
	func(out string) ([]step, error) {
		var steps []step
		for block := range strings.SplitSeq(strings.TrimSpace(out), "\n\n") {
			values := map[string]string{}
			for line := range strings.Lines(block) {
				key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
				values[key] = value
			}
			began, err := strconv.ParseFloat(values["InactiveExitTimestampMonotonic"], 64)
			if err != nil {
				return nil, fmt.Errorf("read start of unit %q: %w", values["Id"], err)
			}
			active, err := strconv.ParseFloat(values["ActiveEnterTimestampMonotonic"], 64)
			if err != nil {
				return nil, fmt.Errorf("read start of unit %q: %w", values["Id"], err)
			}
			if active < began { // it has not started
				continue
			}
			const micro = 1e-6
			steps = append(steps, step{values["Id"], began * micro, (active - began) * micro})
		}
		return steps, nil
	},
}

// clock asks for the time, and for how long the kernel has run.
const clock = "date +%s.%N; cut -d' ' -f1 /proc/uptime; "

// steps returns the ledger of a node that is Ready, by when the steps began.
func (b *boot) steps(ctx context.Context, c *lab.CVM, r readSteps, ready lab.Mark) ([]step, error) {
	out, err := b.Lab.SSH(ctx, c.IP, clock+r.command)
	if err != nil {
		return nil, err
	}
	now, up, out, err := readClock(out)
	if err != nil {
		return nil, err
	}
	steps, err := r.read(out)
	if err != nil {
		return nil, err
	}
	// Both clocks tell the right time: the node's by the VPC's NTP server.
	powerOn := ready.At.Add(-ready.Took)
	kernel := now - up - float64(powerOn.UnixMicro())*1e-6
	return fromPowerOn(steps, kernel, ready.Took.Seconds()), nil
}

func readClock(out string) (now, up float64, rest string, err error) {
	first, rest, _ := strings.Cut(out, "\n")
	second, rest, _ := strings.Cut(rest, "\n")
	now, err = strconv.ParseFloat(first, 64)
	if err == nil {
		up, err = strconv.ParseFloat(second, 64)
	}
	if err != nil {
		return 0, 0, "", fmt.Errorf("read the node's clock: %w", err)
	}
	return now, up, rest, nil
}

// fromPowerOn shifts steps that were timed from the start of the kernel, and adds
// the two that no node can know of.
func fromPowerOn(steps []step, kernel, ready float64) []step {
	all := []step{{"boot loader", 0, kernel}}
	last := 0.0
	for _, s := range steps {
		s.start += kernel
		all = append(all, s)
		if end := s.start + s.took; end < ready {
			last = max(last, end)
		}
	}
	slices.SortStableFunc(all, func(a, b step) int { return cmp.Compare(a.start, b.start) })
	// From the last step that had ended until the API server called the Node Ready.
	return append(all, step{"Node Ready", last, ready - last})
}

// ledger writes steps as figures.
func ledger(prefix string, steps []step) []Figure {
	var figures []Figure
	for _, s := range steps {
		start := round(s.start)
		figures = append(figures, Figure{Name: prefix + s.name, Unit: "s", Start: &start, Ours: round(s.took)})
	}
	return figures
}
