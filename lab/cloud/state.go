package cloud

import (
	"cmp"
	"crypto/rand"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"
)

// States of an instance, of an ENI and an address, and of a disk.
// Sources: https://cloud.tencent.com/document/api/213/15753#InstanceStatus and
// the comments of NetworkInterface, PrivateIpAddressSpecification and Disk in
// tencentcloud-sdk-go.
const (
	pending     = "PENDING"
	running     = "RUNNING"
	terminating = "TERMINATING"

	available = "AVAILABLE"
	attaching = "ATTACHING"
	detaching = "DETACHING"
	deleting  = "DELETING"

	unattached = "UNATTACHED"
	attached   = "ATTACHED"
)

// Instance is a CVM.
type Instance struct {
	ID        string
	Name      string
	UUID      string
	Type      string
	Image     string
	Zone      string
	State     string
	PrivateIP netip.Addr
	Created   time.Time
	// SpotTermination is when the cloud takes the instance back; zero: not yet
	// said.
	SpotTermination time.Time `json:",omitzero"`

	userData []byte
}

// ENI is an elastic network interface. It is attached while Instance is set and
// State is AVAILABLE.
type ENI struct {
	ID             string
	Name           string
	Description    string
	Subnet         string
	MAC            string // lower case
	Primary        bool
	State          string
	SecurityGroups []string
	Tags           []Tag
	IPs            []IP // the primary first
	IP6s           []IP `json:",omitempty"` // none is primary
	Instance       string
	DeviceIndex    int
	AttachType     int // 1: an extension ENI
	Created        time.Time
	Attached       time.Time
}

// IP is an address of an ENI.
type IP struct {
	Addr    netip.Addr
	Primary bool
	State   string
}

// Tag is a tag of a resource.
type Tag struct{ Key, Value string }

// Disk is a CBS disk.
type Disk struct {
	ID                 string
	Name               string
	Type               string // CLOUD_PREMIUM
	System             bool
	SizeGiB            int
	State              string
	Zone               string
	Instance           string
	LastInstance       string
	DeleteWithInstance bool
	Content            string // see DiskSpec
	Encrypted          bool   `json:",omitempty"`
	Snapshot           string // that Content is said to be
	Created            time.Time
	Attached           time.Time // the order in which an instance has its disks
}

// copy returns an ENI that shares nothing with e.
func (e ENI) copy() ENI {
	e.IPs, e.IP6s = slices.Clone(e.IPs), slices.Clone(e.IP6s)
	e.Tags, e.SecurityGroups = slices.Clone(e.Tags), slices.Clone(e.SecurityGroups)
	return e
}

// attachedTo returns the instance that the ENI is described as attached to: while
// it is being created, none.
func (e ENI) attachedTo() string {
	if e.State == pending {
		return ""
	}
	return e.Instance
}

// addrs lists the addresses of both families, the primary first.
func (e ENI) addrs() []IP { return slices.Concat(e.IPs, e.IP6s) }

// usable lists the addresses that packets of the ENI may carry.
func (e ENI) usable() []netip.Addr {
	var addrs []netip.Addr
	for _, ip := range e.addrs() {
		if ip.State == available {
			addrs = append(addrs, ip.Addr)
		}
	}
	return addrs
}

func (e ENI) hasAddr(a netip.Addr) bool {
	return slices.ContainsFunc(e.addrs(), func(ip IP) bool { return ip.Addr == a })
}

func (e ENI) mac() net.HardwareAddr {
	hw, err := net.ParseMAC(e.MAC)
	if err != nil {
		panic(err) // newMAC wrote it
	}
	return hw
}

// port returns the end of the ENI in the VPC, for an instance of that name.
func (e ENI) port(hostname string) Port {
	p := Port{ENI: e.ID, MAC: e.mac(), Subnet: e.Subnet, Primary: e.Primary, Hostname: hostname}
	for _, ip := range e.addrs() {
		p.Addrs = append(p.Addrs, ip.Addr)
	}
	return p
}

// table holds rows by id, with what they were before, so that what is described
// can be late. Rows are never changed in place.
type table[T any] struct {
	rows map[string][]version[T]
}

type version[T any] struct {
	at   time.Time
	row  T
	gone bool
}

// remembered is how late what is described can be made.
const remembered = 10 * time.Minute

