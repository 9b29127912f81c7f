package eni

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// Slot is a place for one secondary ENI: its number names the ENI's routing
// table, rule and mark, whatever ENI and device are in it.
type Slot struct {
	Number int `json:"number"`
	// Generation counts the ENIs that were in the slot. It is part of the tokens
	// of calls, so that a new ENI is not taken for the old one.
	Generation int `json:"generation"`

	ENI     string       `json:"eni,omitempty"`
	MAC     string       `json:"mac,omitempty"` // lower case
	Subnet  netip.Prefix `json:"subnet,omitzero"`
	Primary netip.Addr   `json:"primary,omitzero"` // of the ENI; not given to pods
	Addrs   []netip.Addr `json:"addrs,omitempty"`  // those that pods may have, in order
	// The same of IPv6, where pods get it. The API knows no primary one: the first is
	// kept, for what the node itself has to say on the ENI.
	Subnet6  netip.Prefix `json:"subnet6,omitzero"`
	Primary6 netip.Addr   `json:"primary6,omitzero"`
	Addrs6   []netip.Addr `json:"addrs6,omitempty"`

	// Intent is the call that is being made or whose outcome is not known.
	Intent Step      `json:"intent,omitempty"`
	Since  time.Time `json:"since,omitzero"`
	// Target is how many addresses for pods the ENI has after a creation or an
	// assignment, or how many of IPv6 in all after one of those; SubnetID where it is
	// created: a creation of which nothing was heard is repeated to the letter.
	Target   int    `json:"target,omitempty"`
	SubnetID string `json:"subnetID,omitempty"`
	// Leaving are the addresses that are being given back: no pod gets them, though
	// the cloud may still show them.
	Leaving []netip.Addr `json:"leaving,omitempty"`
	// Task is the cloud's, of a creation: that it has failed ends a wait.
	Task string `json:"task,omitempty"`
	// Calls counts intents, so that each gets a token of its own.
	Calls int `json:"calls,omitempty"`
	// Groups are the security groups of an ENI that is given to pods whole, and
	// AttachType is how it is attached.
	Groups     []string `json:"groups,omitempty"`
	AttachType int      `json:"attachType,omitempty"`
}

// Step is a mutating call of the cloud's API.
type Step string

// The calls, in the order of an ENI's life.
const (
	stepCreate    Step = "create"
	stepAttach    Step = "attach"
	stepAssign    Step = "assign"
	stepUnassign  Step = "unassign"
	stepAssign6   Step = "assign6"
	stepUnassign6 Step = "unassign6"
	stepDetach    Step = "detach"
	stepDelete    Step = "delete"
)

// taken reports whether an ENI has ever been seen attached in the slot.
func (s Slot) taken() bool { return s.MAC != "" }

// addrs are the addresses that pods may have, of both families.
func (s Slot) addrs() []netip.Addr { return slices.Concat(s.Addrs, s.Addrs6) }

// Gateway is the first address of the subnet.
// Source: https://cloud.tencent.com/document/product/215/20046
func (s Slot) Gateway() netip.Addr { return s.Subnet.Masked().Addr().Next() }

// Pod is one interface of one pod, and the address that it has.
type Pod struct {
	cni.Attachment
	Namespace string     `json:"namespace"`
	Name      string     `json:"name"`
	NetNS     string     `json:"netns"`
	Addr      netip.Addr `json:"addr"`
	Addr6     netip.Addr `json:"addr6,omitzero"` // invalid: the pod has none
	Slot      int        `json:"slot"`
	ENI       string     `json:"eni"`
	MTU       int        `json:"mtu"`
	Since     time.Time  `json:"since"`
	// Of a pod that has the ENI whole: the ENI's MAC, its subnet's gateway, and the
	// security groups that were asked for, with commas between.
	MAC     string     `json:"mac,omitempty"`
	Gateway netip.Addr `json:"gateway,omitzero"`
	Groups  string     `json:"groups,omitempty"`
	// Found says that the ledger was rebuilt then: the pod is older than Since.
	Found bool `json:"found,omitempty"`
}

func (p Pod) String() string { return p.Namespace + "/" + p.Name }

// addrs are the pod's addresses.
func (p Pod) addrs() []netip.Addr {
	if p.Addr6.IsValid() {
		return []netip.Addr{p.Addr, p.Addr6}
	}
	return []netip.Addr{p.Addr}
}

// texts names the pod's addresses, as its alias does.
func (p Pod) texts() string {
	if p.Addr6.IsValid() {
		return p.Addr.String() + "," + p.Addr6.String()
	}
	return p.Addr.String()
}

// has reports whether the pod has an address.
func (p Pod) has(a netip.Addr) bool { return a.IsValid() && (a == p.Addr || a == p.Addr6) }

// rest ends an attachment: its addresses rest until a time.
type rest struct {
	cni.Attachment
	Addr  netip.Addr `json:"addr"`
	Addr6 netip.Addr `json:"addr6,omitzero"`
	Until time.Time  `json:"until"`
}

