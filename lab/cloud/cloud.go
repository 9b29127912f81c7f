// Package cloud is the control plane of one Tencent Cloud region: instances,
// ENIs, addresses, disks, CAM roles and quotas, in memory, behind the two
// handlers that a CVM can reach, the signed API and the metadata service.
//
// It is a server, so that clients are tested as they ship: it checks signatures,
// policies, quotas and rates, is asynchronous and eventually consistent, and
// fails on request (Inject). It answers with no field that the vendor's SDK does
// not have; a test holds it to that, and another drives it with the SDK itself.
//
// It moves no packet and runs no machine: it tells a Fabric and a Hypervisor
// what to do, and decides when. It keeps nothing on disk.
package cloud

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/tencent"
)

// Config describes a region. Default returns that of the lab.
type Config struct {
	Region         string
	Zones          []Zone
	AppID          string
	OwnerUin       string // the account
	VPCID          string
	Subnets        []Subnet
	SecurityGroups []string
	Images         []string // ids that instances may be launched from
	Role           string   // the CAM role of every instance
	Policy         []byte   // the role's policy document
	Domain         string   // the API of service x answers at x.Domain
	Delays         Delays
	CredentialLife time.Duration
	MaxENIs        int          // in the VPC
	Log            *slog.Logger // default slog.Default()
}

// Zone is an availability zone.
type Zone struct {
	Name string // ap-guangzhou-3
	ID   int    // 100003
}

// Subnet is a subnet of the VPC. Its first address is the gateway; those below
// First are the lab's own and are never handed out.
type Subnet struct {
	ID    string
	CIDR  netip.Prefix
	CIDR6 netip.Prefix // a /64; none: the subnet has no IPv6
	Zone  string
	First netip.Addr
}

// Gateway of the subnet.
func (s Subnet) Gateway() netip.Addr { return s.CIDR.Masked().Addr().Next() }

// six is the subnet with its IPv6 range for its IPv4 one. Addresses begin after the
// anycast address of its routers and the first one, which some write as the gateway.
func (s Subnet) six() Subnet {
	s.CIDR = s.CIDR6
	s.First = s.CIDR6.Masked().Addr().Next().Next()
	return s
}

// Delays say how long the cloud takes.
type Delays struct {
	Attach  time.Duration // to attach or detach an ENI or a disk
	Task    time.Duration // of every other asynchronous action
	Visible time.Duration // until a change shows up in what is described, and in metadata
}

// Default is the region that the lab has. What the role may do is what the agent
// says that it needs; all else is denied.
func Default() Config {
	return Config{
		Region:   "ap-guangzhou",
		Zones:    []Zone{{"ap-guangzhou-3", 100003}, {"ap-guangzhou-4", 100004}},
		AppID:    "1250000000",
		OwnerUin: "100000000001",
		VPCID:    "vpc-lab00001",
		Subnets: []Subnet{
			{"subnet-node0001", netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("2001:db8:0:1::/64"), "ap-guangzhou-3", netip.MustParseAddr("10.0.0.30")},
			{"subnet-pods0001", netip.MustParsePrefix("10.0.16.0/20"), netip.MustParsePrefix("2001:db8:0:10::/64"), "ap-guangzhou-3", netip.MustParseAddr("10.0.16.2")},
		},
		SecurityGroups: []string{"sg-lab00001", "sg-lab00002"},
		Images:         []string{"img-lab00001"},
		Role:           "TKENodeRole",
		Policy:         tencent.Policy,
		Domain:         "internal.tencentcloudapi.com",
		Delays:         Delays{Attach: 3 * time.Second, Task: 500 * time.Millisecond, Visible: 2 * time.Second},
		CredentialLife: 2 * time.Hour,
		// "CVM instances in the same VPC can bind up to 1,000 ENIs":
		// https://cloud.tencent.com/document/product/576/18527
		MaxENIs: 1000,
	}
}

// NIC is the end of an ENI in a machine.
type NIC struct {
	ENI string
	MAC net.HardwareAddr
}

// Volume is the end of a CBS disk in a machine: its serial is its id. One that
// the hypervisor has not seen yet is a copy of Content, and zeros after it.
type Volume struct {
	Disk    string
	SizeGiB int
	Content string // a file; empty: none
	// Encrypted says that a guest sees another size only of a disk that is plugged anew.
	Encrypted bool
}

