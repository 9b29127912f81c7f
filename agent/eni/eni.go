// Package eni gives pods addresses of the VPC. It is two modules and the server
// that the CNI plugin asks. The Pool owns the cloud's side: secondary ENIs of
// this instance, their addresses, and which of them may be used. The Paths own
// the kernel's side: links, routes, rules, nftables and sysctls, on the host and
// in every pod. What both know outlives the agent in the ledger.
//
// The layout in the kernel costs a packet the same however many pods there are:
//
//	rule 512    from all lookup 4000             table 4000: a /32 for every local pod
//	nft map     saddr of a pod → slot of its ENI, as bits of the packet's mark
//	rule 1536+s fwmark of slot s lookup 4001+s   table 4001+s: default through the ENI, else unreachable
//
// Where the NodeConfig has IPv6, every pod has an address of it, too, of the same ENI,
// and all of the above is there once more for it. The differences: an IPv6 address is
// the pod's own wherever its packets go, so there is no source NAT and all that a pod
// opens leaves by the pod's ENI; whether the Internet is reached by it, the cloud
// decides for each address. Nobody asks for a neighbour on a pod's link: both ends know
// the other's MAC for good, and the host's has no address that pods could reach.
//
// A connection that a pod opens by IPv4 to a destination outside of the VPC leaves by the
// primary ENI, which alone can have a public address, under that ENI's address.
// A connection that came in by the primary ENI is answered by it.
// The metadata service, which has the CAM role's credentials, answers only pods
// that the NodeConfig names.
//
// The NodeConfig's layout tke-compat has TKE's rules in the place of the first and
// the last: `512 to <pod> lookup main` and `1536 from <pod> lookup 4001+s`.
//
// A pod that asks for it gets an ENI whole: the ENI's link is moved into the pod, so
// that the ENI's security groups are the pod's. See exclusive.go.
//
// A slot is a number of ours and never a device index: those change with every
// attach, and tables that follow them have collided with other software's.
//
// It is not a network policy or a load balancer, it never configures the primary
// ENI beyond its sysctls, and it deletes nothing that it cannot prove to be its own.
package eni

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// coolDown is how long an address rests after its pod. A connection that another
// node's conntrack holds in SYN_SENT for the old pod lives 120 s
// (nf_conntrack_tcp_timeout_syn_sent); with less, its packets reach the new pod.
const coolDown = 130 * time.Second

// Cloud is what the pool asks of the cloud's API; *tencent.Client does it.
type Cloud interface {
	DescribeENIs(ctx context.Context, instanceID string) ([]tencent.ENI, error)
	DescribeTaggedENIs(ctx context.Context, tags map[string]string) ([]tencent.ENI, error)
	DescribeSubnets(ctx context.Context, ids []string) ([]tencent.Subnet, error)
	ENILimit(ctx context.Context, instanceID string) (tencent.ENILimit, error)
	CreateENI(ctx context.Context, spec tencent.ENISpec) (tencent.ENI, string, error)
	AttachENI(ctx context.Context, eniID, instanceID string, attachType int, clientToken string) (string, error)
	AssignIPs(ctx context.Context, eniID string, n int, clientToken string) ([]tencent.IP, string, error)
	UnassignIPs(ctx context.Context, eniID string, addrs []netip.Addr) (string, error)
	AssignIP6s(ctx context.Context, eniID string, n int, clientToken string) ([]tencent.IP6, string, error)
	UnassignIP6s(ctx context.Context, eniID string, addrs []netip.Addr) (string, error)
	DetachENI(ctx context.Context, eniID, instanceID, clientToken string) (string, error)
	DeleteENI(ctx context.Context, eniID string) (string, error)
	TaskResult(ctx context.Context, taskID string) (tencent.Task, error)
}

// Options say where things are. The zero value of a field is the node's own.
type Options struct {
	// Sealed returns the configuration in force; false while there is none.
	Sealed func() (node.Sealed, bool)
	Cloud  Cloud
	// Sandboxes returns the ids of all that the runtime knows; pods of others are
	// removed in the end. Nil: only the runtime's own DEL and GC remove pods.
	Sandboxes func(context.Context) (map[string]bool, error)
	Log       *slog.Logger

	Dir            string    // of the ledger; /var/lib/tkenode/eni
	Conflist       string    // /etc/cni/net.d/10-tke-eni.conflist
	ConfiguredFile string    // cni.ConfiguredFile
	Plugins        string    // where the runtime has its CNI plugins; /opt/cni/bin
	Queue          cni.Queue // cni.QueueDir
}

// Network is the node's side of a VPC: Pool and Paths, and the CNI server.
type Network struct {
	log    *slog.Logger
	sealed func() (node.Sealed, bool)
	ledger *ledger
	pool   *Pool
	paths  *Paths

	demand    chan struct{} // an ADD has taken an address, or found none
	waiting   atomic.Int32  // ADDs that have found none
	exhausted atomic.Pointer[node.Condition]
	wants     wants // of ADDs that wait for an ENI whole

	explaining chan struct{} // capacity 1: full while one question is answered

	queue     cni.Queue
	sandboxes func(context.Context) (map[string]bool, error)
	lost      lost // used by sweep alone

	mu      sync.Mutex    // guards the rest
	blocked error         // why the pool has no more addresses, as of its last plan
	seen    []tencent.ENI // what the cloud said last of our ENIs
	seenAt  time.Time
}

