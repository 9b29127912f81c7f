package bench

import (
	"context"
	"runtime"
	"slices"
)

const (
	growthPods   = 50 // the first and the last of manyPods
	growthRounds = 5
)

// measureGrowth measures whether an ADD takes longer the more pods there are: of the
// pods that fill a node, the last ones against the first. The node is filled and
// emptied again and again, in seconds: within a minute the machine's own speed changes
// by more than what is looked for.
func measureGrowth(ctx context.Context, n *eniNode) error {
	// What a DEL gives back is not given again while the stage lasts.
	if err := n.startAttached(ctx, growthRounds*manyPods); err != nil {
		return err
	}
	ours, err := n.ourSide()
	if err != nil {
		return err
	}
	spare, err := newNamespaces(manyPods)
	if err != nil {
		return err
	}
	var first, last, growth []float64 // of each round
	for range growthRounds {
		pods := make([]*benchPod, manyPods)
		took := make([]float64, manyPods)
		for i, ns := range spare {
			pods[i] = ours.newPod(ns)
			if took[i], err = ours.add(ctx, pods[i]); err != nil {
				return err
			}
		}
		for _, p := range slices.Backward(pods) {
			if _, _, err := ours.del(ctx, p); err != nil {
				return err
			}
		}
		first = append(first, median(took[:growthPods]))
		last = append(last, median(took[manyPods-growthPods:]))
		growth = append(growth, last[len(last)-1]/first[len(first)-1])
	}
	n.figure(Figure{Name: "eni.add.growth", Unit: "ratio", Ours: round(median(growth)), Runs: growthRounds})
	n.say("%d pods: the last %d ADDs take %.1f ms, the first %.1f ms", manyPods, growthPods, median(last), median(first))
	runtime.KeepAlive(spare)
	return nil
}
