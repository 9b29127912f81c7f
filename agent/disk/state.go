package disk

import (
	"slices"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// State is how one disk of the NodeConfig stands, and why.
type State struct {
	Now        time.Time       `json:"now"`
	Name       string          `json:"name"`             // of the instance
	DiskID     string          `json:"diskID,omitempty"` // empty: not known yet
	Device     string          `json:"device,omitempty"` // where it is now, never what it is
	SizeBytes  int64           `json:"sizeBytes,omitempty"`
	Members    []Member        `json:"members,omitempty"` // the disks under Layers, in order; none: it is the disk itself
	Layers     []string        `json:"layers,omitempty"`  // between the disks and the file system, as far as they are up
	State      string          `json:"state"`             // Mounted, Planned, or why it is not: Absent, Proving, Foreign, …
	Since      time.Time       `json:"since,omitzero"`
	Message    string          `json:"message,omitempty"`
	MountPoint string          `json:"mountPoint"`
	FileSystem node.FileSystem `json:"fileSystem"` // that it has, or is wanted to have
	UUID       string          `json:"uuid,omitempty"`
	// BoundBy says in a word why this disk is meant: diskID, selector or only disk;
	// Binding says it in a sentence.
	BoundBy string `json:"boundBy,omitempty"`
	Binding string `json:"binding,omitempty"`
	// Proof is what it rested on that the disk was blank, when it was formatted.
	Proof  string `json:"proof,omitempty"`
	Ledger *Past  `json:"ledger,omitempty"`
	// Fenced says that the disk went while it was mounted, and is not mounted again.
	Fenced   bool             `json:"fenced,omitempty"`
	Health   []node.Condition `json:"health,omitempty"` // what is wrong with it although it is mounted; all are True
	Evidence []Evidence       `json:"evidence"`         // of the last proof of this life of the agent
	Steps    []Step           `json:"steps"`            // as Evidence
	Trim     *TrimState       `json:"trim,omitempty"`   // nil: not known yet
	// Warnings are what is to be known although the disk is mounted and well.
	Warnings []Warning `json:"warnings,omitempty"`
}

// Member is one disk of a stripe, or the one that is encrypted.
type Member struct {
	DiskID    string `json:"diskID"`
	Device    string `json:"device,omitempty"` // empty: it is not there
	SizeBytes int64  `json:"sizeBytes,omitempty"`
}

// IDs returns the ids of all disks that are known.
func (s State) IDs() (ids []string) {
	for _, m := range s.Members {
		ids = append(ids, m.DiskID)
	}
	if len(ids) == 0 && s.DiskID != "" {
		ids = []string{s.DiskID}
	}
	return ids
}

// Has reports whether id is the disk, or one of the stripe.
func (s State) Has(id string) bool { return slices.Contains(s.IDs(), id) }

// Past is what the ledger says was done to a disk.
type Past struct {
	State string    `json:"state"`
	At    time.Time `json:"at"`
}

// Step is one step of what was done to a disk.
type Step struct {
	Name  string    `json:"name"`
	Began time.Time `json:"began"`
	Ended time.Time `json:"ended,omitzero"` // zero: not yet
}

// The states of a disk that are not an error's reason.
const (
	Mounted = "Mounted"
	Planned = "Planned" // the message says what
	Unknown = "Unknown" // it was not looked at yet
)

// Reasons that more than one place knows.
const (
	Proving = "Proving" // every block of it is read
	Hung    = "Hung"    // it is read, and no read returns
	Gone    = "Gone"    // it was mounted in this boot, and its device is not there any more
)

// account is what is told of a disk, from memory, whatever is done to it meanwhile.
type account struct {
	mu       sync.Mutex // guards the rest
	last     State
	all      []Evidence
	steps    []Step
	progress *proof // nil: no disk is being read
	health   Health
	growth   *Warning // of growing; nil: none
	upkeep   upkeep
	moved    chan struct{} // closed when the state, the device or its size is another; nil: nobody waits
}

// begin enters a step, in place of one of the same name, and returns what ends it.
func (a *account) begin(name string) func() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.steps = slices.DeleteFunc(a.steps, func(s Step) bool { return s.Name == name })
	began := time.Now()
	a.steps = append(a.steps, Step{Name: name, Began: began})
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		for i := range a.steps {
			if a.steps[i].Name == name && a.steps[i].Began.Equal(began) {
				a.steps[i].Ended = time.Now()
			}
		}
	}
}

// evidence begins a new list of evidence.
func (a *account) evidence(all []Evidence) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = all
}

func (a *account) evidenceNow() []Evidence {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.all)
}

func (a *account) add(e Evidence) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(slices.Clone(a.all), e)
}

