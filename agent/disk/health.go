package disk

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	// stallPatience is how long requests may be in flight while none ends. A virtio
	// disk has no timeout of its own, and a CBS disk that is throttled still answers.
	stallPatience = time.Minute
	probeDeadline = 20 * time.Second // of a probe: some small reads
)

// Health is what is known of a disk that is mounted, one condition for each of
// node.DiskConditionTypes: True is bad, Unknown is not looked at yet.
type Health []node.Condition

// bad returns what is wrong.
func (h Health) bad() (bad []node.Condition) {
	for _, c := range h {
		if c.Status == node.True {
			bad = append(bad, c)
		}
	}
	return bad
}

// of returns the condition of type t.
func (h Health) of(t node.ConditionType) node.Condition {
	if i := slices.IndexFunc(h, func(c node.Condition) bool { return c.Type == t }); i >= 0 {
		return h[i]
	}
	return node.Condition{Type: t, Status: node.Unknown, Reason: "NotLookedAtYet"}
}

// vitals is what a look at a disk that is or was mounted shows.
type vitals struct {
	Disk       string       `json:"disk"`            // its id; of several, joined by "+"
	Device     string       `json:"device"`          // vdb; empty: it is not there
	Disks      []string     `json:"disks,omitempty"` // that Device is made of; of a disk, itself: vdb
	MountPoint string       `json:"mountPoint"`
	Mounted    bool         `json:"mounted,omitempty"`
	FSType     string       `json:"fsType,omitempty"`
	ReadOnly   bool         `json:"readOnly,omitempty"`
	Ext4       *ext4Errors  `json:"ext4,omitempty"`    // nil: it is another file system
	Stalled    stall        `json:"stalled,omitzero"`  // requests that make no progress
	Probe      *probeResult `json:"probe,omitempty"`   // nil: there was none yet
	Gone       string       `json:"gone,omitempty"`    // why its device is not there any more
	GoneFor    string       `json:"goneFor,omitempty"` // since when
}

// ext4Errors is what ext4 keeps in its superblock of the damage that it has found,
// until e2fsck clears it.
// Source: linux Documentation/ABI/testing/sysfs-fs-ext4
type ext4Errors struct {
	Count int       `json:"count"`
	First ext4Error `json:"first,omitzero"`
	Last  ext4Error `json:"last,omitzero"`
}

type ext4Error struct {
	At    time.Time `json:"at,omitzero"`
	Func  string    `json:"func,omitempty"`
	Line  string    `json:"line,omitempty"`
	Inode string    `json:"inode,omitempty"`
	Block string    `json:"block,omitempty"`
}

func (e ext4Error) String() string {
	text := e.At.UTC().Format("2006-01-02 15:04:05Z")
	if e.Func != "" {
		text += " in " + e.Func
		if e.Line != "" {
			text += ":" + e.Line
		}
	}
	for _, p := range [][2]string{{"inode", e.Inode}, {"block", e.Block}} {
		if p[1] != "" && p[1] != "0" {
			text += ", " + p[0] + " " + p[1]
		}
	}
	return text
}

// stall is a time in which requests were in flight and none ended.
type stall struct {
	Requests int           `json:"requests"`
	For      time.Duration `json:"for"`
}

// probeResult is what the helper found. See helper_linux.go.
type probeResult struct {
	Serial string `json:"serial"` // as vitals.Disk; empty: it was not told
	// Errors are of what failed: "read of one block: input/output error".
	Errors []string `json:"errors,omitempty"`
	// Hangs says which step has not returned since Late; empty: all have.
	Hangs string        `json:"hangs,omitempty"`
	Late  time.Duration `json:"late,omitempty"`
	// Failed is why the helper has found nothing; empty: it has.
	Failed string `json:"failed,omitempty"`
}

// stopped reports whether ext4 takes no writes after an error that it has noted. Some
// kernels do not show that in mountinfo: since Linux 6.12, and in stable ones before
// it, ext4 stops itself instead of making the mount read-only; since 6.15 there is a
// word for it. Source: linux fs/ext4/super.c, ext4_handle_error
func (v vitals) stopped() bool {
	return v.Mounted && v.Ext4 != nil && v.Ext4.Count > 0 && v.Probe != nil && v.Probe.failed(stepWrite)
}

func (p *probeResult) failed(step string) bool {
	return slices.ContainsFunc(p.Errors, func(e string) bool { return strings.HasPrefix(e, step+": ") })
}

