package disk

import (
	"fmt"
	"slices"
	"strings"
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
	Boot      string               `json:"boot,omitempty"`
	// Binding is what the selector means; nil: there is none, or it has not been found.
	Binding *binding `json:"binding,omitempty"`
	// Attach is there if the disk is not, and is to be attached.
	Attach *attachment `json:"attach,omitempty"`
	// Link is where the mount point leads if a part of it is a symbolic link.
	Link string `json:"link,omitempty"`
	// Settling says that udev is at work: there may be devices that are not seen yet.
	Settling bool `json:"settling,omitempty"`
	// FSBytes is the size of the file system where the disk is mounted; 0: not known.
	FSBytes   int64     `json:"fsBytes,omitempty"`
	Growing   string    `json:"growing,omitempty"`  // what grows, while it does
	NotGrown  int64     `json:"notGrown,omitempty"` // size of the device at which growing was refused
	ledgerErr error     // why Ledger is not complete; nil: it is
	boundErr  error     // why the selector has no Binding
	fresh     []binding // all that are not kept yet
	// Was is the note of the disk's mount in this boot; nil: there was none.
	Was *serving `json:"was,omitempty"`
	// Lost is the evidence that the device which was mounted is gone.
	Lost  string   `json:"lost,omitempty"`
	Users []string `json:"users,omitempty"` // that run, of those that a lost disk would let write beneath
	// Stopped says that the mounted file system takes no writes, and that the mount
	// does not show it.
	Stopped bool `json:"stopped,omitempty"`
	// Unit is how systemd knows the mount; nil: it is not asked.
	Unit *mountUnit `json:"unit,omitempty"`
}

// device is a whole block device: a disk, or what the kernel has made of disks.
type device struct {
	Name       string `json:"name"`   // vdb: where it is now, never what it is
	Dev        string `json:"dev"`    // 253:16
	Serial     string `json:"serial"` // read live; empty means unknown, not none; of what is made of disks, the first one's
	SizeBytes  int64  `json:"sizeBytes"`
	Seq        string `json:"-"` // diskseq: no two devices of a boot share it; empty before Linux 5.15
	ReadOnly   bool   `json:"readOnly,omitempty"`
	Partitions []part `json:"partitions,omitempty"`
	// Holders are the devices stacked on it or on one of its partitions: dm-0, md0.
	Holders []string `json:"holders,omitempty"`
	under   []device // what it is made of; none: it is a disk
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
	Hung    bool   `json:"hung,omitempty"` // and none of its reads returns
	// Signatures names everything recognised; UUID and Label are those of the
	// file system if there is exactly one signature and it is ext2 to ext4 or xfs.
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

// disks returns the disks at the bottom, in order: of a disk, itself.
func (d device) disks() (all []device) {
	for _, u := range d.under {
		all = append(all, u.disks()...)
	}
	if len(d.under) == 0 {
		all = []device{d}
	}
	return all
}

// ids names the disks at the bottom.
func (d device) ids() string {
	var all []string
	for _, one := range d.disks() {
		all = append(all, one.Serial)
	}
	return strings.Join(all, "+")
}

func (d device) String() string {
	return fmt.Sprintf("%s (/dev/%s, %s)", d.ids(), d.Name, Size(d.SizeBytes))
}

func names(all []device) string {
	var out []string
	for _, d := range all {
		out = append(out, d.String())
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}
