package eni

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/tkenode/tkenode/agent/node"
)

// fightCase is what happens, in order, to a node with one rule and one route.
type fightCase struct {
	Events []fightEvent `json:"events"`
}

// fightEvent happens once, or Times times, Every so often.
type fightEvent struct {
	At    node.Duration `json:"at"`
	Every node.Duration `json:"every"`
	Times int           `json:"times"`

	Blame  string `json:"blame"`  // a kind of object: somebody changes one
	Repair string `json:"repair"` // rule or route
	Drop   string `json:"drop"`   // the same
	Unplug bool   `json:"unplug"` // the route is not wanted now
	Look   bool   `json:"look"`
}

// TestFight: what is repaired again and again is told, and when it is over.
func TestFight(t *testing.T) {
	golden(t, "testdata/fight-*.txtar", func(c fightCase, a *txtar.Archive) string {
		objects := map[string]object{"rule": rule{priority: podPriority, table: podTable}, "route": route{table: slotTable, dev: "eth1"}}
		start := time.Date(2026, 1, 2, 3, 0, 0, 0, time.UTC)
		var f fights
		var out strings.Builder
		for _, e := range c.Events {
			for i := range max(e.Times, 1) {
				at := time.Duration(e.At) + time.Duration(i)*time.Duration(e.Every)
				now := start.Add(at)
				switch {
				case e.Blame != "":
					f.blame(e.Blame, culprit{"systemd-network", 812, now})
				case e.Repair != "":
					f.repaired(objects[e.Repair], false, now)
				case e.Drop != "":
					f.repaired(objects[e.Drop], true, now)
				case e.Unplug:
					f.want([]object{objects["rule"]})
				}
				told, changed := f.news(now)
				switch {
				case told == nil && (e.Look || changed):
					fmt.Fprintf(&out, "%s: nothing\n", at)
				case e.Look || changed:
					fmt.Fprintf(&out, "%s: since %s: %s\n", at, told.Since.Format(time.TimeOnly), told.Message)
				}
			}
		}
		return out.String()
	})
}
