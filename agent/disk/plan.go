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

// observed is the machine as far as one disk is concerned.
type observed struct {
	Devices []device         `json:"devices"`
	Mounts  []mount          `json:"mounts,omitempty"`
	Swaps   []string         `json:"swaps,omitempty"`  // names of devices: vdb, vdb1
	Ledger  map[string]entry `json:"ledger,omitempty"` // by disk id
	Content content          `json:"content,omitzero"` // of the wanted disk, unless it is mounted
	// Layers are the devices that are made of others; Members is what the disks of a
	// stripe hold, by id; Key is how the key of an encrypted disk stands.
	Layers  []layer            `json:"layers,omitempty"`
	Members map[string]content `json:"members,omitempty"`
	// Beneath is what the device under an open mapping holds, if making it was cut off.
	Beneath content  `json:"beneath,omitzero"`
	Key     keyState `json:"key,omitzero"`
	Listed  []string `json:"listed,omitempty"` // ids of the data disks that the metadata service knows
	// Decision is what an operator has decided for the wanted disk, and not yet done.
	Decision *decision `json:"decision,omitempty"`
	// Decisions are those for the disks of a stripe, by id.
	Decisions map[string]*decision `json:"decisions,omitempty"`
	Cluster   string               `json:"cluster,omitempty"` // of the node
	// Link is where the mount point leads if a part of it is a symbolic link.
	Link string `json:"link,omitempty"`
	// Settling says that udev is at work: there may be devices that are not seen yet.
	Settling  bool  `json:"settling,omitempty"`
	ledgerErr error // why Ledger is not complete; nil: it is
}

// device is a whole block device with a serial attribute.
type device struct {
	Name       string `json:"name"`   // vdb: where it is now, never what it is
	Dev        string `json:"dev"`    // 253:16
	Serial     string `json:"serial"` // read live; empty means unknown, not none
	SizeBytes  int64  `json:"sizeBytes"`
	Seq        string `json:"-"` // diskseq: no two devices of a boot share it; empty before Linux 5.15
	ReadOnly   bool   `json:"readOnly,omitempty"`
	Partitions []part `json:"partitions,omitempty"`
	// Holders are the devices stacked on it or on one of its partitions: dm-0, md0.
	Holders []string `json:"holders,omitempty"`
	// Of a device that is made of others: the ids of the disks at the bottom, of which
	// Serial is the first, and the devices right beneath.
	ids   []string
	under []device
}

type part struct {
	Name string `json:"name"`
	Dev  string `json:"dev"`
}

// mount is a line of mountinfo.
type mount struct {
	Dev    string `json:"dev"`
	Target string `json:"target"`
	FSType string `json:"fsType"`
	Source string `json:"source,omitempty"`
	Subdir string `json:"subdir,omitempty"` // of the file system that is mounted; empty: all of it
	// ReadOnly is true if the mount or its file system is, as ext4 makes itself
	// after an error.
	ReadOnly bool `json:"readOnly,omitempty"`
}

// content is what reading a disk showed.
type content struct {
	// Unreadable is the first read error. Nothing else is known then.
	Unreadable string `json:"unreadable,omitempty"`
	// Busy says that another program holds the disk's lock.
	Busy bool `json:"busy,omitempty"`
	// Blank says that all that was read is zero. A plan rests on a glance; who formats
	// has the disk proven blank.
	Blank bool `json:"blank,omitempty"`
	// Proving says how far the reading of every block is, if it is under way.
	Proving string `json:"proving,omitempty"`
	// Signatures names everything recognised; UUID and Label are those of the
	// file system if there is exactly one signature and it is ext4 or xfs.
	Signatures []string `json:"signatures,omitempty"`
	UUID       string   `json:"uuid,omitempty"`
	Label      string   `json:"label,omitempty"`
	// Member and Header are there if the superblock of an md array, or a LUKS2 header,
	// is undamaged. What the data behind them looks like says nothing.
	Member   *superblock `json:"member,omitempty"`
	Header   *header     `json:"header,omitempty"`
	Evidence string      `json:"evidence,omitempty"` // first bytes found, and where
	at       int64       // of what was found beyond a glance
}