// begin starts the ledger of an instance in one boot of its kernel.
type begin struct {
	Instance string `json:"instance"`
	Boot     string `json:"boot"`
	// Settled is when addresses may be given out again after the ledger was rebuilt.
	Settled time.Time `json:"settled,omitzero"`
}

// state is what the ledger says.
type state struct {
	begin
	Quota  tencent.ENILimit // of the instance; zero: not asked yet
	Slots  map[int]Slot
	Pods   map[cni.Attachment]Pod
	Rested map[netip.Addr]time.Time // when an address may be used again, or could have been
}

func newState() state {
	return state{Slots: map[int]Slot{}, Pods: map[cni.Attachment]Pod{}, Rested: map[netip.Addr]time.Time{}}
}

// apply takes one record in.
func (s *state) apply(r record) {
	switch {
	case r.Begin != nil:
		if s.Instance != r.Begin.Instance {
			*s = newState()
		}
		s.begin = *r.Begin
	case r.Quota != nil:
		s.Quota = *r.Quota
	case r.Slot != nil:
		s.Slots[r.Slot.Number] = *r.Slot
		for key, p := range s.Pods {
			if p.ENI == "" && p.Slot == r.Slot.Number { // of a ledger that was rebuilt
				p.ENI = r.Slot.ENI
				p.bind(*r.Slot)
				s.Pods[key] = p
			}
		}
	case r.Pod != nil:
		s.Pods[r.Pod.Attachment] = *r.Pod
	case r.Rest != nil:
		delete(s.Pods, r.Rest.Attachment)
		s.Rested[r.Rest.Addr] = r.Rest.Until
		if a := r.Rest.Addr6; a.IsValid() {
			s.Rested[a] = r.Rest.Until
		}
	}
}

// records returns the shortest journal that leads to the state. An address that
// has rested is remembered while an ENI has it, so that the order of use is kept.
func (s state) records(now time.Time) []record {
	out := []record{{Begin: &s.begin}}
	if s.Quota != (tencent.ENILimit{}) {
		out = append(out, record{Quota: &s.Quota})
	}
	held := map[netip.Addr]bool{}
	for _, slot := range s.slots() {
		out = append(out, record{Slot: &slot})
		for _, a := range slot.addrs() {
			held[a] = true
		}
	}
	for addr, until := range s.Rested {
		if held[addr] || until.After(now) {
			out = append(out, record{Rest: &rest{Addr: addr, Until: until}})
		}
	}
	for _, p := range s.pods() {
		out = append(out, record{Pod: &p})
	}
	return out
}

func (s state) slots() []Slot {
	return slices.SortedFunc(maps.Values(s.Slots), func(a, b Slot) int { return cmp.Compare(a.Number, b.Number) })
}

func (s state) pods() []Pod {
	return slices.SortedFunc(maps.Values(s.Pods), func(a, b Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name),
			cmp.Compare(a.ContainerID, b.ContainerID), cmp.Compare(a.IfName, b.IfName))
	})
}

// slots6 returns the slots whose ENI has an IPv6 address of its own.
func (s state) slots6() map[int]bool {
	six := map[int]bool{}
	for n, slot := range s.Slots {
		if slot.Primary6.IsValid() {
			six[n] = true
		}
	}
	return six
}

// dual reports whether an ENI or a pod has an IPv6 address.
func (s state) dual() bool {
	if len(s.slots6()) > 0 {
		return true
	}
	for _, p := range s.Pods {
		if p.Addr6.IsValid() {
			return true
		}
	}
	return false
}

// holders returns who has which address.
func (s state) holders() map[netip.Addr]cni.Attachment {
	used := make(map[netip.Addr]cni.Attachment, len(s.Pods))
	for key, p := range s.Pods {
		for _, a := range p.addrs() {
			used[a] = key
		}
	}
	return used
}

// restsUntil returns when a pod may have the address again, or could have had; zero:
// as far as is known, no pod ever had it.
func (s state) restsUntil(a netip.Addr) time.Time {
	if until := s.Rested[a]; until.After(s.Settled) {
		return until
	}
	return s.Settled
}

func (s state) clone() state {
	return state{begin: s.begin, Quota: s.Quota, Slots: maps.Clone(s.Slots), Pods: maps.Clone(s.Pods), Rested: maps.Clone(s.Rested)}
}

// ledger is what must outlive the agent: the ENI of each slot with the intents of
// calls, who has which address, and until when an address rests. Every change is
// in the journal before it is in memory.
type ledger struct {
	path string
	log  *slog.Logger
	// witness returns what the node still knows, once it is known whose ledger this is.
	witness func() (witness, bool, error)

	mu      sync.Mutex // guards everything below
	journal *journal   // nil until opened
	now     state
	version int // counts changes of now
	used    map[netip.Addr]cni.Attachment
	// clean are the rested addresses whose old connections the kernel was made to
	// forget. It is not journalled: to forget them twice does no harm.
	clean   map[netip.Addr]bool
	changed chan struct{} // closed and replaced at every change
}

