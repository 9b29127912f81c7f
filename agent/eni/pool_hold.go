package eni

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// How long a refused call is not made again: doubled with every refusal, from the
// first to the second. The limits of throttling are of a second; a subnet gets
// addresses when pods end somewhere, and all the nodes of a cluster ask for them.
var (
	throttlePause = [2]time.Duration{time.Second, time.Minute}
	subnetPause   = [2]time.Duration{10 * time.Second, 5 * time.Minute}
	otherPause    = [2]time.Duration{time.Second, 30 * time.Second}
)

// hold is a call that the cloud has refused, and that is not made before a time.
type hold struct {
	err          error // the last refusal
	count        int
	since, until time.Time
}

// What a hold is on: all calls of a kind, the addresses of a subnet, or a slot.
func throttleKey(step Step) string { return "calls to " + string(step) }
func subnetKey(id string) string   { return "addresses of " + id }
func (p *slotPlan) key() string    { return slotKey(p.slot.Number) }
func slotKey(number int) string    { return fmt.Sprintf("slot %d", number) }
func (st poolStep) keys() [3]string {
	return [3]string{throttleKey(st.call), subnetKey(st.subnet), slotKey(st.slot.Number)}
}

// holdError says why a call is not made now, and when it will be.
type holdError struct {
	hold
	on string
}

func (e *holdError) Error() string {
	return fmt.Sprintf("%s: refused %d times since %s, next try at %s: %v", e.on, e.count,
		e.since.UTC().Format(time.TimeOnly), e.until.UTC().Format(time.TimeOnly), e.err)
}

func (e *holdError) Unwrap() error { return e.err }

// refusal returns why something cannot be asked for now; its class is waiting.
func (v cloudView) refusal(keys ...string) error {
	for _, k := range keys {
		if h, ok := v.holds[k]; ok && h.until.After(v.now) {
			return &node.Error{Class: node.ClassWaiting, Reason: node.ReasonOf(h.err, "Refused"), Err: &holdError{h, k}}
		}
	}
	return nil
}

func holdIn(err error) (hold, bool) {
	if h, ok := errors.AsType[*holdError](err); ok {
		return h.hold, true
	}
	return hold{}, false
}

// refuse notes that the cloud has refused a step, and reports whether that is all
// there is to do about it: the step is planned again when the hold ends. The
// caller holds mu.
func (p *Pool) refuse(st poolStep, err error, now time.Time) bool {
	keys := st.keys()
	key, pause := keys[2], otherPause
	switch {
	case node.ClassOf(err) == node.ClassTerminal && !st.slot.exclusive(): // which others do without
		return false
	case node.ReasonOf(err, "") == "Throttled":
		key, pause = keys[0], throttlePause
	case hasCode(err, tencent.CodeSubnetExhausted):
		key, pause = keys[1], subnetPause
	}
	h := p.holds[key]
	if h.count == 0 {
		h.since = now
		p.network.log.Warn("cloud refuses", "step", st.text, "err", err)
	}
	d := min(pause[0]<<min(h.count, 16), pause[1])
	h.err, h.count = err, h.count+1
	// A fleet that is throttled together must not come back together.
	h.until = now.Add(d + rand.N(d/4))
	p.holds[key] = h
	return true
}

// granted ends what held the step up. The caller holds mu.
func (p *Pool) granted(st poolStep) {
	for _, k := range st.keys() {
		delete(p.holds, k)
	}
}

// forgetHolds drops what was held up so long ago that it says nothing any more.
// The caller holds mu.
func (p *Pool) forgetHolds(now time.Time) {
	maps.DeleteFunc(p.holds, func(_ string, h hold) bool { return now.Sub(h.until) > 2*subnetPause[1] })
}

func hasCode(err error, codes ...string) bool {
	e, ok := errors.AsType[*tencent.APIError](err)
	if !ok {
		return false
	}
	for _, c := range codes {
		if e.HasCode(c) {
			return true
		}
	}
	return false
}