// stand enters how the disk was found to stand.
func (a *account) stand(s State, reading *proof) (news bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	news = (a.last.State == Mounted) != (s.State == Mounted) || a.last.Fenced != s.Fenced
	if s.Since = time.Now(); a.last.State == s.State {
		s.Since = a.last.Since
	}
	if l := a.last; a.moved != nil && (l.State != s.State || l.Device != s.Device || l.DiskID != s.DiskID || l.SizeBytes != s.SizeBytes) {
		close(a.moved)
		a.moved = nil
	}
	a.last, a.progress = s, reading
	return news
}

// healthy enters the disk's health and returns what it was.
func (a *account) healthy(h Health) (before Health) {
	a.mu.Lock()
	defer a.mu.Unlock()
	before, a.health = a.health, h.since(a.health, time.Now())
	return before
}

// Standing is what others have to know of a disk.
type Standing struct {
	Mounted bool
	Fenced  string // why the node must not be given work: the disk is gone; empty: it may
	Health  Health // nil: nothing is known
}

// Standing returns how the disk stands, from memory.
func (d *Disk) Standing() Standing {
	a := &d.account
	a.mu.Lock()
	defer a.mu.Unlock()
	s := Standing{Mounted: a.last.State == Mounted, Health: a.health}
	if a.last.Fenced {
		s.Fenced = a.last.DiskID + " on " + d.want.MountPoint + " is gone"
	}
	return s
}

// State returns how the disk stands, from memory.
func (d *Disk) State() State {
	a := &d.account
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.last
	s.Now, s.Name, s.MountPoint = time.Now(), d.Name(), d.want.MountPoint
	if s.State == "" {
		s.State, s.DiskID, s.FileSystem = Unknown, d.firstID(), d.want.FileSystem
		s.Members = d.members(s.DiskID, nil)
	}
	if a.progress != nil {
		var hung bool
		if s.Message, hung = a.progress.progress(s.Now); hung {
			s.State = Hung
		}
	}
	s.Evidence = append([]Evidence{}, a.all...)
	for _, id := range d.want.DiskIDs {
		for _, e := range d.parts[id].account.evidenceNow() {
			e.Source = id + ": " + e.Source
			s.Evidence = append(s.Evidence, e)
		}
	}
	s.Steps = append([]Step{}, a.steps...)
	if a.growth != nil && s.State == Mounted {
		s.Warnings = append(s.Warnings, *a.growth)
	}
	a.upkeep.tell(&s)
	if !s.Fenced { // which its state says
		s.Health = a.health.bad()
	}
	return s
}

// firstID returns the id by which the disks are named; empty: it is not known yet.
func (d *Disk) firstID() string {
	if ids := d.want.IDs(); len(ids) > 0 {
		return ids[0]
	}
	return ""
}

// members lists the disks under the layers, if there are any; id is that of a single one.
func (d *Disk) members(id string, have []device) (all []Member) {
	ids := d.want.DiskIDs
	if len(ids) == 0 && d.want.Layered() && id != "" {
		ids = []string{id}
	}
	for _, id := range ids {
		m := Member{DiskID: id}
		if i := slices.IndexFunc(have, func(v device) bool { return v.Serial == id }); i >= 0 {
			m.Device, m.SizeBytes = "/dev/"+have[i].Name, have[i].SizeBytes
		}
		all = append(all, m)
	}
	return all
}

// stands says how the disk stands, by what a plan has found. The caller holds mu.
func (d *Disk) stands(have observed, steps []step, err error) {
	s := State{DiskID: d.firstID(), FileSystem: d.want.FileSystem}
	at, berr := raise(d.want, have)
	if berr == nil {
		dev := at.dev()
		s.DiskID, s.Device, s.SizeBytes = at.disks[0].Serial, "/dev/"+dev.Name, dev.SizeBytes
		if len(at.devs) > 1 {
			s.Device, s.SizeBytes = "", 0 // there is none yet
		}
		for _, l := range at.up {
			s.Layers = append(s.Layers, l.String())
		}
	}
	if b := have.Binding; b != nil && s.DiskID == "" {
		s.DiskID = b.DiskID
	}
	s.Members = d.members(s.DiskID, have.Devices)
	s.BoundBy, s.Binding = d.boundBy(have, s.DiskID)
	if past, ok := have.Ledger[s.DiskID]; ok {
		s.FileSystem, s.UUID, s.Proof, s.Ledger = past.FileSystem, past.UUID, past.Proof, &Past{past.State, past.At}
	}
	switch {
	case err != nil:
		s.State, s.Message = node.ReasonOf(err, "Error"), err.Error()
	case have.Growing != "":
		s.State, s.Message = Mounted, have.Growing
	case len(steps) > 0 && steps[0].verb == grow:
		s.State, s.Message = Mounted, steps[0].text
	case len(steps) > 0:
		s.State, s.Message = Planned, steps[0].text
	default:
		s.State = Mounted
	}
	s.Fenced = have.Was != nil && (have.Lost != "" || !have.Was.Gone.IsZero())
	if s.Fenced && s.DiskID == "" {
		s.DiskID = have.Was.DiskID
	}
	if d.account.stand(s, d.proof) {
		d.tell()
	}
}