func newLedger(dir string, log *slog.Logger) *ledger {
	return &ledger{
		path: filepath.Join(dir, "ledger"), log: log, changed: make(chan struct{}),
		witness: func() (witness, bool, error) { return witness{}, false, nil },
	}
}

// open reads the journal if that has not been done. The caller holds mu.
func (l *ledger) open() error {
	if l.journal != nil {
		return nil
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	return l.openIn(strings.TrimSpace(string(boot)))
}

func (l *ledger) openIn(boot string) error {
	w, sealed, err := l.witness()
	if err != nil {
		return fmt.Errorf("open ledger: %w", err)
	}
	j, all, err := openJournal(l.path)
	damaged := err
	if errors.Is(err, errDamaged) {
		if !sealed {
			return node.Terminal("LedgerDamaged", "seal a configuration: the ledger is then rebuilt from the kernel and the cloud", err)
		}
		// Kept for whoever wants to know; its lock went with it.
		if err := os.Rename(l.path, l.path+".damaged"); err != nil {
			return fmt.Errorf("open ledger: %w", err)
		}
		j, all, err = openJournal(l.path)
	}
	if err != nil {
		return fmt.Errorf("open ledger: %w", err)
	}
	s := newState()
	for _, r := range all {
		s.apply(r)
	}
	// No sandbox outlives a reboot, but other nodes may still send to its address.
	if s.Boot != boot {
		for key, p := range s.Pods {
			s.apply(record{Rest: &rest{Attachment: key, Addr: p.Addr, Addr6: p.Addr6, Until: time.Now().Add(coolDown)}})
		}
		s.Boot = boot
	}
	if sealed {
		if why := s.complete(w, damaged, time.Now()); why != nil {
			l.log.Error("ledger rebuilt from the kernel; the cloud completes it", "was wrong", why,
				"pods", len(s.Pods), "no address before", s.Settled)
		}
	}
	if err := j.rewrite(s.records(time.Now())); err != nil {
		return errors.Join(fmt.Errorf("rewrite ledger: %w", err), j.close())
	}
	l.journal, l.now, l.clean = j, s, map[netip.Addr]bool{}
	l.version++
	l.index()
	l.log.Info("ledger opened", "instance", s.Instance, "slots", len(s.Slots), "pods", len(s.Pods), "records", len(all))
	return nil
}

func (l *ledger) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.journal == nil {
		return nil
	}
	err := l.journal.close()
	l.journal = nil
	return err
}

// put journals a record and takes it in. The caller holds mu.
func (l *ledger) put(r record) error {
	if err := l.open(); err != nil {
		return err
	}
	full, err := l.journal.append(r)
	if err != nil {
		return err
	}
	l.now.apply(r)
	l.version++
	l.wake()
	if full {
		return l.journal.rewrite(l.now.records(time.Now()))
	}
	return nil
}

// record journals one record durably.
func (l *ledger) record(r record) error {
	l.mu.Lock()
	err := l.put(r)
	l.mu.Unlock()
	if err != nil {
		return err
	}
	return l.sync()
}

// sync returns once every record put so far is on the disk.
func (l *ledger) sync() error {
	l.mu.Lock()
	j := l.journal
	l.mu.Unlock()
	if j == nil {
		return fmt.Errorf("sync ledger: %w", os.ErrClosed)
	}
	return j.sync()
}

// state returns a copy, and opens the ledger if need be.
func (l *ledger) state() (state, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(); err != nil {
		return state{}, err
	}
	return l.now.clone(), nil
}

// since returns a copy and its version, or only the version if it is still that.
func (l *ledger) since(version int) (state, int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(); err != nil {
		return state{}, 0, err
	}
	if version == l.version {
		return state{}, version, nil
	}
	return l.now.clone(), l.version, nil
}

// wait returns a channel that is closed at the next change.
func (l *ledger) wait() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// begin starts the ledger of another instance: whatever an image carried along
// is forgotten.
func (l *ledger) begin(instance string) error {
	l.mu.Lock()
	b := begin{Instance: instance, Boot: l.now.Boot, Settled: l.now.Settled}
	err := l.put(record{Begin: &b})
	if err == nil {
		l.index()
	}
	l.mu.Unlock()
	if err != nil {
		return err
	}
	return l.sync()
}

// index finds who has which address. The caller holds mu.
func (l *ledger) index() {
	l.used = l.now.holders()
}

// wake wakes whoever waits for a change. The caller holds mu.
func (l *ledger) wake() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// pod returns who has the attachment.
func (l *ledger) pod(key cni.Attachment) (Pod, bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.open(); err != nil {
		return Pod{}, false, err
	}
	p, ok := l.now.Pods[key]
	return p, ok, nil
}

// six reports whether an ENI has an IPv6 address of its own.
func (l *ledger) six() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.now.slots6()) > 0
}

// poke wakes whoever waits for a change.
func (l *ledger) poke() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wake()
}
