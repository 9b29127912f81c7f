package disk

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

type verb string

const (
	format verb = "format"
	adopt  verb = "adopt"
	attach verb = "mount"
	grow   verb = "grow"
	record verb = "bind"   // what the selector means
	join   verb = "attach" // the disk to the instance
	// What stands between disks and file system: see stack.go.
	assemble verb = "assemble" // the array of a stripe
	unlock   verb = "open"     // the mapping of an encrypted disk
	lower    verb = "lower"    // a layer that is not complete, or of no use
	// What comes after: see fence.go, mountunit.go.
	publish verb = "publish"
	reload  verb = "reload"
	halt    verb = "stop"
	quell   verb = "kill"
	detach  verb = "unmount"
	bury    verb = "note"
)

type step struct {
	verb verb
	text string
	unit string // of halt
}

// decide returns what has to be done to the wanted disk, or why nothing may be.
func decide(want node.DiskConfig, have observed) ([]step, error) {
	if have.Link != "" {
		return nil, node.Terminal("MountPointIsLink", fmt.Sprintf("set disks[].mountPoint: %s in the NodeConfig, or make it a directory", have.Link),
			fmt.Errorf("%s leads to %s by a symbolic link", want.MountPoint, have.Link))
	}
	if b := have.Binding; b != nil && b.At.IsZero() {
		return []step{{verb: record, text: fmt.Sprintf("bind %s to %s by its selector (%s): %s", b.MountPoint, b.DiskID, describeSelector(b.Selector), b.Source)}}, nil
	}
	// One that is gone may be attached again.
	if steps, err := fence(want, have); len(steps) > 0 || err != nil && have.Attach == nil {
		return steps, err
	}
	at, err := raise(want, have)
	if err != nil && have.Attach != nil {
		return attaching(want, *have.Attach)
	}
	if err != nil {
		return nil, cmp.Or(have.ledgerErr, err)
	}
	if m, ok := have.at(want.MountPoint); ok {
		m.ReadOnly = m.ReadOnly || have.Stopped
		if err := at.mounted(m); err != nil {
			return nil, err
		}
		dev := at.dev()
		return append(published(want, dev, m, have), grown(dev, m, have)...), nil
	}
	if have.ledgerErr != nil {
		return nil, have.ledgerErr
	}
	if err := at.unused(have); err != nil {
		return nil, err
	}
	if err := at.fits(want, have); err != nil {
		return nil, err
	}
	if want.Layered() {
		if steps, err := stackStep(want, at, have); len(steps) > 0 || err != nil {
			return steps, err
		}
	}
	return fromContent(want, at.dev(), have)
}