// get returns a row as it is.
func (t *table[T]) get(id string) (T, bool) {
	if v := t.rows[id]; len(v) > 0 && !v[len(v)-1].gone {
		return v[len(v)-1].row, true
	}
	var none T
	return none, false
}

// put makes row what id is from now on.
func (t *table[T]) put(id string, row T) { t.write(id, version[T]{at: time.Now(), row: row}) }

// drop removes a row.
func (t *table[T]) drop(id string) { t.write(id, version[T]{at: time.Now(), gone: true}) }

func (t *table[T]) write(id string, v version[T]) {
	if t.rows == nil {
		t.rows = map[string][]version[T]{}
	}
	history := append(t.rows[id], v)
	for len(history) > 1 && v.at.Sub(history[1].at) > remembered {
		history = history[1:]
	}
	t.rows[id] = history
	maps.DeleteFunc(t.rows, func(_ string, h []version[T]) bool {
		last := h[len(h)-1]
		return last.gone && v.at.Sub(last.at) > remembered
	})
}

// asOf lists the rows as they were, ordered by id.
func (t *table[T]) asOf(at time.Time) []T {
	type entry struct {
		id  string
		row T
	}
	var found []entry
	for id, history := range t.rows {
		for _, v := range slices.Backward(history) {
			if !v.at.After(at) {
				if !v.gone {
					found = append(found, entry{id, v.row})
				}
				break
			}
		}
	}
	slices.SortFunc(found, func(a, b entry) int { return cmp.Compare(a.id, b.id) })
	rows := make([]T, len(found))
	for i, f := range found {
		rows[i] = f.row
	}
	return rows
}

// all lists the rows as they are, ordered by id.
func (t *table[T]) all() []T { return t.asOf(time.Now()) }

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b) // never fails, as of Go 1.24
	return b
}

// newMAC returns one that no ENI has. The caller holds mu.
func (r *Region) newMAC() string {
	for {
		b := randomBytes(3)
		mac := net.HardwareAddr{0x52, 0x54, 0x00, b[0], b[1], b[2]}.String()
		if !slices.ContainsFunc(r.enis.all(), func(e ENI) bool { return e.MAC == mac }) {
			return mac
		}
	}
}

// takeAddrs picks n free addresses of the subnet, the lowest first: an address
// that was given back is soon somebody else's. The caller holds mu.
func (r *Region) takeAddrs(s Subnet, n int) ([]netip.Addr, error) {
	used := r.usedAddrs()
	var free []netip.Addr
	for a := s.First; len(free) < n; a = a.Next() {
		if !s.CIDR.Contains(a.Next()) { // a is the broadcast address
			return nil, refuse("ResourceInsufficient.Subnet", "subnet %s has %d free addresses, %d are asked for", s.ID, len(free), n)
		}
		if !used[a] {
			free = append(free, a)
		}
	}
	return free, nil
}

// checkAddr says whether an address may be given to an ENI. The caller holds mu.
func (r *Region) checkAddr(s Subnet, a netip.Addr) error {
	switch {
	case !s.CIDR.Contains(a):
		return refuse("InvalidParameterValue.Range", "address %s is not in subnet %s %s", a, s.ID, s.CIDR)
	case a.Less(s.First) || !s.CIDR.Contains(a.Next()):
		return refuse("InvalidParameterValue.Reserved", "address %s is reserved in subnet %s", a, s.ID)
	case r.usedAddrs()[a]:
		return refuse("ResourceInUse", "address %s is in use", a)
	}
	return nil
}

func (r *Region) usedAddrs() map[netip.Addr]bool {
	used := map[netip.Addr]bool{}
	for _, e := range r.enis.all() {
		for _, ip := range e.addrs() {
			used[ip.Addr] = true
		}
	}
	return used
}

// freeAddrs counts the addresses that a subnet still has. The caller holds mu.
func (r *Region) freeAddrs(s Subnet) (free, total int) {
	for a := s.First; s.CIDR.Contains(a.Next()); a = a.Next() {
		total++
	}
	free = total
	for a := range r.usedAddrs() {
		if s.CIDR.Contains(a) {
			free--
		}
	}
	return free, total
}

// refusal is an error with the code that the API answers.
type refusal struct{ Code, Message string }

func (e *refusal) Error() string { return e.Code + ": " + e.Message }

func refuse(code, format string, args ...any) error {
	return &refusal{code, fmt.Sprintf(format, args...)}
}
