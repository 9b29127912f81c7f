package eni

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// newLifeNode is a node with TKE's warm addresses, and the quota of its type: three
// secondary ENIs of nine addresses for pods.
func newLifeNode(t *testing.T, config cloud.Config) *poolNode {
	n := newPoolNodeIn(t, config)
	n.sealed.Config.Network.ENIs, n.sealed.Config.Network.IPsPerENI = 0, 0
	n.sealed.Config.Network.WarmIPs = node.WarmIPs{Min: 5, Max: 5}
	return n
}

// engine does what the engine does, with its pauses, until done says so.
func (n *poolNode) engine(limit time.Duration, done func() bool) error {
	n.t.Helper()
	end := time.Now().Add(limit)
	var err error
	for !done() {
		if time.Now().After(end) {
			return fmt.Errorf("not there after %s: %w", limit, err)
		}
		var plan node.Plan
		if plan, err = n.net.Pool().Plan(n.t.Context()); err == nil {
			err = n.net.Pool().Apply(n.t.Context(), plan)
		}
		switch {
		case errors.Is(err, errKilled):
			return err
		case err != nil:
			time.Sleep(time.Second)
		case plan.Empty():
			time.Sleep(min(plan.Again, cmp.Or(n.pause, time.Minute)))
		}
	}
	return nil
}

func (n *poolNode) state() state {
	n.t.Helper()
	s, err := n.net.ledger.state()
	if err != nil {
		n.t.Fatal(err)
	}
	return s
}

// add gives pods addresses, as ADDs at once do.
func (n *poolNode) add(first, count int) error {
	n.t.Helper()
	left := count
	return n.engine(20*time.Minute, func() bool {
		for left > 0 {
			ready := map[int]int{}
			for _, slot := range n.state().slots() {
				if slot.taken() {
					ready[slot.Number] = 1500
				}
			}
			id := fmt.Sprintf("c%d", first+count-left)
			rested, _ := n.net.ledger.unclean(time.Now())
			n.net.ledger.cleaned(rested) // as the paths do
			ask := Pod{Attachment: cni.Attachment{ContainerID: id, IfName: "eth0"}, Namespace: "default", Name: id}
			if n.sealed.Config.Network.DualStack() {
				ask.Addr6 = wantsIPv6
			}
			p, _, err := n.net.ledger.allocate(ask, ready, time.Now())
			if err != nil {
				n.t.Fatal(err)
			}
			if !p.Addr.IsValid() {
				break
			}
			left--
		}
		n.net.waiting.Store(int32(left))
		return left == 0
	})
}

// del ends the pods of a slot but for some of them.
func (n *poolNode) del(slot, keep int) {
	n.t.Helper()
	for _, p := range n.state().pods() {
		if p.Slot != slot {
			continue
		}
		if keep--; keep >= 0 {
			continue
		}
		if err := n.net.ledger.release(p.Attachment, time.Now()); err != nil {
			n.t.Fatal(err)
		}
	}
}