// New returns the network. It touches nothing before its modules are planned.
func New(o Options) *Network {
	o.Dir = cmp.Or(o.Dir, "/var/lib/tkenode/eni")
	o.Conflist = cmp.Or(o.Conflist, "/etc/cni/net.d/10-tke-eni.conflist")
	o.ConfiguredFile = cmp.Or(o.ConfiguredFile, cni.ConfiguredFile)
	o.Plugins = cmp.Or(o.Plugins, "/opt/cni/bin")
	o.Queue = cmp.Or(o.Queue, cni.QueueDir)
	if o.Log == nil {
		o.Log = slog.Default()
	}
	n := &Network{
		log:    o.Log,
		sealed: o.Sealed,
		ledger: newLedger(o.Dir, o.Log),
		demand: make(chan struct{}, 1),

		explaining: make(chan struct{}, 1),

		queue:     o.Queue,
		sandboxes: o.Sandboxes,
		lost:      lost{},
	}
	n.pool = newPool(n, o.Cloud)
	n.paths = &Paths{network: n, conflist: o.Conflist, configured: o.ConfiguredFile, plugins: o.Plugins}
	n.paths.ready.Store(&map[int]int{})
	n.paths.whole.Store(&map[int]int{})
	n.ledger.witness = n.witness
	return n
}

// Pool returns the module of the cloud's side.
func (n *Network) Pool() *Pool { return n.pool }

// Paths returns the module of the kernel's side.
func (n *Network) Paths() *Paths { return n.paths }

// Close gives up the ledger and the kernel's sockets. Nothing is taken down.
func (n *Network) Close() error {
	n.paths.close()
	return n.ledger.close()
}

// current returns the configuration in force and the ledger's state, once both
// are of this instance.
func (n *Network) current() (node.Sealed, state, error) {
	sealed, ok := n.sealed()
	if !ok {
		return sealed, state{}, node.Waiting("ConfigNotSealed", "no sealed configuration yet")
	}
	s, err := n.ledger.state()
	return sealed, s, err
}

// policy returns what the configuration in force says about packets.
func (n *Network) policy() policy {
	sealed, _ := n.sealed()
	return policyOf(sealed)
}

// setBlocked remembers why no address can be had, for whoever waits for one.
func (n *Network) setBlocked(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.blocked = err
}

// saw remembers what the cloud said, for whoever asks about it.
func (n *Network) saw(enis []tencent.ENI) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.seen, n.seenAt = enis, time.Now()
}

// State is the pool and the pods as they are known now.
type State struct {
	Now  time.Time  `json:"now"` // the agent's clock
	ENIs []ENIState `json:"enis"`
	Pods []PodState `json:"pods"`
	// Blocked says why the pool gets no more addresses, if it wants some.
	Blocked string `json:"blocked,omitempty"`
	// MetadataRefused counts packets of pods that may not ask the metadata service,
	// since the agent last made its nftables table.
	MetadataRefused uint64 `json:"metadataRefused,omitempty"`
	// Waiting is how many ADDs wait for an address.
	Waiting int `json:"waiting,omitempty"`
	// Exhausted says that no pod could be given an address now.
	Exhausted string `json:"exhausted,omitempty"`
	// CloudSeen is when the cloud last told of the ENIs.
	CloudSeen time.Time `json:"cloudSeen,omitzero"`
}

// ENIState is one secondary ENI.
type ENIState struct {
	Slot
	Exclusive      bool           `json:"exclusive,omitempty"` // pods get it whole
	Device         string         `json:"device,omitempty"`    // empty: no link has its MAC
	Ready          bool           `json:"ready"`               // pods can be given its addresses
	SubnetID       string         `json:"subnetID,omitempty"`
	SecurityGroups []string       `json:"securityGroups,omitempty"`
	Addresses      []AddressState `json:"addresses"`
}

// AddressState is one address of an ENI: "free", "used", "cooling" until a time,
// "leaving" while it is given back, or "gone": the cloud has taken it away although
// a pod has it.
type AddressState struct {
	Addr  netip.Addr `json:"addr"`
	State string     `json:"state"`
	Pod   string     `json:"pod,omitempty"`
	Until time.Time  `json:"until,omitzero"`
}

func (s state) addresses(slot Slot, now time.Time) []AddressState {
	all := []AddressState{}
	for _, a := range slot.Leaving {
		all = append(all, AddressState{Addr: a, State: "leaving"})
	}
	for _, a := range slot.addrs() {
		st := AddressState{Addr: a, State: "free"}
		if until := s.restsUntil(a); until.After(now) {
			st.State, st.Until = "cooling", until
		}
		all = append(all, st)
	}
	for _, p := range s.pods() {
		if p.ENI != slot.ENI {
			continue
		}
		for _, addr := range p.addrs() {
			i := slices.IndexFunc(all, func(a AddressState) bool { return a.Addr == addr })
			if i < 0 {
				all = append(all, AddressState{Addr: addr, State: "gone", Pod: p.String()})
				continue
			}
			all[i] = AddressState{Addr: addr, State: "used", Pod: p.String()}
		}
	}
	return all
}
