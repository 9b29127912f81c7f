package disk

import (
	"fmt"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// A disk's file system may stand on more than the disk: on an array of several, on
// an encrypted mapping, on a mapping of an array. What stands there is raised from
// below, a layer at a time, and each layer is judged like a file system is: it is
// ours by the ledger or by its own mark, it is missing from a disk that is blank, or
// the disk is left alone. A plain disk is the stack without a layer.
type kind string

const (
	array kind = "array" // md, RAID 0
	crypt kind = "crypt" // dm-crypt, LUKS2
)

// layers returns what the NodeConfig wants under the file system, lowest first.
func layers(want node.DiskConfig) (all []kind) {
	if len(want.DiskIDs) > 0 {
		all = append(all, array)
	}
	if want.Encryption != nil {
		all = append(all, crypt)
	}
	return all
}

// layer is a block device that the kernel has made of others.
type layer struct {
	device
	Kind    kind     `json:"kind"`
	Beneath []string `json:"beneath,omitempty"` // names of devices; an array's in order, "" where one is missing or gone
	// Of an array.
	Level      string `json:"level,omitempty"` // raid0
	State      string `json:"state,omitempty"` // clear, inactive, readonly, clean, active, …
	ChunkBytes int64  `json:"chunkBytes,omitempty"`
	// Of a mapping.
	Mapping string `json:"mapping,omitempty"` // its name
	UUID    string `json:"uuid,omitempty"`    // of the LUKS header that it was opened by
}

// running reports whether an array gives access to its disks.
func (l layer) running() bool { return l.Kind == array && l.State != "clear" && l.State != "inactive" }

func (l layer) String() string {
	if l.Kind == array {
		return fmt.Sprintf("%s /dev/%s of %d disks, chunks of %d KiB, %s", l.Level, l.Name, len(l.Beneath), l.ChunkBytes>>10, l.State)
	}
	return fmt.Sprintf("LUKS2 /dev/%s (/dev/mapper/%s), uuid %s", l.Name, l.Mapping, l.UUID)
}

// place is how far a stack stands.
type place struct {
	disks []device // of the NodeConfig, each found by its live serial
	devs  []device // what the next thing stands on: the disks, or the one device that has been made of them
	left  []kind   // the layers that are yet to be raised, lowest first
	up    []layer  // those that are, lowest first
	// stale is a layer of ours that is of no use and in the way: an array that was not
	// started, or a layer whose disk went away under it.
	stale *layer
}

func (p place) dev() device { return p.devs[0] }

// next returns the layer to be raised next; none: the file system is next.
func (p place) next() kind {
	if len(p.left) == 0 {
		return ""
	}
	return p.left[0]
}

// raise finds the disks, and what stands on them, as far as it is up already.
func raise(want node.DiskConfig, have observed) (place, error) {
	disks, err := members(want, have)
	if err != nil {
		return place{}, err
	}
	p := place{disks: disks, devs: disks, left: layers(want)}
	if p.next() == array {
		if p.stale = have.staleArray(disks); p.stale != nil {
			return p, nil
		}
		p.add(have.arrayOver(disks))
	}
	if p.next() == crypt && len(p.devs) == 1 {
		if p.stale = have.staleMapping(p.dev()); p.stale != nil {
			return p, nil
		}
		p.add(have.mappingOver(p.dev()))
	}
	return p, nil
}

// add puts a layer that is up on p.
func (p *place) add(l *layer) {
	if l == nil {
		return
	}
	top := l.device
	top.Serial, top.under = p.disks[0].Serial, p.devs
	p.devs, p.left, p.up = []device{top}, p.left[1:], append(p.up, *l)
}

// members returns the disks that want names, in its order.
func members(want node.DiskConfig, have observed) ([]device, error) {
	if len(want.DiskIDs) == 0 {
		dev, err := bind(want, have)
		return []device{dev}, err
	}
	var found []device
	var away []string
	for _, id := range want.DiskIDs {
		dev, err := bind(node.DiskConfig{DiskID: id, MountPoint: want.MountPoint}, have)
		switch {
		case node.ReasonOf(err, "") == absent:
			away = append(away, err.Error())
		case err != nil:
			return nil, err
		}
		found = append(found, dev)
	}
	if len(away) > 0 {
		return nil, node.Waiting(absent, "the stripe for %s has %d disks, and not all are there: %s; it is never used without one of them",
			want.MountPoint, len(want.DiskIDs), strings.Join(away, ", "))
	}
	return found, nil
}

// over returns the layers of a kind that are made of any of the devices.
func (o observed) over(k kind, devs []device) (found []*layer) {
	for i, l := range o.Layers {
		if l.Kind == k && slices.ContainsFunc(l.Beneath, func(name string) bool {
			return slices.ContainsFunc(devs, func(d device) bool { return d.Name == name })
		}) {
			found = append(found, &o.Layers[i])
		}
	}
	return found
}

// arrayOver returns the running array of exactly these disks in this order. Any
// other one is somebody's, and unused tells.
func (o observed) arrayOver(disks []device) *layer {
	found := o.over(array, disks)
	if len(found) != 1 || !found[0].running() || found[0].Level != "raid0" || len(found[0].Beneath) != len(disks) {
		return nil
	}
	for i, d := range disks {
		if found[0].Beneath[i] != d.Name || !slices.Equal(d.Holders, []string{found[0].Name}) {
			return nil
		}
	}
	return found[0]
}

// staleArray returns an array that holds none but these disks, was not started or lacks
// one, and is not used; or the mapping of ours that alone uses it.
func (o observed) staleArray(disks []device) *layer {
	found := o.over(array, disks)
	if len(found) == 0 {
		return nil
	}
	if found[0].running() && (!slices.Contains(found[0].Beneath, "") || o.Ledger[disks[0].Serial].Array == nil) {
		return nil // it works, or is not known to be ours
	}
	l := found[0]
	for _, name := range l.Beneath {
		if name != "" && !slices.ContainsFunc(disks, func(d device) bool { return d.Name == name }) {
			return nil
		}
	}
	if above := o.over(crypt, []device{l.device}); len(above) == 1 && above[0].Mapping == label(disks[0].Serial) {
		l = above[0]
	}
	return o.idle(l)
}

// staleMapping returns a mapping under our name that is not used, and whose device is gone.
func (o observed) staleMapping(dev device) *layer {
	for i, l := range o.Layers {
		if l.Kind == crypt && l.Mapping == label(dev.Serial) && slices.Equal(l.Beneath, []string{""}) {
			return o.idle(&o.Layers[i])
		}
	}
	return nil
}

// idle returns l unless it is mounted or stacked.
func (o observed) idle(l *layer) *layer {
	if len(l.Holders) > 0 || slices.ContainsFunc(o.Mounts, func(m mount) bool { return l.owns(m.Dev) }) {
		return nil
	}
	return l
}

// mappingOver returns the mapping under our name of exactly this device.
func (o observed) mappingOver(dev device) *layer {
	found := o.over(crypt, []device{dev})
	if len(found) != 1 || found[0].Mapping != label(dev.Serial) || !slices.Equal(found[0].Beneath, []string{dev.Name}) ||
		!slices.Equal(dev.Holders, []string{found[0].Name}) {
		return nil
	}
	if past, ok := o.Ledger[dev.Serial]; ok && past.Crypt != "" && past.Crypt != found[0].UUID {
		return nil
	}
	return found[0]
}

// stackStep says what has to be done to the layer that is next.
func stackStep(want node.DiskConfig, at place, have observed) ([]step, error) {
	past := have.Ledger[at.disks[0].Serial]
	if at.erased(have) {
		past = entry{}
	}
	if at.stale != nil {
		return []step{{verb: lower, text: fmt.Sprintf("stop /dev/%s, which is not used and not complete", at.stale.Name)}}, nil
	}
	if h := have.Beneath.Header; past.State == stateFormatting && h != nil && h.Alone && !have.Content.Busy {
		return []step{{verb: lower, text: fmt.Sprintf("close /dev/%s, which nothing was made on yet", at.dev().Name)}}, nil
	}
	if len(want.DiskIDs) > 0 {
		if steps, err := fromMembers(want, at, past, have); len(steps) > 0 || err != nil {
			return steps, err
		}
	}
	if at.next() == crypt {
		return fromHeader(want, at, past, have)
	}
	return nil, nil
}

// erased reports whether an operator has decided of the first disk itself, whatever
// was made of it.
func (p place) erased(have observed) bool {
	return len(p.up) == 0 && have.decided(actFormat, p.disks[0])
}

// fits holds the NodeConfig against what the ledger says was made of the disks.
func (p place) fits(want node.DiskConfig, have observed) error {
	past := have.Ledger[p.disks[0].Serial]
	var made []string
	if past.Array != nil {
		made = past.Array.Members
	}
	switch {
	case past.State == "" || p.erased(have):
		return nil
	case !slices.Equal(made, want.DiskIDs):
		return node.Terminal("OtherLayers", "set disks[] in the NodeConfig as it was; a stripe keeps its disks and their order for ever",
			fmt.Errorf("%s was formatted %s, and the NodeConfig wants it %s for %s", p.disks[0], asWhat(made), asWhat(want.DiskIDs), want.MountPoint))
	case past.Crypt != "" && want.Encryption == nil:
		return node.Terminal("OtherLayers", "set disks[].encryption in the NodeConfig as it was; nothing is decrypted in place",
			fmt.Errorf("%s was formatted with encryption, and the NodeConfig wants none for %s", p.disks[0], want.MountPoint))
	case past.Crypt == "" && want.Encryption != nil:
		return node.Terminal("OtherLayers", "take disks[].encryption out of the NodeConfig, or name another disk; nothing is encrypted in place",
			fmt.Errorf("%s was formatted without encryption, and the NodeConfig wants some for %s", p.disks[0], want.MountPoint))
	}
	return nil
}

func asWhat(ids []string) string {
	if len(ids) == 0 {
		return "by itself"
	}
	return "in a stripe of " + list(ids)
}

// mounted judges what is mounted where the top of the stack belongs.
func (p place) mounted(m mount) error {
	top := p.dev()
	if len(p.left) > 0 {
		top.Dev = "" // whatever is mounted, it is not what is yet to be made
	}
	return mounted(top, m)
}

// lasting returns an error if a device cannot be judged just now, whatever is on it.
func lasting(dev device, c content) error {
	switch {
	case c.Proving != "":
		return c.waiting()
	case dev.ReadOnly:
		return node.Terminal("ReadOnly", "attach it writable", fmt.Errorf("%s is a read-only device", dev))
	case c.Busy:
		return node.Waiting("Busy", "%s is locked by another program", dev)
	}
	return nil
}

// waiting returns the error of a disk that is being read, or does not answer.
func (c content) waiting() error { return node.Waiting(proving(c.Hung), "%s", c.Proving) }

// thence lists what follows once a layer is up: the rest of the layers, and the
// mount, of which the first not expected ends the apply.
func thence(want node.DiskConfig, left []kind, past entry, id string) (steps []step) {
	if slices.Contains(left, crypt) {
		steps = append(steps, step{verb: unlock, text: fmt.Sprintf("open %s as /dev/mapper/%s", id, label(id))})
	}
	switch past.State {
	case stateFormatting:
		return steps // what is there is not known until it is up
	case "":
		steps = append(steps, step{verb: adopt, text: fmt.Sprintf("adopt %s, if it holds tkenode's %s", id, want.FileSystem)})
	}
	return append(steps, mountStep(want, id, string(want.FileSystem)))
}

func mountStep(want node.DiskConfig, id, fs string) step {
	return step{verb: attach, text: fmt.Sprintf("mount %s (%s) on %s", id, fs, want.MountPoint)}
}

// fresh lists how a stack is made from blank disks, or from what is to be erased.
func fresh(want node.DiskConfig, at place, have observed) ([]step, error) {
	var how, over []string
	for _, k := range at.left {
		switch k {
		case array:
			how = append(how, fmt.Sprintf("a stripe of %d", len(at.disks)))
		case crypt:
			how = append(how, "LUKS2")
		}
	}
	for _, d := range at.devs {
		if d.SizeBytes != at.dev().SizeBytes {
			return nil, node.Terminal("UnequalDisks", "give the stripe disks of one size", fmt.Errorf("the disks of the stripe for %s differ in size: %s", want.MountPoint, names(at.devs)))
		}
		if have.decided(actFormat, d) {
			over = append(over, d.Serial)
		}
	}
	text := fmt.Sprintf("format %s with %s once proven blank", names(at.devs), strings.Join(append(how, string(want.FileSystem)), ", "))
	if len(over) > 0 {
		text += fmt.Sprintf(", and over whatever %s holds, as an operator has decided", strings.Join(over, ", "))
	}
	return []step{{verb: format, text: text}, mountStep(want, at.disks[0].Serial, string(want.FileSystem))}, nil
}

// blanked says that of what the ledger knows nothing is left.
func blanked(past entry, what string, fix string) error {
	return node.Terminal("Lost", fix, fmt.Errorf("%s, but had been formatted by %s (uuid %s)", what, past.At.Format("2006-01-02 15:04:05Z"), past.UUID))
}

// unused returns an error if anybody else uses what the stack stands on.
func (p place) unused(have observed) error {
	for _, dev := range p.devs {
		if p.stale != nil {
			dev.Holders = nil // it is what is stale
		}
		if err := unused(dev, have); err != nil {
			return err
		}
	}
	return nil
}

// entry is what the ledger holds of a stack that is up as far as p.
func (p place) entry(want node.DiskConfig, have observed) entry {
	e := entry{DiskID: p.disks[0].Serial, MountPoint: want.MountPoint, SizeBytes: p.dev().SizeBytes}
	for _, l := range p.up {
		switch l.Kind {
		case array:
			if m := have.Members[e.DiskID].Member; m != nil {
				e.Array = &madeArray{UUID: m.UUID, Members: want.DiskIDs, ChunkBytes: m.ChunkBytes}
			}
		case crypt:
			e.Crypt = l.UUID
		}
	}
	return e
}

// target returns the device, and what it holds, of which is decided under a disk's id:
// while a stripe is no array, that disk; else what stands on it.
func (p place) target(id string, have observed) (device, content) {
	for _, d := range p.disks {
		if len(p.devs) > 1 && d.Serial == id {
			return d, have.Members[id]
		}
	}
	if len(p.devs) == 0 {
		return device{}, content{}
	}
	return p.dev(), have.Content
}

// together writes what is said of each of several disks, once where it is the same.
func together(devs []device, texts []string) string {
	var all []string
	for i, text := range texts {
		if first := slices.Index(texts, text); first < i {
			continue
		}
		var ids []string
		for j := i; j < len(texts); j++ {
			if texts[j] == text {
				ids = append(ids, devs[j].Serial)
			}
		}
		all = append(all, strings.Join(ids, ", ")+": "+text)
	}
	return strings.Join(all, "; ")
}