// settled reports whether cloud, ledger and what is wanted are the same, and what
// is not.
func (n *poolNode) settled() error {
	n.t.Helper()
	s, warm := n.state(), n.sealed.Config.Network.WarmIPs
	inSlots := map[string]Slot{}
	for _, slot := range s.slots() {
		switch {
		case slot.Intent != "":
			return fmt.Errorf("slot %d: %s is under way", slot.Number, slot.Intent)
		case slot.ENI != "":
			inSlots[slot.ENI] = slot
		}
	}
	free, holder := 0, map[netip.Addr]bool{}
	if six := s.holders(); len(six) != len(s.Pods) && (!n.sealed.Config.Network.DualStack() || len(six) != 2*len(s.Pods)) {
		n.t.Fatalf("%d pods have %d addresses", len(s.Pods), len(six))
	}
	for _, p := range s.pods() {
		holder[p.Addr] = true
	}
	for _, e := range n.region.Snapshot().ENIs {
		if e.Primary {
			continue
		}
		slot, ok := inSlots[e.ID]
		if !ok || e.Instance != n.sealed.Facts.InstanceID || slot.Primary != e.IPs[0].Addr {
			return fmt.Errorf("%s, of %q, is %s and in slot %+v", e.ID, e.Instance, e.State, slot)
		}
		delete(inSlots, e.ID)
		if err := n.paired(slot, e); err != nil {
			return err
		}
		var addrs []netip.Addr
		for _, ip := range e.IPs[1:] {
			addrs = append(addrs, ip.Addr)
		}
		if slices.SortFunc(addrs, netip.Addr.Compare); !slices.Equal(addrs, slot.Addrs) {
			return fmt.Errorf("%s has %v, slot %d has %v", e.ID, addrs, slot.Number, slot.Addrs)
		}
		for _, a := range addrs {
			if !holder[a] && !s.Rested[a].After(time.Now()) {
				free++
			}
			delete(holder, a)
		}
	}
	if len(inSlots) > 0 || len(holder) > 0 {
		return fmt.Errorf("the cloud does not have the ENIs %v and the pods' addresses %v", inSlots, holder)
	}
	if free < warm.Min || free > warm.Max {
		return fmt.Errorf("%d addresses are free", free)
	}
	return nil
}

// paired reports whether the ENI has an IPv6 address for every other, if pods get them,
// and what is not as in the ledger.
func (n *poolNode) paired(slot Slot, e cloud.ENI) error {
	if !n.sealed.Config.Network.DualStack() {
		if slot.count6()+len(e.IP6s) > 0 {
			return fmt.Errorf("%s has %v, slot %d has %v", e.ID, e.IP6s, slot.Number, slot.Addrs6)
		}
		return nil
	}
	var addrs []netip.Addr
	for _, ip := range e.IP6s {
		addrs = append(addrs, ip.Addr)
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	if have := slices.SortedFunc(slices.Values(append(slot.Addrs6, slot.Primary6)), netip.Addr.Compare); !slices.Equal(addrs, have) || len(addrs) != len(e.IPs) {
		return fmt.Errorf("%s has %v beside %d of IPv4, slot %d has %v", e.ID, addrs, len(e.IPs), slot.Number, have)
	}
	for _, p := range n.state().pods() {
		if p.ENI == e.ID && p.Addr6.IsValid() && !slices.Contains(slot.Addrs6, p.Addr6) {
			return fmt.Errorf("pod %s has %s, slot %d has %v", p, p.Addr6, slot.Number, slot.Addrs6)
		}
	}
	return nil
}

func (n *poolNode) converges(limit time.Duration) error {
	n.t.Helper()
	err := n.engine(limit, func() bool { return n.settled() == nil })
	if err != nil && !errors.Is(err, errKilled) {
		err = errors.Join(err, n.settled())
	}
	return err
}

// slotOfMost returns the slot with most pods, and how many secondary ENIs there are.
func (n *poolNode) slotOfMost() (most, enis int) {
	used := map[int]int{}
	s := n.state()
	for _, p := range s.pods() {
		used[p.Slot]++
	}
	for _, slot := range s.slots() {
		if slot.taken() {
			enis++
		}
		if used[slot.Number] > used[most] {
			most = slot.Number
		}
	}
	return most, enis
}

// life is the whole life of the pool: the first ENI, a burst that needs all three,
// the end of most pods, an hour in which what is not needed goes, and the last ENI
// torn out from under its pods.
var life = []func(n *poolNode) error{
	func(n *poolNode) error { return n.converges(time.Hour) },
	func(n *poolNode) error { return n.add(len(n.state().Pods), 20-len(n.state().Pods)) },
	func(n *poolNode) error { return n.converges(time.Hour) },
	func(n *poolNode) error {
		most, _ := n.slotOfMost()
		for _, slot := range n.state().slots() {
			if slot.Number == most {
				n.del(slot.Number, 2)
			} else {
				n.del(slot.Number, 0)
			}
		}
		return nil
	},
	func(n *poolNode) error {
		return n.engine(3*time.Hour, func() bool {
			_, enis := n.slotOfMost()
			return enis == 1 && n.settled() == nil
		})
	},
	func(n *poolNode) error {
		n.tearOut()
		return nil
	},
	func(n *poolNode) error { return n.converges(time.Hour) },
}

// live goes through the life from a stage on, and returns the stage in which the
// agent was killed.
func (n *poolNode) live(from int) (int, error) {
	for i, f := range life[from:] {
		if err := f(n); err != nil {
			return from + i, err
		}
	}
	return len(life), n.settled()
}

// mutations is how often each call that changes something was made.
func (n *poolNode) mutations() map[string]int {
	calls := n.region.Snapshot().Calls
	for action := range calls {
		if strings.Contains(action, ":Describe") {
			delete(calls, action)
		}
	}
	return calls
}

func TestPoolLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newLifeNode(t, cloud.Default())
		if stage, err := n.live(0); err != nil {
			t.Fatalf("stage %d: %v", stage, err)
		}
		calls := n.mutations()
		want := map[string]int{"vpc:CreateAndAttachNetworkInterface": 3, "vpc:DetachNetworkInterface": 3, "vpc:DeleteNetworkInterface": 2, "vpc:AttachNetworkInterface": 1}
		for action, times := range want {
			if calls[action] != times {
				t.Errorf("%s was called %d times, want %d", action, calls[action], times)
			}
		}
		// 25 addresses came with ENIs and in batches; 18 went with ENIs and one by one.
		if calls["vpc:AssignPrivateIpAddresses"] > 3 || calls["vpc:UnassignPrivateIpAddresses"] > 18 {
			t.Errorf("calls: %v", calls)
		}
		if s := n.state(); s.Quota != (tencent.ENILimit{ENIs: 4, IPsPerENI: 10, ExtendENIs: 10}) || len(s.Pods) != 2 {
			t.Errorf("quota %+v, %d pods", s.Quota, len(s.Pods))
		}
	})
}

