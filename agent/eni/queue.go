package eni

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

const (
	// sweepPeriod is how often the queue and the runtime are looked at.
	sweepPeriod = time.Minute
	// unknownFor is how long the runtime must not have known a pod's sandbox, at
	// every look in between, before the pod is removed. kubelet gives the making of a
	// sandbox 4 min (runtimeRequestTimeout is 2 min, for two calls).
	unknownFor = 5 * time.Minute
	// sandboxTimeout bounds one answer of the runtime.
	sandboxTimeout = 10 * time.Second
)

// drain carries out the DELs that came while no agent answered.
func (n *Network) drain() {
	err := n.queue.Drain(func(d cni.Deletion) error {
		if err := validate(cni.Request{Command: cni.Del, Attachment: d.Attachment}); err != nil {
			n.log.Warn("queued DEL is passed over", "err", err)
			return nil
		}
		pod, ok, err := n.ledger.pod(d.Attachment)
		if err != nil || !ok {
			return err
		}
		if pod.Since.After(d.At) && !pod.Found {
			return nil // it was added again since
		}
		if err := n.del(d.Attachment); err != nil {
			return err
		}
		n.log.Info("queued DEL carried out", "pod", pod.String(), "container", pod.ContainerID, "addr", pod.Addr, "asked", d.At)
		return nil
	})
	if err != nil {
		n.log.Warn("drain queued DELs", "err", err)
	}
	if err := n.paths.reap(); err != nil {
		n.log.Warn("remove veths of queued DELs", "err", err)
	}
}

// sweep drains the queue and removes pods that the runtime has lost, until ctx
// ends. containerd has no call of GC: https://github.com/containerd/go-cni/pull/131
func (n *Network) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.drain()
		if err := n.collect(ctx, time.Now()); err != nil {
			n.log.Warn("garbage collection", "err", err)
		}
	}
}

// lost remembers since when the runtime has not known the sandboxes of pods.
type lost map[cni.Attachment]time.Time

// judge takes one answer of the runtime in and returns the pods that it has not
// known for long enough. A runtime that knows nothing at all has lost its own
// store, not every pod: of that it says nothing.
func (l lost) judge(pods []Pod, known map[string]bool, now time.Time) []Pod {
	if len(known) == 0 {
		clear(l)
		return nil
	}
	var out []Pod
	for _, p := range pods {
		switch since, missed := l[p.Attachment]; {
		case known[p.ContainerID]:
			delete(l, p.Attachment)
		case !missed:
			l[p.Attachment] = now
		case now.Sub(since) >= unknownFor && now.Sub(p.Since) >= unknownFor:
			out = append(out, p)
		}
	}
	for a := range l { // that ended otherwise
		if !slices.ContainsFunc(pods, func(p Pod) bool { return p.Attachment == a }) {
			delete(l, a)
		}
	}
	return out
}

// collect removes the pods that the runtime does not know any more. One whose
// network namespace still has processes stays, whatever the runtime says.
func (n *Network) collect(ctx context.Context, now time.Time) error {
	if n.sandboxes == nil {
		return nil
	}
	s, err := n.ledger.state()
	if err != nil || len(s.Pods) == 0 {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, sandboxTimeout)
	defer cancel()
	known, err := n.sandboxes(ctx)
	if err != nil {
		clear(n.lost) // what was missed before proves nothing about the time between
		return fmt.Errorf("ask the runtime for its sandboxes: %w", err)
	}
	for _, p := range n.lost.judge(s.pods(), known, now) {
		who, err := inhabitant(p.NetNS)
		if err != nil {
			return fmt.Errorf("look for processes of pod %s: %w", p, err)
		}
		if who != 0 {
			n.log.Warn("the runtime does not know a pod whose processes run; nothing is removed",
				"pod", p.String(), "container", p.ContainerID, "addr", p.Addr, "pid", who)
			continue
		}
		if err := n.del(p.Attachment); err != nil {
			return fmt.Errorf("remove pod %s: %w", p, err)
		}
		n.log.Info("garbage collected: the runtime does not know the sandbox", "pod", p.String(),
			"container", p.ContainerID, "addr", p.Addr, "since", n.lost[p.Attachment])
	}
	return n.paths.reap()
}