// bind returns the one device that is the wanted disk.
func bind(want node.DiskConfig, have observed) (device, error) {
	id, err := have.identity(want)
	if err != nil {
		return device{}, err
	}
	var found []device
	var mute []string
	for _, d := range have.Devices {
		switch d.Serial {
		case id:
			found = append(found, d)
		case "":
			mute = append(mute, "/dev/"+d.Name)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		text := id + " is not attached"
		if len(mute) > 0 {
			text += fmt.Sprintf(", or it is %s, which has not told its serial, as a disk does not that hangs", strings.Join(mute, " or "))
		}
		return device{}, node.Waiting(absent, "%s", text)
	default:
		return device{}, node.Terminal("Ambiguous", "detach all but the right one",
			fmt.Errorf("%d block devices claim the serial %s: %s", len(found), id, names(found)))
	}
}

// absent is the reason of a disk that is not attached.
const absent = "Absent"

// identity returns the id of the wanted disk.
func (o observed) identity(want node.DiskConfig) (string, error) {
	switch {
	case want.DiskID != "":
		return want.DiskID, nil
	case o.boundErr != nil:
		return "", o.boundErr
	case o.Binding != nil:
		return o.Binding.DiskID, nil
	}
	return onlyDataDisk(want, o)
}

// missing returns the first of the named disks that is not there.
func (o observed) missing(want node.DiskConfig) string {
	for _, id := range want.IDs() {
		if !slices.ContainsFunc(o.Devices, func(d device) bool { return d.Serial == id }) {
			return id
		}
	}
	return ""
}

// diskID is what a CBS disk's serial looks like; virtio carries 20 bytes of it.
var diskID = regexp.MustCompile(`^disk-[a-z0-9]{1,15}$`)

// onlyDataDisk returns the id of the disk that a DiskConfig without an id means.
// Once a disk has been used for the mount point, it is that one for ever.
func onlyDataDisk(want node.DiskConfig, have observed) (string, error) {
	var known []string
	for id, e := range have.Ledger {
		if e.MountPoint == want.MountPoint && e.DiskID == id { // once for a stripe
			known = append(known, id)
		}
	}
	slices.Sort(known)
	switch {
	case len(known) == 1:
		return known[0], nil
	case len(known) > 1:
		return "", node.Terminal("Ambiguous", "set disks[].diskID in the NodeConfig",
			fmt.Errorf("several disks have been used for %s: %s", want.MountPoint, strings.Join(known, ", ")))
	}
	// The cloud knows all disks at once; which have appeared here depends on when one looks.
	switch listed := have.listed(); len(listed) {
	case 0:
	case 1:
		return listed[0], nil
	default:
		return "", node.Terminal("Ambiguous", "set disks[].diskID in the NodeConfig",
			fmt.Errorf("the NodeConfig names no disk for %s and the instance has %d: %s", want.MountPoint, len(listed), strings.Join(listed, ", ")))
	}
	var found []device
	for _, d := range have.Devices {
		if diskID.MatchString(d.Serial) && strings.HasPrefix(d.Name, "vd") && !have.holdsRoot(d) {
			found = append(found, d)
		}
	}
	switch len(found) {
	case 1:
		if have.Settling {
			return "", node.Waiting("Settling", "%s is the only data disk so far, and udev is still at work", found[0])
		}
		return found[0].Serial, nil
	case 0:
		return "", node.Waiting(absent, "no data disk is attached; one is wanted for %s", want.MountPoint)
	default:
		return "", node.Terminal("Ambiguous", "set disks[].diskID in the NodeConfig",
			fmt.Errorf("the NodeConfig names no disk for %s and %d are attached: %s", want.MountPoint, len(found), names(found)))
	}
}

// mounted judges what is mounted where the disk belongs.
func mounted(dev device, m mount) error {
	switch {
	case m.Dev != dev.Dev:
		return node.Terminal("MountPointBusy", fmt.Sprintf("unmount it; tkenode then mounts %s there", dev.Serial),
			fmt.Errorf("%s carries a mount of %s (%s, device %s), not of %s", m.Target, m.Source, m.FSType, m.Dev, dev))
	case m.Subdir != "":
		return node.Terminal("MountPointBusy", fmt.Sprintf("unmount it; tkenode then mounts %s there", dev.Serial),
			fmt.Errorf("%s carries the directory %s of %s, not all of it", m.Target, m.Subdir, dev))
	case m.ReadOnly:
		return node.Terminal("ReadonlyFilesystem", "look for the cause with `dmesg`, then drain and reboot the node",
			fmt.Errorf("%s is mounted read-only on %s", dev, m.Target))
	}
	return nil
}

// unused returns an error if anybody uses the device.
func unused(dev device, have observed) error {
	inUse := func(text string, args ...any) error {
		return node.Terminal("InUse", "tkenode takes whole disks that nobody uses; name another disk in the NodeConfig, or free this one",
			fmt.Errorf("%s %s", dev, fmt.Sprintf(text, args...)))
	}
	for _, m := range have.Mounts {
		if dev.owns(m.Dev) {
			return inUse("is mounted on %s", m.Target)
		}
	}
	for _, s := range have.Swaps {
		if s == dev.Name || slices.ContainsFunc(dev.Partitions, func(p part) bool { return p.Name == s }) {
			return inUse("is swap space (%s)", s)
		}
	}
	if len(dev.Holders) > 0 {
		return inUse("is held by %s", strings.Join(dev.Holders, ", "))
	}
	return nil
}

// fromContent decides by what is on the disk and what the ledger knows of it.
func fromContent(want node.DiskConfig, dev device, have observed) ([]step, error) {
	c, past := have.Content, have.Ledger[dev.Serial]
	fs := string(want.FileSystem)
	mount := mountStep(want, dev.Serial, fs)
	one := len(c.Signatures) == 1 && len(dev.Partitions) == 0
	ours := c.UUID != "" && (c.UUID == past.UUID || c.Label == label(dev.Serial))
	decided := func(act string) bool { return have.decided(act, dev) }
	if err := lasting(dev, c); err != nil {
		return nil, err
	}
	switch {
	case decided(actFormat):
		return []step{{verb: format, text: fmt.Sprintf("format %s with %s over whatever it holds, as %s", dev, fs, have.Decision)}, mount}, nil
	case c.Unreadable != "":
		return nil, unreadable(dev, c)
	case c.Blank && past.State == stateFormatted:
		return nil, blanked(past, dev.String()+" reads as blank", "if its data may be lost, type: "+command(actFormat, dev))
	case c.Blank && len(c.Signatures)+len(dev.Partitions) == 0 && want.FileSystem == node.Ext3:
		return nil, node.Terminal("Ext3NotMade", "set fileSystem: ext4 in the NodeConfig", fmt.Errorf("%s is blank, and ext3 is only mounted where it is found", dev))
	case c.Blank && len(c.Signatures)+len(dev.Partitions) == 0:
		return []step{{verb: format, text: fmt.Sprintf("format %s with %s once it is proven blank", dev, fs)}, mount}, nil
	case one && ours && past.State == stateFormatting && (past.Boot == "" || past.Boot != have.Boot) && !decided(actAdopt):
		// It has failed, or the power may have gone before all of it was on the disk.
		return nil, interrupted(dev, c, past)
	case one && ours && c.UUID != past.UUID && otherCluster(c.UUID, have.Cluster) &&
		want.WhenNotBlank != node.MountFound && !decided(actAdopt):
		return nil, node.Terminal("OtherCluster", "attach another disk; or, to use it as it is, type: "+command(actAdopt, dev),
			fmt.Errorf("%s holds tkenode's %s, made on a node of another cluster", dev, c))
	case one && ours, one && adoptable(c) && (want.WhenNotBlank == node.MountFound || decided(actAdopt)):
		found := c.Signatures[0]
		mount = mountStep(want, dev.Serial, found)
		if found != fs && want.WhenNotBlank != node.MountFound {
			return nil, node.Terminal("WrongFileSystem", fmt.Sprintf("set fileSystem: %s in the NodeConfig", c.Signatures[0]),
				fmt.Errorf("%s holds %s, the NodeConfig asks for %s", dev, c, fs))
		}
		if past.UUID == c.UUID && past.State == stateFormatted && past.MountPoint == want.MountPoint {
			return []step{mount}, nil
		}
		whose := "tkenode's"
		if !ours {
			whose = "another's"
		}
		return []step{{verb: adopt, text: fmt.Sprintf("adopt %s: it holds %s %s (uuid %s)", dev.Serial, whose, c.Signatures[0], c.UUID)}, mount}, nil
	case past.State == stateFormatting:
		return nil, interrupted(dev, c, past)
	}
	if len(dev.Partitions) > 0 {
		c.Signatures = append([]string{"partitions"}, c.Signatures...)
	}
	return nil, foreign(dev, c)
}

// published returns what is left to do for a disk that is mounted where it belongs:
// systemd and the next agent have to know of it.
func published(want node.DiskConfig, dev device, m mount, have observed) []step {
	u := have.Unit
	if u == nil {
		return nil
	}
	was := have.Was
	switch name := unitName(want.MountPoint); {
	case was == nil || !was.of(dev) || !was.Gone.IsZero() || u.Text != unitText(dev.ids(), m.Source, want.MountPoint, m.FSType):
		return []step{{verb: publish, text: fmt.Sprintf("publish %s as %s", dev.Serial, name)}}
	case u.Stale:
		return []step{{verb: reload, text: fmt.Sprintf("reload systemd's units: it has not read %s", u.Path)}}
	}
	return nil
}

// proving is the reason of a disk that is read.
func proving(hung bool) string {
	if hung {
		return Hung
	}
	return Proving
}

func unreadable(dev device, c content) error {
	return &node.Error{Class: node.ClassTransient, Reason: "Unreadable",
		Fix: "look at `dmesg`, and detach the disk if it is broken; if it holds nothing that you need and both its ends can be read, type: " + command(actFormat, dev),
		Err: fmt.Errorf("%s cannot be read, so it counts as holding data: %s", dev, c.Unreadable)}
}

// interrupted says what a disk holds of which nobody knows how far its formatting got.
func interrupted(dev device, c content, past entry) error {
	fix := eraseIt + command(actFormat, dev)
	if adoptable(c) {
		fix = "check it (`e2fsck -fn`, `xfs_repair -n`), and if it is sound, type: " + command(actAdopt, dev) + "; or " + fix
	}
	return node.Terminal("FormatInterrupted", fix,
		fmt.Errorf("formatting %s began on %s and failed or was cut off; it now holds %s", dev, past.At.Format("2006-01-02 15:04:05Z"), c))
}

// foreign says what a disk holds that is not ours.
func foreign(dev device, c content) error {
	reason, fix := "Foreign", eraseIt+command(actFormat, dev)
	switch {
	case len(c.Signatures) > 1:
		reason = "Ambiguous" // whatever it is, more than one thing claims it
	case adoptable(c):
		fix = "to mount it as it is, type: " + command(actAdopt, dev) + "; or " + fix
	}
	return node.Terminal(reason, fix, fmt.Errorf("%s is not blank and not tkenode's: it holds %s; nothing was written", dev, c))
}

const eraseIt = "name another disk in the NodeConfig; or, once you have saved what you need of it, type: "

// adoptable reports whether exactly one healthy file system was found that can be
// mounted.
func adoptable(c content) bool {
	return c.UUID != "" && len(c.Signatures) == 1 && slices.Contains([]string{string(node.Ext4), string(node.XFS), string(node.Ext3)}, c.Signatures[0])
}

// clusterMark is what stands for a cluster in a UUID.
func clusterMark(cluster string) [6]byte {
	sum := sha256.Sum256([]byte("tkenode " + cluster))
	return [6]byte(sum[:])
}

// otherCluster reports whether a file system that tkenode made was made on a node
// of another cluster. One that was made before clusters were marked tells nothing.
func otherCluster(uuid, cluster string) bool {
	return len(uuid) == 36 && uuid[14] == '8' && uuid[24:] != fmt.Sprintf("%x", clusterMark(cluster))
}

// label returns the file system label that marks a disk as formatted by tkenode
// for this disk id. xfs allows 12 bytes.
func label(id string) string {
	id = strings.TrimPrefix(id, "disk-")
	return "tke-" + id[max(0, len(id)-8):]
}

// Size writes a number of bytes for people.
func Size(b int64) string {
	for _, u := range []struct {
		unit  int64
		label string
	}{{1 << 40, "TiB"}, {1 << 30, "GiB"}, {1 << 20, "MiB"}} {
		if b >= u.unit {
			return strings.TrimSuffix(fmt.Sprintf("%.1f", float64(b)/float64(u.unit)), ".0") + " " + u.label
		}
	}
	return fmt.Sprintf("%d bytes", b)
}

var errChanged = errors.New("the disk changed while it was looked at")
