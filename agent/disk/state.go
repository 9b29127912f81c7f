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
	Members    []Member        `json:"members,omitempty"` // of a stripe, in order
	Layers     []string        `json:"layers,omitempty"`  // between the disks and the file system, as far as they are up
	State      string          `json:"state"`             // Mounted, Planned, or why it is not: Absent, Proving, Foreign, …
	Since      time.Time       `json:"since,omitzero"`
	Message    string          `json:"message,omitempty"`
	MountPoint string          `json:"mountPoint"`
	FileSystem node.FileSystem `json:"fileSystem"` // that it has, or is wanted to have
	UUID       string          `json:"uuid,omitempty"`
	// Proof is what it rested on that the disk was blank, when it was formatted.
	Proof    string     `json:"proof,omitempty"`
	Ledger   *Past      `json:"ledger,omitempty"`
	Evidence []Evidence `json:"evidence"` // of the last proof of this life of the agent
	Steps    []Step     `json:"steps"`    // as Evidence
}

// Member is one disk of a stripe.
type Member struct {
	DiskID    string `json:"diskID"`
	Device    string `json:"device,omitempty"` // empty: it is not there
	SizeBytes int64  `json:"sizeBytes,omitempty"`
}

// Has reports whether id is the disk, or one of the stripe.
func (s State) Has(id string) bool {
	return s.DiskID == id || slices.ContainsFunc(s.Members, func(m Member) bool { return m.DiskID == id })
}

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

// account is what is told of a disk, from memory, whatever is done to it meanwhile.
type account struct {
	mu       sync.Mutex // guards the rest
	last     State
	all      []Evidence
	steps    []Step
	progress *proof // nil: no disk is being read
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
func (a *account) stand(s State, reading *proof) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s.Since = time.Now(); a.last.State == s.State {
		s.Since = a.last.Since
	}
	a.last, a.progress = s, reading
}

// State returns how the disk stands, from memory.
func (d *Disk) State() State {
	a := &d.account
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.last
	s.Now, s.Name, s.MountPoint = time.Now(), d.Name(), d.want.MountPoint
	if s.State == "" {
		s.State, s.DiskID, s.FileSystem = Unknown, d.want.DiskID, d.want.FileSystem
	}
	if a.progress != nil {
		s.Message = a.progress.progress(s.Now)
	}
	s.Evidence = append([]Evidence{}, a.all...)
	for _, id := range d.want.DiskIDs {
		for _, e := range d.parts[id].account.evidenceNow() {
			e.Source = id + ": " + e.Source
			s.Evidence = append(s.Evidence, e)
		}
	}
	s.Steps = append([]Step{}, a.steps...)
	return s
}

// stands says how the disk stands, by what a plan has found. The caller holds mu.
func (d *Disk) stands(have observed, steps []step, err error) {
	s := State{DiskID: d.want.DiskID, FileSystem: d.want.FileSystem}
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
	} else if len(d.want.DiskIDs) > 0 {
		s.DiskID = d.want.DiskIDs[0]
	}
	for _, id := range d.want.DiskIDs {
		m := Member{DiskID: id}
		if i := slices.IndexFunc(have.Devices, func(v device) bool { return v.Serial == id }); i >= 0 {
			m.Device, m.SizeBytes = "/dev/"+have.Devices[i].Name, have.Devices[i].SizeBytes
		}
		s.Members = append(s.Members, m)
	}
	if past, ok := have.Ledger[s.DiskID]; ok {
		s.FileSystem, s.UUID, s.Proof, s.Ledger = past.FileSystem, past.UUID, past.Proof, &Past{past.State, past.At}
	}
	switch {
	case err != nil:
		s.State, s.Message = node.ReasonOf(err, "Error"), err.Error()
	case len(steps) > 0:
		s.State, s.Message = Planned, steps[0].text
	default:
		s.State = Mounted
	}
	d.account.stand(s, d.proof)
}