// TestPoolSurvivesKillsAtEveryBoundary kills the agent at every call of its whole
// life: before it, when its intent is in the ledger; before it, when that was being
// written; and after it. A usual run takes one of the three for each call, in turn.
func TestPoolSurvivesKillsAtEveryBoundary(t *testing.T) {
	survivesKills(t, 12, newLifeNode, func(api Cloud, k killer) (Cloud, *killer) {
		k.Cloud = api
		return &k, &k
	})
}

// survivesKills kills at each of at least so many calls that the killer that with
// returns sees.
func survivesKills(t *testing.T, least int, born func(*testing.T, cloud.Config) *poolNode, with func(Cloud, killer) (Cloud, *killer)) {
	boundaries := 0
	synctest.Test(t, func(t *testing.T) {
		n := born(t, cloud.Default())
		var k *killer
		n.net.pool.cloud, k = with(n.api, killer{})
		if _, err := n.live(0); err != nil {
			t.Fatal(err)
		}
		boundaries = k.calls
	})
	if boundaries < least {
		t.Fatalf("only %d calls", boundaries)
	}
	whens := []string{"before", "torn", "after"}
	for at := 1; at <= boundaries; at++ {
		for i, when := range whens {
			if i != at%len(whens) && !*whole {
				continue
			}
			t.Run(fmt.Sprintf("call=%d,%s", at, when), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					n := born(t, cloud.Default())
					n.net.pool.cloud, _ = with(n.api, killer{at: at, after: when == "after"})
					killed(t, n, when)
				})
			})
		}
	}
}

var whole = flag.Bool("whole", false, "kill the pool in every way at every call, and have every call fail in every way")

func killed(t *testing.T, n *poolNode, when string) {
	stage, err := n.live(0)
	if !errors.Is(err, errKilled) {
		t.Fatalf("not killed: %v", err)
	}
	if when == "torn" {
		n.tear()
	}
	n.restart()
	if stage, err = n.live(stage); err != nil {
		t.Fatalf("stage %d: %v", stage, err)
	}
}

