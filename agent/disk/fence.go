package disk

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// A disk that is gone while it was mounted is fenced: what would write beneath its
// mount point is stopped, the dead mount is taken away, and the node is cordoned
// until the same disk is mounted again. Every step is seen by looking, but for one:
// that the disk was there at all. That is noted when it is mounted, and forgotten
// with the boot.

// serving is the note of a disk that was mounted in this boot.
type serving struct {
	DiskID string `json:"diskID"`
	Dev    string `json:"dev"` // that was mounted: 253:16
	Seq    string `json:"seq,omitempty"`
	// Disks are those that the device is made of, an array or an encrypted mapping, which
	// outlives them; none: it is the disk itself.
	Disks []serving `json:"disks,omitempty"`
	// Gone is when the fence was complete; zero: it serves, as far as is known.
	Gone time.Time `json:"gone,omitzero"`
	// Why is the evidence that it is gone.
	Why string `json:"why,omitempty"`
}

// pods stands, in a list of units, for the processes of all pods.
const pods = "pods"

// noteOf returns the note of a device that is mounted.
func noteOf(dev device) serving {
	note := serving{DiskID: dev.Serial, Dev: dev.Dev, Seq: dev.Seq}
	if len(dev.under) > 0 {
		for _, d := range dev.disks() {
			note.Disks = append(note.Disks, noteOf(d))
		}
	}
	return note
}

// of reports whether the note is of a device where it is now.
func (s serving) of(dev device) bool {
	same := func(a, b serving) bool { return a.DiskID == b.DiskID && a.Dev == b.Dev }
	now := noteOf(dev)
	return same(s, now) && slices.EqualFunc(s.Disks, now.Disks, same)
}

// disks returns the notes of the disks at the bottom.
func (s serving) disks() []serving {
	if len(s.Disks) == 0 {
		return []serving{s}
	}
	return s.Disks
}

// ids names them.
func (s serving) ids() []string {
	var all []string
	for _, d := range s.disks() {
		all = append(all, d.DiskID)
	}
	return all
}

func (s serving) String() string { return strings.Join(s.ids(), "+") }

// users returns what writes at mountPoint and cannot do without it, in the order in
// which it has to be stopped. Of other mount points it is not known who uses them,
// and so nobody is stopped: what is written there fails.
func users(mountPoint string) []string {
	for _, root := range []string{node.ContainerdRoot, node.KubeletRoot} {
		if within(mountPoint, root) {
			return []string{node.KubeletUnit, node.ContainerdUnit, pods}
		}
	}
	return nil
}

func within(path, tree string) bool { return path == tree || strings.HasPrefix(path, tree+"/") }

// fence returns what has to be done because the disk is gone, or that there is
// nothing left but to wait for it. Neither: the disk is there, or never was.
func fence(want node.DiskConfig, have observed) ([]step, error) {
	was := have.Was
	if was == nil || was.Gone.IsZero() && have.Lost == "" {
		return nil, nil
	}
	if was.Gone.IsZero() {
		var steps []step
		for _, u := range users(want.MountPoint) {
			switch {
			case !slices.Contains(have.Users, u):
			case u == pods:
				steps = append(steps, step{verb: quell, text: fmt.Sprintf("kill the processes of all pods: %s is gone", was)})
			default:
				steps = append(steps, step{verb: halt, unit: u, text: fmt.Sprintf("stop %s: %s is gone", u, was)})
			}
		}
		if m, ok := have.at(want.MountPoint); ok && m.Dev == was.Dev {
			steps = append(steps, step{verb: detach, text: fmt.Sprintf("unmount what is left of %s on %s", was, want.MountPoint)})
		}
		return append(steps, step{verb: bury, text: fmt.Sprintf("note that %s is gone: %s", was, have.Lost)}), nil
	}
	if ids := want.IDs(); len(ids) > 0 && !slices.Equal(ids, was.ids()) {
		return nil, nil // another is wanted by now
	}
	if have.missing(node.DiskConfig{DiskIDs: was.ids()}) == "" {
		return nil, nil // it is back, and is mounted as after a boot
	}
	return nil, gone(want, *was)
}

// gone says since when a disk is away, and what to do.
func gone(want node.DiskConfig, was serving) error {
	text := fmt.Sprintf("%s, which was mounted on %s, is gone since %s: %s", was, want.MountPoint, was.Gone.UTC().Format("2006-01-02 15:04:05Z"), was.Why)
	if len(users(want.MountPoint)) > 0 {
		text += "; kubelet, containerd and the pods are stopped"
	} else {
		text += "; nothing can be written to the bare directory"
	}
	return &node.Error{Class: node.ClassWaiting, Reason: Gone, Err: fmt.Errorf("%s", text),
		Fix: "pay for the disk if it is overdue, and attach it to this instance again: it is mounted, and the node uncordoned, by itself; or drain the node and launch another"}
}

// lost says why the device that was mounted is not there any more. The two looks
// are some time apart, since a look that fails is no evidence; an empty text means
// that it is there, or that nothing is known.
func lost(was serving, looks ...sight) string {
	var other string
	for _, l := range looks {
		switch {
		case !l.sound:
			return ""
		case !l.there:
			other = ""
		case l.seq != "" && was.Seq != "" && l.seq != was.Seq:
			other = l.seq
		default:
			return ""
		}
	}
	switch {
	case len(looks) == 0:
		return ""
	case other != "":
		return fmt.Sprintf("its device number %s is another device's now (diskseq %s, it was %s)", was.Dev, other, was.Seq)
	}
	return fmt.Sprintf("its block device %s is not in /sys/dev/block any more", cmp.Or(was.Dev, "(its number was not noted)"))
}

// sight is one look at the place of a block device in sysfs.
type sight struct {
	sound bool   // sysfs could be read: it has other block devices
	there bool   // there is a device of that number
	seq   string // its diskseq; empty before Linux 5.15
}

// another says that a device, or what it is made of, told a serial that is not the
// disk's, twice.
func another(was serving, serials []string) string {
	n := len(serials)
	if n < 2 || serials[n-1] == "" || serials[n-1] == was.String() || serials[n-1] != serials[n-2] {
		return ""
	}
	if len(was.Disks) > 0 {
		return fmt.Sprintf("the disks of its device %s say twice that they are %s", was.Dev, serials[n-1])
	}
	return fmt.Sprintf("its device %s says twice that it is %s", was.Dev, serials[n-1])
}
