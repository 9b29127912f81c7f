package disk

import (
	"fmt"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// inventory is what is known of an instance's disks when selectors are resolved.
type inventory struct {
	Instance tencent.Instance `json:"instance"` // cvm DescribeInstances
	Disks    []tencent.Disk   `json:"disks"`    // cbs DescribeDisks, in any order
	// Listed are the ids that the metadata service listed when the configuration was
	// sealed. Empty: it listed none.
	Listed []string `json:"listed,omitempty"`
	// Used says of disks that somebody else uses already, by whom, by id.
	Used map[string]string `json:"used,omitempty"`
}

// candidate is a data disk that a selector may mean.
type candidate struct {
	id       string
	kind     string
	sizeGiB  int64
	listed   bool // in the instance's DataDisks, in the order of which candidates are
	snapshot string
	by       string // who has it already; empty: it is free
}

func (c candidate) String() string {
	text := fmt.Sprintf("%s (%s, %d GiB", c.id, c.kind, c.sizeGiB)
	if c.snapshot != "" {
		text += ", made from " + c.snapshot
	}
	if c.by != "" {
		text += ", " + c.by
	}
	return text + ")"
}

func (c candidate) fits(s node.DiskSelector) bool {
	return (s.Type == "" || s.Type == c.kind) && (s.SizeGiB == 0 || int64(s.SizeGiB) == c.sizeGiB)
}

func describeSelector(s node.DiskSelector) string {
	var parts []string
	if s.Type != "" {
		parts = append(parts, "type "+s.Type)
	}
	if s.SizeGiB > 0 {
		parts = append(parts, fmt.Sprintf("sizeGiB %d", s.SizeGiB))
	}
	if s.Order > 0 {
		parts = append(parts, fmt.Sprintf("order %d", s.Order))
	}
	return strings.Join(parts, ", ")
}

const fixSelector = "narrow disks[].selector in the NodeConfig, or set disks[].diskID"

// resolve decides for all entries at once which disk each selector means, and returns
// the bindings that are new. Those that are there already stand, whatever is listed.
// Nothing is guessed: where more than one answer is possible, none is given.
func resolve(all []node.DiskConfig, bound []binding, have inventory) ([]binding, error) {
	taken := map[string]string{} // by id: who has it
	for id, by := range have.Used {
		taken[id] = by
	}
	// A disk that was found once is kept for its mount point, listed there or not.
	for _, b := range bound {
		taken[b.DiskID] = "bound to " + b.MountPoint
	}
	for _, e := range all {
		for _, id := range e.IDs() {
			taken[id] = "named for " + e.MountPoint
		}
	}
	var open []node.DiskConfig
	for _, e := range all {
		if _, ok := bindingOf(bound, e.MountPoint); !ok && e.DiskID == "" && e.Selector != (node.DiskSelector{}) {
			open = append(open, e)
		}
	}
	candidates, err := candidates(have, taken)
	if err != nil {
		return nil, err
	}
	answers := make([]binding, len(open))
	for i, e := range open {
		if e.Selector.Order == 0 {
			continue
		}
		c, source, err := ordered(e, candidates, have.Instance)
		if err != nil {
			return nil, err
		}
		if c.by != "" {
			return nil, node.Terminal("Ambiguous", fixSelector, fmt.Errorf("%s means %s", whose(e), *c))
		}
		c.by = "bound to " + e.MountPoint
		answers[i] = binding{MountPoint: e.MountPoint, Selector: e.Selector, DiskID: c.id, Source: source}
	}
	return answers, unordered(open, candidates, answers)
}

func whose(e node.DiskConfig) string {
	return fmt.Sprintf("the selector of %s (%s)", e.MountPoint, describeSelector(e.Selector))
}

// candidates lists the data disks that a selector may mean: those in the instance's
// DataDisks in that order, then the others by id.
func candidates(have inventory, taken map[string]string) ([]candidate, error) {
	in := have.Instance
	find := func(id string) (tencent.Disk, bool) {
		i := slices.IndexFunc(have.Disks, func(d tencent.Disk) bool { return d.ID == id })
		if i < 0 {
			return tencent.Disk{}, false
		}
		return have.Disks[i], true
	}
	listed := have.Listed
	if len(listed) == 0 {
		for _, d := range have.Disks {
			listed = append(listed, d.ID)
		}
	}
	listed = slices.Compact(slices.Sorted(slices.Values(listed)))
	place := func(id string) int {
		return slices.IndexFunc(in.DataDisks, func(d tencent.DataDisk) bool { return d.ID == id })
	}
	var all, rest []candidate
	for _, id := range listed {
		d, ok := find(id)
		switch {
		case !diskID.MatchString(id): // a local disk
			continue
		case !ok, d.InstanceID != in.ID, d.State != tencent.DiskAttached:
			return nil, node.Waiting("Unsettled", "the metadata service lists %s, and cbs DescribeDisks says of it: state %s, attached to %s; disks[].selector is resolved once they agree",
				id, word(d.State), word(d.InstanceID))
		case d.Usage == tencent.DiskSystem, d.Shareable:
			continue
		}
		c := candidate{id: id, kind: d.Type, sizeGiB: d.SizeGiB, by: taken[id]}
		if at := place(id); at >= 0 {
			c.listed, c.snapshot = true, in.DataDisks[at].SnapshotID
			all = append(all, c)
		} else {
			rest = append(rest, c)
		}
	}
	slices.SortFunc(all, func(a, b candidate) int { return place(a.id) - place(b.id) })
	return append(all, rest...), nil
}

// ordered returns the disk that an entry means by its place among those that fit. No
// document says in which order they are listed, so the place is good only for disks
// that are alike, as those are that came blank with the instance: of these any order
// will do, once it is kept.
func ordered(e node.DiskConfig, candidates []candidate, in tencent.Instance) (*candidate, string, error) {
	var fits []*candidate
	var text []candidate
	for i := range candidates {
		if c := &candidates[i]; c.listed && c.fits(e.Selector) {
			fits, text = append(fits, c), append(text, *c)
		}
	}
	n := e.Selector.Order
	switch {
	case n > len(fits):
		return nil, "", noneFits(e, candidates)
	case len(fits) == 1:
		return fits[0], "the only such disk in cvm DescribeInstances DataDisks", nil
	case in.LatestOperation != "" && in.LatestOperation != "RunInstances":
		return nil, "", node.Terminal("Ambiguous", "set disks[].diskID in the NodeConfig",
			fmt.Errorf("%s may mean %s: after %s they need not be blank, and the cloud promises no order", whose(e), some(text), in.LatestOperation))
	case slices.ContainsFunc(fits, func(c *candidate) bool { return c.snapshot != "" }):
		return nil, "", node.Terminal("Ambiguous", "set disks[].diskID in the NodeConfig",
			fmt.Errorf("%s may mean %s: they do not all come blank, and the cloud promises no order", whose(e), some(text)))
	}
	return fits[n-1], fmt.Sprintf("number %d of %d such disks in cvm DescribeInstances DataDisks", n, len(fits)), nil
}

func noneFits(e node.DiskConfig, candidates []candidate) error {
	return node.Terminal("NoDiskMatches", "correct disks[].selector in the NodeConfig, or launch the instance with such a disk",
		fmt.Errorf("%s means none of the instance's data disks: %s", whose(e), word(some(candidates))))
}

func some(all []candidate) string {
	var out []string
	for _, c := range all {
		out = append(out, c.String())
	}
	return strings.Join(out, ", ")
}

// unordered answers for the entries that are left. Each has to have one disk, and no
// two the same; if that can be in more than one way, none is right.
func unordered(open []node.DiskConfig, candidates []candidate, answers []binding) error {
	var entries []int // of open
	var edges [][]int // of each, the candidates that fit
	for i, e := range open {
		if answers[i].DiskID != "" {
			continue
		}
		var fits []int
		for j, c := range candidates {
			if c.by == "" && c.fits(e.Selector) {
				fits = append(fits, j)
			}
		}
		if len(fits) == 0 {
			return noneFits(e, candidates)
		}
		entries, edges = append(entries, i), append(edges, fits)
	}
	chosen, ok := match(edges, -1, -1)
	for k, i := range entries {
		e := open[i]
		var fits []candidate
		for _, j := range edges[k] {
			fits = append(fits, candidates[j])
		}
		if !ok && len(entries) > 1 {
			return node.Terminal("NoDiskMatches", "correct disks[].selector in the NodeConfig, or launch the instance with such disks",
				fmt.Errorf("%d selectors want a disk each and there are not as many that fit; %s would take one of %s", len(entries), whose(e), some(fits)))
		}
		if _, other := match(edges, k, chosen[k]); other {
			return node.Terminal("Ambiguous", fixSelector, fmt.Errorf("%s may mean any of %s", whose(e), some(fits)))
		}
		source := "the only data disk that fits, as cbs DescribeDisks says"
		if len(fits) > 1 {
			source = "the only data disk that fits and that no other selector needs, as cbs DescribeDisks says"
		}
		answers[i] = binding{MountPoint: e.MountPoint, Selector: e.Selector, DiskID: candidates[chosen[k]].id, Source: source}
	}
	return nil
}

// match gives every entry a candidate of its own, along augmenting paths, without
// using one edge, and reports whether that can be.
func match(edges [][]int, entry, candidate int) (chosen []int, ok bool) {
	owner := map[int]int{} // of a candidate
	var place func(k int, seen map[int]bool) bool
	place = func(k int, seen map[int]bool) bool {
		for _, j := range edges[k] {
			if seen[j] || k == entry && j == candidate {
				continue
			}
			seen[j] = true
			if o, held := owner[j]; !held || place(o, seen) {
				owner[j] = k
				return true
			}
		}
		return false
	}
	chosen = make([]int, len(edges))
	for k := range edges {
		if !place(k, map[int]bool{}) {
			return chosen, false
		}
	}
	for j, k := range owner {
		chosen[k] = j
	}
	return chosen, true
}