// tear cuts the ledger's last record, as the end of the power does.
func (n *poolNode) tear() {
	n.t.Helper()
	name := filepath.Join(n.dir, "ledger")
	text, err := os.ReadFile(name)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(name, text[:len(text)-5], 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// TestPoolOutlivesFaults has the cloud fail in the pool's life in every way that is
// known of it: no ENI and no address is lost or doubled. A usual run has half of the
// faults of each call.
func TestPoolOutlivesFaults(t *testing.T) {
	const create = "vpc:CreateAndAttachNetworkInterface"
	faults := map[string]cloud.Fault{
		"throttle storm":     {Action: "*", Code: "RequestLimitExceeded", Times: 60},
		"throttled calls":    {Action: "vpc:A*", Code: "LimitExceeded.ActionLimited", Times: 12},
		"mutex":              {Action: "vpc:AssignPrivateIpAddresses", Code: tencent.CodeMutexTaskRunning, Times: 6},
		"unassign mutex":     {Action: "vpc:UnassignPrivateIpAddresses", Code: tencent.CodeMutexTaskRunning, Times: 6},
		"wrong state":        {Action: "vpc:AttachNetworkInterface", Code: "UnsupportedOperation.InvalidState", Times: 6},
		"detach wrong state": {Action: "vpc:DetachNetworkInterface", Code: "UnsupportedOperation.InvalidState", Times: 6},
		"idempotent":         {Action: create, Code: tencent.CodeIdempotentProcessing, Times: 3},
		"token mismatch":     {Action: create, Code: "UnsupportedOperation.IdempotentParameterMismatch", Times: 3},
		"no address for ENI": {Action: create, Code: tencent.CodeSubnetExhausted, Times: 6},
		"exhausted":          {Action: "vpc:AssignPrivateIpAddresses", Code: tencent.CodeSubnetExhausted, Times: 6},
		"stuck attach":       {Action: "vpc:AttachNetworkInterface", Stuck: 5 * time.Minute},
		"stuck detach":       {Action: "vpc:DetachNetworkInterface", Stuck: 5 * time.Minute},
		"stuck assign":       {Action: "vpc:AssignPrivateIpAddresses", Stuck: 5 * time.Minute},
		"stuck unassign":     {Action: "vpc:UnassignPrivateIpAddresses", Stuck: 5 * time.Minute},
		"stuck create":       {Action: create, Stuck: 5 * time.Minute},
		"stuck delete":       {Action: "vpc:DeleteNetworkInterface", Stuck: 5 * time.Minute},
		"partial assign":     {Action: "vpc:AssignPrivateIpAddresses", Partial: 2, Times: 3},
		"inside":             {Action: "vpc:*NetworkInterface", Code: "InternalError", Times: 12},
		"answers lost":       {Action: "vpc:*Address*", Drop: true, Times: 12},
	}
	for i, action := range []string{"CreateAndAttachNetworkInterface", "AttachNetworkInterface", "AssignPrivateIpAddresses",
		"UnassignPrivateIpAddresses", "DetachNetworkInterface", "DeleteNetworkInterface"} {
		for j, f := range []struct {
			name  string
			fault cloud.Fault
		}{
			{"answer lost to ", cloud.Fault{Drop: true}},
			{"vanished ", cloud.Fault{Vanish: true}},
			{"failed ", cloud.Fault{Code: "InternalError"}},
			{"slow ", cloud.Fault{Delay: 20 * time.Second}},
			{"task failed of ", cloud.Fault{Fail: true}},
		} {
			if (i+j)%2 == 0 || *whole {
				f.fault.Action, f.fault.Times = "vpc:"+action, 2
				faults[f.name+action] = f.fault
			}
		}
	}
	for name, f := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				n := newLifeNode(t, cloud.Default())
				n.region.Inject(f)
				if stage, err := n.live(0); err != nil {
					t.Fatalf("stage %d: %v", stage, err)
				}
				for action := range n.region.Snapshot().Calls {
					if met, err := path.Match(f.Action, action); err == nil && met {
						return
					}
				}
				t.Errorf("nothing was called that the fault is of: %v", n.region.Snapshot().Calls)
			})
		})
	}
}