func (c content) String() string {
	var b strings.Builder
	switch {
	case c.Blank:
		return "nothing"
	case c.Unreadable != "":
		return "something unreadable (" + c.Unreadable + ")"
	case len(c.Signatures) == 0:
		b.WriteString("data that no known signature explains")
	default:
		b.WriteString(strings.Join(c.Signatures, " and "))
	}
	if m := c.Member; m != nil {
		fmt.Fprintf(&b, " (disk %d of %d of the array %s, named %q)", m.Role, m.Disks, m.UUID, m.Name)
	}
	if h := c.Header; h != nil {
		fmt.Fprintf(&b, " (uuid %s, label %q)", h.UUID, h.Label)
	}
	if c.UUID != "" {
		fmt.Fprintf(&b, " (uuid %s, label %q)", c.UUID, c.Label)
	}
	if c.Evidence != "" {
		fmt.Fprintf(&b, ", %s", c.Evidence)
	}
	return b.String()
}

type verb string

const (
	format verb = "format"
	adopt  verb = "adopt"
	attach verb = "mount"

	assemble verb = "assemble" // the array of a stripe
	unlock   verb = "open"     // the mapping of an encrypted disk
	stop     verb = "stop"     // a layer that was not finished
)

type step struct {
	verb verb
	text string
}

// decide returns what has to be done to the wanted disk, or why nothing may be.
func decide(want node.DiskConfig, have observed) ([]step, error) {
	if have.Link != "" {
		return nil, node.Terminal("MountPointIsLink", fmt.Sprintf("set disks[].mountPoint: %s in the NodeConfig, or make it a directory", have.Link),
			fmt.Errorf("%s leads to %s by a symbolic link", want.MountPoint, have.Link))
	}
	at, err := raise(want, have)
	if err != nil {
		return nil, cmp.Or(have.ledgerErr, err)
	}
	if m, ok := have.at(want.MountPoint); ok {
		return nil, at.mounted(m)
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
	id := want.DiskID
	if id == "" {
		var err error
		if id, err = onlyDataDisk(want, have); err != nil {
			return device{}, err
		}
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
			text += fmt.Sprintf(" (%s has not told its serial)", strings.Join(mute, ", "))
		}
		return device{}, node.Waiting("Absent", "%s", text)
	default:
		return device{}, node.Terminal("Ambiguous", "detach all but the right one",
			fmt.Errorf("%d block devices claim the serial %s: %s", len(found), id, names(found)))
	}
}

// diskID is what a CBS disk's serial looks like; virtio carries 20 bytes of it.
var diskID = regexp.MustCompile(`^disk-[a-z0-9]{1,15}$`)

