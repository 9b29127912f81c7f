//go:build kernel

package disk

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// The campaign breaks disks at random, by a seed. A small fixed part of it is in the
// kernel tier; make campaign-disk runs all of it, in episodes, and goes on where it
// was interrupted.
var (
	campaignFile   = flag.String("campaign", "", "file of results: run the whole campaign, but for the episodes that are in it")
	campaignSeed   = flag.Uint64("seed", 1, "of the first episode")
	campaignCommit = flag.String("commit", "", "what is tested")
)

// outcome is one line of the file of results: an episode that has passed.
type outcome struct {
	Part    string             `json:"part"`
	Seed    uint64             `json:"seed"`
	Commit  string             `json:"commit"`
	Date    string             `json:"date"`
	Figures map[string]float64 `json:"figures"`
}

// episode is one run of a part of the campaign.
type episode struct {
	*testing.T
	*rand.Rand
	whole   bool // of the campaign, and not only its fixed part
	figures map[string]float64
}

// episodes runs a part of the campaign: once, or as often as the whole campaign does.
func episodes(t *testing.T, part string, times int, f func(e *episode)) {
	whole := *campaignFile != ""
	if !whole {
		times = 1
	}
	done := readOutcomes(t)
	for i := range times {
		seed := *campaignSeed + uint64(i)
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			if slices.ContainsFunc(done, func(o outcome) bool { return o.Part == part && o.Seed == seed && o.Commit == *campaignCommit }) {
				t.Logf("has passed before")
				return
			}
			e := &episode{T: t, Rand: rand.New(rand.NewPCG(seed, 0)), whole: whole, figures: map[string]float64{}}
			began := time.Now()
			f(e)
			e.figures["seconds"] = float64(time.Since(began).Round(time.Second) / time.Second)
			if !t.Failed() && whole {
				writeOutcome(t, outcome{part, seed, *campaignCommit, time.Now().UTC().Format(time.DateOnly), e.figures})
			}
		})
	}
}

func readOutcomes(t *testing.T) (all []outcome) {
	text, err := os.ReadFile(*campaignFile)
	if err != nil && *campaignFile != "" && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var o outcome
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			t.Fatalf("%s: %v", *campaignFile, err)
		}
		all = append(all, o)
	}
	return all
}

func writeOutcome(t *testing.T, o outcome) {
	line, err := json.Marshal(o)
	must(t, err)
	f, err := os.OpenFile(*campaignFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	must(t, err)
	_, err = f.Write(append(line, '\n'))
	must(t, err)
	must(t, f.Close())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// turn has a module plan and apply once. One that does not come back has failed,
// whatever becomes of the disk.
func turn(ctx context.Context, t *testing.T, d *Disk) (planned string, err error) {
	t.Helper()
	return await(t, begin(ctx, d))
}

// begin has a module plan and apply beside the test, which awaits it.
func begin(ctx context.Context, d *Disk) <-chan turned {
	done := make(chan turned, 1)
	go func() {
		p, err := d.Plan(ctx)
		if err == nil {
			err = d.Apply(ctx, p)
		}
		done <- turned{p.String(), err}
	}()
	return done
}

type turned struct {
	planned string
	err     error
}

func await(t *testing.T, done <-chan turned) (planned string, err error) {
	t.Helper()
	select {
	case r := <-done:
		return r.planned, r.err
	case <-time.After(2 * time.Minute):
		stacks := make([]byte, 1<<20)
		t.Fatalf("the module hangs:\n%s", stacks[:runtime.Stack(stacks, true)])
		return "", nil
	}
}
