package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/node"
)

// formatted is what one side took for one disk.
type formatted struct {
	took                   float64 // ms
	wrote, discarded, read float64 // MiB
	steps                  map[string]float64
}

// steps of ours, in the order in which they are told. The cloud is asked while the
// disk is sampled.
var diskSteps = []string{"plan", "sample", "cloud", "format", "mount"}

// measureFormat has a blank disk formatted and mounted by either side, on a device
// that is held to what a Premium disk does or not.
func (n *diskNode) measureFormat(ctx context.Context, fs node.FileSystem, limited bool) error {
	name := "disk.format." + string(fs)
	if !limited {
		name = "disk.unlimited." + string(fs)
	} else if _, err := os.Stat(throttle); err != nil {
		n.say("%s is left out: a device is held to limits by the blkio controller of cgroup v1: %v", name, err)
		return nil
	}
	var times, wrote, discarded, read []Pair
	steps := map[string][]float64{}
	for i, serial := range n.sealed.Facts.DataDisks[:n.o.Runs] {
		sides := []func(context.Context, *cbs, node.FileSystem) (formatted, error){n.ours, n.peer}
		var found [2]formatted
		for k := range sides {
			side := (i + k) % 2 // either is the first one half of the time
			var err error
			if found[side], err = n.formatOne(ctx, serial, fs, limited, sides[side]); err != nil {
				return err
			}
		}
		a, b := found[0], found[1]
		times, wrote = append(times, Pair{a.took, b.took}), append(wrote, Pair{a.wrote, b.wrote})
		discarded, read = append(discarded, Pair{a.discarded, b.discarded}), append(read, Pair{a.read, b.read})
		rest := a.took
		for _, s := range diskSteps {
			steps[s] = append(steps[s], a.steps[s])
			if s != "cloud" {
				rest -= a.steps[s]
			}
		}
		steps["rest"] = append(steps["rest"], rest)
		n.say("pair %d of %d: %.0f ms, and the peer's %.0f ms", i+1, n.o.Runs, a.took, b.took)
	}
	n.figure(compare(name, "ms", DiskPeer, times))
	for _, s := range append(diskSteps, "rest") {
		n.figure(Figure{Name: name + "." + s, Unit: "ms", Ours: round(median(steps[s])), Runs: len(times)})
	}
	for _, io := range []struct {
		what  string
		pairs []Pair
	}{{"read", read}, {"written", wrote}, {"discarded", discarded}} {
		n.figure(amounts(name+"."+io.what, "MiB", io.pairs))
	}
	return nil
}

// formatOne attaches a blank disk for one side.
func (n *diskNode) formatOne(ctx context.Context, serial string, fs node.FileSystem, limited bool, side func(context.Context, *cbs, node.FileSystem) (formatted, error)) (formatted, error) {
	c, err := n.newDisk(serial)
	if err == nil {
		err = c.attach()
	}
	if err != nil {
		return formatted{}, err
	}
	defer os.Remove(c.file)
	if limited {
		if err := c.limit(true); err != nil {
			return formatted{}, err
		}
		defer c.limit(false)
	}
	if err := c.appear(); err != nil {
		return formatted{}, err
	}
	before, err := c.traffic()
	if err != nil {
		return formatted{}, err
	}
	found, err := side(ctx, c, fs)
	if err == nil {
		var t traffic
		t, err = c.traffic()
		const mib = 1 << 20
		found.wrote, found.discarded, found.read = float64(t.written-before.written)/mib, float64(t.discarded-before.discarded)/mib, float64(t.read-before.read)/mib
	}
	return found, errors.Join(err, c.detach(n.mountPoint(serial)))
}

func (n *diskNode) ours(ctx context.Context, c *cbs, fs node.FileSystem) (formatted, error) {
	d := n.module(c.serial, fs, true)
	defer d.Close()
	began := time.Now()
	p, err := d.Plan(ctx)
	if err != nil {
		return formatted{}, err
	}
	planned := time.Since(began)
	if err := d.Apply(ctx, p); err != nil {
		return formatted{}, err
	}
	took := time.Since(began)
	if left, err := d.Plan(ctx); err != nil || !left.Empty() {
		return formatted{}, fmt.Errorf("left after apply: %v%w", left, err)
	}
	st := d.State()
	if st.State != disk.Mounted {
		return formatted{}, fmt.Errorf("%s is %s: %s", c.serial, st.State, st.Message)
	}
	found := formatted{took: milliseconds(took), steps: map[string]float64{"plan": milliseconds(planned)}}
	for _, s := range st.Steps {
		found.steps[s.Name] = milliseconds(s.Ended.Sub(s.Began))
	}
	if _, read := found.steps["read"]; read {
		return formatted{}, fmt.Errorf("the cloud did not vouch for %s: %+v", c.serial, st.Evidence)
	}
	return found, nil
}

func (n *diskNode) peer(ctx context.Context, c *cbs, fs node.FileSystem) (formatted, error) {
	target := n.mountPoint(c.serial)
	if err := os.MkdirAll(target, 0o755); err != nil {
		return formatted{}, err
	}
	cmd := exec.CommandContext(ctx, n.o.Peer, "format", "/dev/"+c.name, target, string(fs))
	cmd.Stderr = n.logTo
	out, err := cmd.Output()
	if err != nil {
		return formatted{}, fmt.Errorf("run the peer: %w", err)
	}
	var answer struct{ Took time.Duration }
	if err := json.Unmarshal(out, &answer); err != nil {
		return formatted{}, fmt.Errorf("run the peer: %w", err)
	}
	return formatted{took: milliseconds(answer.Took)}, nil
}

// amounts compares what may be nothing: there is no ratio then.
func amounts(name, unit string, pairs []Pair) Figure {
	f := compare(name, unit, DiskPeer, pairs)
	if f.Peer == 0 {
		f.Ratio = 0
	}
	return f
}

// measureRead has a disk formatted for which the cloud does not vouch, so that every
// block of it is read.
func measureRead(ctx context.Context, n *diskNode) error {
	serial := n.sealed.Facts.DataDisks[0]
	c, err := n.newDisk(serial)
	if err == nil {
		err = errors.Join(c.attach())
	}
	if err == nil {
		err = c.appear()
	}
	if err != nil {
		return err
	}
	d := n.module(serial, node.Ext4, false)
	defer d.Close()
	for {
		p, err := d.Plan(ctx)
		if err == nil && p.Empty() {
			break
		}
		if err == nil {
			err = d.Apply(ctx, p)
		}
		if err != nil && node.ReasonOf(err, "") != "Proving" {
			return err
		}
		if st := d.State(); err != nil {
			n.say("%s", st.Message)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(p.Again):
		}
	}
	for _, s := range d.State().Steps {
		if s.Name == "read" {
			took := s.Ended.Sub(s.Began).Seconds()
			n.figure(Figure{Name: fmt.Sprintf("disk.read.%dGiB", newDiskGiB), Unit: "s", Ours: round(took), Runs: 1})
			n.figure(Figure{Name: "disk.read.rate", Unit: "MiB/s", Ours: round(newDiskGiB << 10 / took), Runs: 1})
		}
	}
	return c.detach(n.mountPoint(serial))
}