// onlyDataDisk returns the id of the disk that a DiskConfig without an id means.
// Once a disk has been used for the mount point, it is that one for ever.
func onlyDataDisk(want node.DiskConfig, have observed) (string, error) {
	var known []string
	for id, e := range have.Ledger {
		if e.MountPoint == want.MountPoint {
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
		return "", node.Waiting("Absent", "no data disk is attached; one is wanted for %s", want.MountPoint)
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
		return []step{{format, fmt.Sprintf("format %s with %s over whatever it holds, as %s", dev, fs, have.Decision)}, mount}, nil
	case c.Unreadable != "":
		return nil, unreadable(dev, c)
	case c.Blank && past.State == stateFormatted:
		return nil, lost(past, dev.String()+" reads as blank", "if its data may be lost, type: "+command(actFormat, dev))
	case c.Blank && len(c.Signatures)+len(dev.Partitions) == 0:
		return []step{{format, fmt.Sprintf("format %s with %s once it is proven blank", dev, fs)}, mount}, nil
	case one && ours && c.UUID != past.UUID && otherCluster(c.UUID, have.Cluster) &&
		want.WhenNotBlank != node.MountFound && !decided(actAdopt):
		return nil, node.Terminal("OtherCluster", "attach another disk; or, to use it as it is, type: "+command(actAdopt, dev),
			fmt.Errorf("%s holds tkenode's %s, made on a node of another cluster", dev, c))
	case one && ours, one && adoptable(c) && (want.WhenNotBlank == node.MountFound || decided(actAdopt)):
		found := c.Signatures[0]
		mount.text = fmt.Sprintf("mount %s (%s) on %s", dev.Serial, found, want.MountPoint)
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
		return []step{{adopt, fmt.Sprintf("adopt %s: it holds %s %s (uuid %s)", dev.Serial, whose, c.Signatures[0], c.UUID)}, mount}, nil
	case past.State == stateFormatting:
		return nil, interrupted(dev, past, c)
	}
	if len(dev.Partitions) > 0 {
		c.Signatures = append([]string{"partitions"}, c.Signatures...)
	}
	return nil, foreign(dev, c)
}

func interrupted(dev device, past entry, c content) error {
	return node.Terminal("FormatInterrupted", eraseIt+command(actFormat, dev),
		fmt.Errorf("formatting %s began on %s and was cut off; it now holds %s", dev, past.At.Format("2006-01-02 15:04:05Z"), c))
}

func unreadable(dev device, c content) error {
	return &node.Error{Class: node.ClassTransient, Reason: "Unreadable",
		Fix: "look at `dmesg`, and detach the disk if it is broken; if it holds nothing that you need and both its ends can be read, type: " + command(actFormat, dev),
		Err: fmt.Errorf("%s cannot be read, so it counts as holding data: %s", dev, c.Unreadable)}
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
	return c.UUID != "" && len(c.Signatures) == 1 && slices.Contains([]string{string(node.Ext4), string(node.XFS)}, c.Signatures[0])
}

// decided reports whether an operator has decided so of a device.
func (o observed) decided(act string, dev device) bool {
	one := o.Decisions[dev.Serial]
	return o.Decision != nil && o.Decision.is(act, dev) || one != nil && one.is(act, dev)
}

// at returns the topmost mount at target.
func (o observed) at(target string) (mount, bool) {
	for _, m := range slices.Backward(o.Mounts) {
		if m.Target == target {
			return m, true
		}
	}
	return mount{}, false
}

// listed returns the ids of the data disks that the metadata service knows, but for
// the one that the system is on. Where that has not told its serial, they only say
// something once all of them have appeared as other devices.
func (o observed) listed() (ids []string) {
	system := slices.IndexFunc(o.Devices, o.holdsRoot)
	for _, id := range o.Listed {
		at := slices.IndexFunc(o.Devices, func(d device) bool { return d.Serial == id })
		switch {
		case !diskID.MatchString(id), at >= 0 && at == system:
		case at < 0 && (system < 0 || o.Devices[system].Serial == ""):
			return nil
		default:
			ids = append(ids, id)
		}
	}
	return ids
}

func (o observed) holdsRoot(d device) bool {
	m, ok := o.at("/")
	return ok && d.owns(m.Dev)
}

// is reports whether both are the same device, of the same size.
func (d device) is(o device) bool {
	return d.Serial == o.Serial && d.Dev == o.Dev && d.Seq == o.Seq && d.SizeBytes == o.SizeBytes
}

// owns reports whether dev is the device or one of its partitions.
func (d device) owns(dev string) bool {
	return d.Dev == dev || slices.ContainsFunc(d.Partitions, func(p part) bool { return p.Dev == dev })
}

func (d device) String() string {
	if len(d.ids) > 0 {
		return fmt.Sprintf("%s (/dev/%s, %s)", strings.Join(d.ids, "+"), d.Name, Size(d.SizeBytes))
	}
	return fmt.Sprintf("%s (/dev/%s, %s)", d.Serial, d.Name, Size(d.SizeBytes))
}

func names(all []device) string {
	var out []string
	for _, d := range all {
		out = append(out, d.String())
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
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