// Machine is what an instance is started from.
type Machine struct {
	Instance  string
	UUID      string
	Hostname  string
	Image     string
	CPUs      int
	MemoryMiB int
	UserData  []byte
	NICs      []NIC    // the primary first
	Volumes   []Volume // data disks, in the order of the launch
}

// Hypervisor runs machines. Each call returns when it is done or ctx ends; none
// is made twice at once for the same device.
type Hypervisor interface {
	Run(ctx context.Context, m Machine) error
	Destroy(ctx context.Context, instance string) error
	PlugNIC(ctx context.Context, instance string, n NIC) error
	UnplugNIC(ctx context.Context, instance, eni string) error
	PlugDisk(ctx context.Context, instance string, v Volume) error
	UnplugDisk(ctx context.Context, instance, disk string) error
	// ResizeDisk makes a disk as large as v says, whether or not its machine runs;
	// without an instance it has none.
	ResizeDisk(ctx context.Context, instance string, v Volume) error
}

// Port is the end of an ENI in the VPC.
type Port struct {
	ENI      string
	MAC      net.HardwareAddr
	Subnet   string
	Addrs    []netip.Addr // the primary address first
	Primary  bool         // its address is given by DHCP
	Hostname string
}

// Fabric is the VPC. A port exists from before its NIC is plugged until after it
// is unplugged.
type Fabric interface {
	Attach(p Port) error
	SetAddrs(eni string, addrs []netip.Addr) error
	Detach(eni string) error
}

// Region is a running region.
type Region struct {
	config     Config
	policy     policy
	hypervisor Hypervisor
	fabric     Fabric
	log        *slog.Logger

	mu        sync.Mutex // guards what follows; never held while the hypervisor works
	instances table[Instance]
	enis      table[ENI]
	disks     table[Disk]
	claimed   map[string]bool // ENIs and disks that a task works on
	tasks     map[string]*task
	keys      map[string]*roleKey // by secret id
	replies   map[string]*reply   // by action and ClientToken
	rates     map[string]*rate
	calls     map[string]int
	faults    faults

	ctx     context.Context // of every task
	stop    context.CancelFunc
	running sync.WaitGroup
}

// New starts a region in which there is nothing yet.
func New(config Config, h Hypervisor, f Fabric) (*Region, error) {
	p, err := parsePolicy(config.Policy)
	if err != nil {
		return nil, fmt.Errorf("CAM policy of role %s: %w", config.Role, err)
	}
	r := &Region{
		config: config, policy: p, hypervisor: h, fabric: f, log: config.Log,
		claimed: map[string]bool{}, tasks: map[string]*task{}, keys: map[string]*roleKey{},
		replies: map[string]*reply{}, rates: map[string]*rate{}, calls: map[string]int{},
	}
	if r.log == nil {
		r.log = slog.Default()
	}
	r.ctx, r.stop = context.WithCancel(context.Background())
	return r, nil
}

// Close cuts every task off and waits for it. It leaves machines and ports alone.
func (r *Region) Close() {
	r.mu.Lock() // no task begins while the others are waited for
	r.stop()
	r.mu.Unlock()
	r.running.Wait()
}

// API is the handler of the signed API, for every service's host.
func (r *Region) API() http.Handler { return http.HandlerFunc(r.serveAPI) }

// Metadata is the handler of the metadata service. It knows an instance by the
// source address of the request.
func (r *Region) Metadata() http.Handler { return http.HandlerFunc(r.serveMetadata) }

func (r *Region) subnet(id string) (Subnet, bool) {
	for _, s := range r.config.Subnets {
		if s.ID == id {
			return s, true
		}
	}
	return Subnet{}, false
}

// newID returns prefix and 8 random lower-case letters and digits.
func newID(prefix string) string {
	const letters = "0123456789abcdefghijklmnopqrstuvwxyz"
	b := randomBytes(8)
	for i := range b {
		b[i] = letters[int(b[i])%len(letters)]
	}
	return prefix + string(b)
}

func newUUID() string {
	b := randomBytes(16)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	s := hex.EncodeToString(b)
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}