// diagnose says what the vitals mean. Since is left to the caller.
func diagnose(v vitals) Health {
	name := v.Disk
	if v.Device != "" {
		name += " (/dev/" + v.Device + ")"
	}
	name += " on " + v.MountPoint
	is := func(t node.ConditionType, bad bool, reason, fine, format string, args ...any) node.Condition {
		if bad {
			return node.Condition{Type: t, Status: node.True, Reason: reason, Message: name + " " + fmt.Sprintf(format, args...)}
		}
		return node.Condition{Type: t, Status: node.False, Reason: fine}
	}
	h := Health{
		is(node.ReadonlyFilesystem, v.Mounted && v.ReadOnly || v.stopped(), "DiskReadOnly", "DiskWritable",
			"takes no writes, as a file system does after an error; look at `dmesg`, drain the node, and repair it as RUNBOOK.md says at ReadonlyFilesystem"),
		v.io(is),
		is(node.Ext4Error, false, "", "DiskSound", ""),
	}
	if e := v.Ext4; e != nil && e.Count > 0 {
		h[2] = is(node.Ext4Error, true, "DiskDamaged", "", "has noted errors (%d, the first %s, the last %s); drain the node and run e2fsck, as RUNBOOK.md says at Ext4Error", e.Count, e.First, e.Last)
	}
	return h
}

// io judges how the disk answers.
func (v vitals) io(is func(t node.ConditionType, bad bool, reason, fine, format string, args ...any) node.Condition) node.Condition {
	p := v.Probe
	bad := func(reason, format string, args ...any) node.Condition {
		return is(node.IOError, true, reason, "", format, args...)
	}
	switch {
	case v.Gone != "":
		return bad("DiskGone", "is gone since %s: %s; attach it again, or drain the node", v.GoneFor, v.Gone)
	case p != nil && p.Hangs != "":
		return bad("DiskHung", "does not answer: the %s has not returned for %s; look at the disk in the console, and reboot the node if it does not come back", p.Hangs, p.Late.Round(time.Second))
	case v.Stalled.For >= stallPatience:
		return bad("DiskHung", "does not answer: %d requests are in flight and none has ended for %s; look at the disk in the console, and reboot the node if it does not come back",
			v.Stalled.Requests, v.Stalled.For.Round(time.Second))
	case p != nil && len(p.Errors) > 0 && !(v.stopped() && len(p.Errors) == 1):
		return bad("DiskIOError", "answers with errors: %s; look at `dmesg`, and drain the node", strings.Join(p.Errors, ", "))
	case p != nil && p.Failed != "":
		c := bad("NotProbed", "cannot be looked at: %s", p.Failed)
		c.Status = node.Unknown
		return c
	case p == nil && v.Mounted:
		return node.Condition{Type: node.IOError, Status: node.Unknown, Reason: "NotProbedYet"}
	}
	return is(node.IOError, false, "", "DiskAnswers", "")
}

// since gives every condition the time of its last transition.
func (h Health) since(before Health, now time.Time) Health {
	for i := range h {
		if b := before.of(h[i].Type); b.Status == h[i].Status {
			h[i].Since = b.Since
		} else {
			h[i].Since = now
		}
	}
	return h
}

// differs reports whether there is news for a human: figures that only grow are none.
func (h Health) differs(o Health) bool {
	return !slices.EqualFunc(h, o, func(a, b node.Condition) bool {
		return a.Type == b.Type && a.Status == b.Status && a.Reason == b.Reason
	})
}

// Merge makes of the health of all disks what is so of the node: bad if one is, known
// to be good if all are. Of no disks nothing is said.
func Merge(all []Health) []node.Condition {
	var out []node.Condition
	for _, t := range node.DiskConditionTypes {
		if len(all) == 0 {
			break
		}
		var sum node.Condition
		for _, h := range all {
			c := h.of(t)
			switch {
			case sum.Type == "":
				sum = c
			case c.Status == node.True && sum.Status == node.True:
				sum.Message += "; " + c.Message
				if c.Since.Before(sum.Since) {
					sum.Since = c.Since
				}
			case c.Status == node.True, c.Status == node.Unknown && sum.Status == node.False:
				sum = c
			}
		}
		out = append(out, sum)
	}
	return out
}

// progressing judges from look to look whether requests end.
type progressing struct {
	ended string // the device's count of those that have
	since time.Time
}

// look takes in a look at the device's count and at what is in flight.
func (p *progressing) look(inFlight int, ended string, now time.Time) stall {
	if inFlight == 0 {
		*p = progressing{}
		return stall{}
	}
	if ended != p.ended || p.since.IsZero() {
		p.ended, p.since = ended, now
	}
	return stall{inFlight, now.Sub(p.since)}
}
