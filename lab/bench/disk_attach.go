package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

// disksAtOnce are how many formatted disks appear at once.
var disksAtOnce = []int{1, 5, 10, 20}

// measureAttach measures how long it takes from the kernel's word that a disk is
// there until it is mounted, of disks that were formatted before, by the engine as
// it runs on a node.
func measureAttach(ctx context.Context, n *diskNode) error {
	var all []*cbs
	for _, serial := range n.sealed.Facts.DataDisks {
		c, err := n.newDisk(serial)
		if err == nil {
			err = c.attach()
		}
		if err == nil {
			err = c.appear()
		}
		if err == nil {
			_, err = n.ours(ctx, c, node.Ext4)
		}
		if err == nil {
			err = c.detach(n.mountPoint(serial))
		}
		if err != nil {
			return err
		}
		all = append(all, c)
	}
	n.say("%d disks are formatted", len(all))
	for _, count := range disksAtOnce {
		var each, last, mounting []float64
		for range n.o.Runs {
			took, mounts, err := n.attachAll(ctx, all[:count])
			if err != nil {
				return err
			}
			each, last, mounting = append(each, took...), append(last, slices.Max(took)), append(mounting, mounts...)
		}
		name := fmt.Sprintf("disk.attach.%d", count)
		n.figure(Figure{Name: name + ".p50", Unit: "ms", Ours: round(median(each)), Runs: len(each)})
		n.figure(Figure{Name: name + ".p99", Unit: "ms", Ours: round(percentile(each, 99)), Runs: len(each)})
		n.figure(Figure{Name: name + ".mount", Unit: "ms", Ours: round(median(mounting)), Runs: len(mounting)})
		n.figure(Figure{Name: name + ".last", Unit: "ms", Ours: round(median(last)), Runs: n.o.Runs})
	}
	return nil
}

// attachAll lets disks appear at once beside a running engine, and returns for each
// how long it took until it was mounted, and how long of that was the mounting itself.
func (n *diskNode) attachAll(ctx context.Context, disks []*cbs) (took, mounts []float64, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var modules []reconcile.Module
	for _, c := range disks {
		modules = append(modules, n.module(c.serial, node.Ext4, false))
	}
	board := reconcile.NewBoard()
	board.Set("bench", node.ConfigSealed, node.True, "Sealed", "")
	engine := reconcile.New(n.log, board, modules...)
	ectx, stop := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { engine.Run(ectx) })
	defer func() {
		stop()
		running.Wait()
		for _, m := range modules {
			m.(*disk.Disk).Close()
		}
	}()
	for _, c := range disks {
		if err := c.attach(); err != nil {
			return nil, nil, err
		}
	}
	// Each has looked, and waits for its disk.
	for slices.ContainsFunc(engine.Status(), func(s reconcile.InstanceStatus) bool { return s.Reason != "Absent" }) {
		select {
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
	type result struct {
		at  map[string]time.Time
		err error
	}
	mounted := make(chan result, 1)
	go func() {
		at, err := n.watchMounts(ctx, disks)
		mounted <- result{at, err}
	}()
	began := map[string]time.Time{}
	for _, c := range disks {
		began[c.serial] = time.Now()
		if err := errors.Join(c.appear(), c.announce()); err != nil {
			cancel()
			<-mounted
			return nil, nil, err
		}
	}
	end := <-mounted
	if end.err != nil {
		return nil, nil, end.err
	}
	for _, c := range disks {
		took = append(took, milliseconds(end.at[c.serial].Sub(began[c.serial])))
	}
	stop()
	running.Wait()
	for _, m := range modules {
		for _, s := range m.(*disk.Disk).State().Steps {
			if s.Name == "mount" {
				mounts = append(mounts, milliseconds(s.Ended.Sub(s.Began)))
			}
		}
	}
	for _, c := range disks {
		err = errors.Join(err, c.detach(n.mountPoint(c.serial)))
	}
	return took, mounts, err
}

// watchMounts returns when each of the disks was mounted.
func (n *diskNode) watchMounts(ctx context.Context, disks []*cbs) (map[string]time.Time, error) {
	// Not by os.Open: the runtime would poll the file, too.
	info, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(info)
	at := map[string]time.Time{}
	for {
		now := time.Now()
		text, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return nil, err
		}
		for _, c := range disks {
			if _, seen := at[c.serial]; !seen && strings.Contains(string(text), " "+n.mountPoint(c.serial)+" ") {
				at[c.serial] = now
			}
		}
		if len(at) == len(disks) {
			return at, nil
		}
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(info), Events: unix.POLLPRI}}, 100); err != nil && !errors.Is(err, unix.EINTR) {
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%d of %d disks were mounted: %w", len(at), len(disks), ctx.Err())
		}
	}
}
