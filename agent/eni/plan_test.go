package eni

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

var update = flag.Bool("update", false, "write the golden plans anew")

// golden runs every case that matches the pattern: it decodes the first file of
// each into c and compares what plan makes of it, and of the files between, with
// the last file.
func golden[C any](t *testing.T, pattern string, plan func(c C, a *txtar.Archive) string) {
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("no test cases %s: %v", pattern, err)
	}
	for _, path := range files {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(path)
			if err != nil || len(a.Files) < 2 {
				t.Fatalf("%d files: %v", len(a.Files), err)
			}
			var c C
			d := json.NewDecoder(bytes.NewReader(a.Files[0].Data))
			d.DisallowUnknownFields()
			if err := d.Decode(&c); err != nil {
				t.Fatal(err)
			}
			got, last := plan(c, a), &a.Files[len(a.Files)-1]
			if *update {
				last.Data = []byte(got)
				if err := os.WriteFile(path, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if want := string(last.Data); got != want {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
		})
	}
}

// pathsCase is what the paths know before they look at the kernel.
type pathsCase struct {
	Slots   []Slot            `json:"slots"`
	Pods    []Pod             `json:"pods"`
	Devices map[string]string `json:"devices"` // MAC to name
	Wired   []string          `json:"wired"`   // containers whose veth is there
	Alive   []string          `json:"alive"`   // containers whose network namespace is there
	Compat  bool              `json:"compat"`  // TKE's layout
}

func (c pathsCase) want() []object {
	s := newState()
	for _, slot := range c.Slots {
		s.Slots[slot.Number] = slot
	}
	sc := scene{
		devices: map[string]device{}, wired: map[cni.Attachment]bool{}, alive: map[cni.Attachment]bool{},
		files: []file{{"/etc/cni/net.d/10-tke-eni.conflist", "{}"}},
		policy: policy{
			primaryMAC: "52:54:00:00:00:01", primary: netip.MustParseAddr("10.0.0.5"),
			inside: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, metadata: []string{"default/csi-*"}, compat: c.Compat,
		},
	}
	for mac, name := range c.Devices {
		sc.devices[mac] = device{name: name, mtu: 1500}
	}
	for _, p := range c.Pods {
		s.Pods[p.Attachment] = p
		sc.wired[p.Attachment] = slices.Contains(c.Wired, p.ContainerID)
		sc.alive[p.Attachment] = slices.Contains(c.Alive, p.ContainerID)
	}
	return desired(s, sc)
}

// line is an object that was found, as its text.
type line struct{ k, a string }

func (o line) key() string       { return o.k }
func (o line) attr() string      { return o.a }
func (o line) put(*kernel) error { return nil }

// ownLine is one that is ours alone.
type ownLine struct{ line }

func (o ownLine) drop(*kernel) error { return nil }

func parse(text string) (have []object) {
	for l := range strings.Lines(text) {
		l = strings.TrimSuffix(l, "\n")
		var o line
		o.k, o.a, _ = strings.Cut(l, ": ")
		kind, _, _ := strings.Cut(l, " ")
		switch kind {
		case "sysctl", "link", "address", "file", "parked":
			have = append(have, o)
		default:
			have = append(have, ownLine{o})
		}
	}
	return have
}

// TestPathsPlan compares the plan for a ledger and what was found in the kernel
// with the golden text.
func TestPathsPlan(t *testing.T) {
	golden(t, "testdata/paths-*.txtar", func(c pathsCase, a *txtar.Archive) string {
		var b strings.Builder
		for _, s := range diff(c.want(), parse(string(a.Files[1].Data))) {
			fmt.Fprintln(&b, s.text)
		}
		if b.Len() == 0 {
			return "nothing to do\n"
		}
		return b.String()
	})
}

// TestPathsPlanLeadsThere plans from the kernel of one random ledger to that of
// another, follows the steps, and finds nothing left to do.
func TestPathsPlanLeadsThere(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 100 {
		want := randomCase(r).want()
		kernel := map[string]string{}
		for _, o := range randomCase(r).want() {
			if r.IntN(4) > 0 {
				kernel[o.key()] = o.attr()
			}
		}
		for _, s := range diff(want, found(kernel)) {
			if s.drop {
				delete(kernel, s.object.key())
			} else {
				kernel[s.object.key()] = s.object.attr()
			}
		}
		if left := diff(want, found(kernel)); len(left) > 0 {
			t.Fatalf("%d steps left, the first: %s", len(left), left[0].text)
		}
		for _, o := range want {
			if kernel[o.key()] != o.attr() {
				t.Fatalf("%s is %q", text(o), kernel[o.key()])
			}
		}
	}
}

func found(kernel map[string]string) []object {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(kernel)) {
		fmt.Fprintf(&b, "%s: %s\n", k, kernel[k])
	}
	return parse(b.String())
}

func randomCase(r *rand.Rand) pathsCase {
	c := pathsCase{Compat: r.IntN(2) == 0, Devices: map[string]string{"52:54:00:00:00:01": "eth0"}}
	for i := range r.IntN(3) {
		slot := Slot{
			Number: i, ENI: fmt.Sprintf("eni-%d", r.IntN(4)), MAC: fmt.Sprintf("52:54:00:00:01:0%d", i), Subnet: netip.MustParsePrefix("10.0.16.0/20"),
			Primary: netip.AddrFrom4([4]byte{10, 0, 16, byte(10 + i)}),
		}
		if r.IntN(2) == 0 {
			slot.Primary6 = netip.MustParseAddr(fmt.Sprintf("2402:4e00::%d", i+1))
		}
		c.Slots = append(c.Slots, slot)
		if r.IntN(4) > 0 {
			c.Devices[slot.MAC] = fmt.Sprintf("eth%d", 1+2*i+r.IntN(2))
		}
	}
	for i := range r.IntN(20) {
		p := Pod{
			Attachment: cni.Attachment{ContainerID: fmt.Sprintf("c%d", r.IntN(30)), IfName: "eth0"}, Namespace: "default", Name: fmt.Sprintf("pod-%d", i),
			Addr: netip.AddrFrom4([4]byte{10, 0, 17, byte(i)}), Slot: r.IntN(3), MTU: 1500,
		}
		if r.IntN(2) == 0 {
			p.Addr6 = netip.MustParseAddr(fmt.Sprintf("2402:4e00::1:%d", i))
		}
		c.Pods = append(c.Pods, p)
		switch r.IntN(3) {
		case 0:
			c.Wired = append(c.Wired, p.ContainerID)
		case 1:
			c.Alive = append(c.Alive, p.ContainerID)
		}
	}
	return c
}

func TestConflist(t *testing.T) {
	for _, c := range []struct{ there, want []string }{
		{nil, []string{"tke-eni"}},
		{[]string{"bandwidth"}, []string{"tke-eni", "bandwidth"}},
		{[]string{"portmap", "bandwidth"}, []string{"tke-eni", "portmap", "bandwidth"}},
	} {
		text := conflist(func(plugin string) bool { return slices.Contains(c.there, plugin) })
		var list struct {
			CNIVersion, Name string
			Plugins          []struct{ Type string }
		}
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			t.Fatalf("%v in\n%s", err, text)
		}
		var got []string
		for _, p := range list.Plugins {
			got = append(got, p.Type)
		}
		if !slices.Equal(got, c.want) || list.CNIVersion != "1.1.0" || list.Name != "tke-eni" {
			t.Errorf("with %v:\n%s", c.there, text)
		}
	}
}

// TestPolicyOfAnOlderSeal holds that a node that was sealed before there were lists
// of destinations is as one that leaves them out.
func TestPolicyOfAnOlderSeal(t *testing.T) {
	pol := policyOf(node.Sealed{})
	for to, inside := range map[string]bool{"10.0.0.20": true, "172.31.255.255": true, "192.168.0.1": true, "100.64.0.1": true, "203.0.113.9": false, "169.254.0.23": false} {
		if got := pol.sees(netip.MustParseAddr(to)); got != inside {
			t.Errorf("%s is inside: %v", to, got)
		}
	}
	if pol.compat {
		t.Error("it has TKE's layout")
	}
}

func TestVethNames(t *testing.T) {
	key := cni.Attachment{ContainerID: "0123456789abcdef", IfName: "eth0"}
	name, hostMAC, podMAC := vethOf(key)
	if len(name) != 14 || !strings.HasPrefix(name, "eni") || !spells(name, hostMAC) {
		t.Errorf("name %s, MAC %s", name, hostMAC)
	}
	if spells(name, podMAC) || spells("eni0123456789a", hostMAC) || spells("eth0", hostMAC) || spells(name, "") {
		t.Error("another link is taken for ours")
	}
	other, _, _ := vethOf(cni.Attachment{ContainerID: key.ContainerID, IfName: "eth1"})
	if other == name {
		t.Error("two interfaces of a container have one name")
	}
	p := Pod{Attachment: key, Namespace: "kube-system", Name: strings.Repeat("n", 253), Addr: netip.MustParseAddr("10.0.16.5")}
	if a := alias(p); len(a) > 255 || len(strings.Fields(a)) != 6 {
		t.Errorf("alias %q", a)
	}
}

// poolCase is what the pool knows. IPsPerENI is the bound and, where Warm does not
// say otherwise, what is kept free.
type poolCase struct {
	IPsPerENI int               `json:"ipsPerENI"`
	MaxENIs   int               `json:"maxENIs"` // default 1
	Warm      *node.WarmIPs     `json:"warm"`
	Observe   bool              `json:"observe"`
	Dual      bool              `json:"dual"`      // pods have IPv6 addresses, too
	Subnets   []string          `json:"subnetIDs"` // default subnet-pods0001
	Slots     []Slot            `json:"slots"`
	Pods      []Pod             `json:"pods"`
	Rested    map[string]string `json:"rested"`  // until when, from now
	Settled   string            `json:"settled"` // when the rebuilt ledger lets addresses be used, from now
	ENIs      []tencent.ENI     `json:"enis"`
	Missing   string            `json:"missing"` // how long the ledger's ENI has not been seen
	Waiting   int               `json:"waiting"` // ADDs
	Wanted    [][]string        `json:"wanted"`  // security groups of ENIs that ADDs wait for
	Exclusive int               `json:"exclusiveENIs"`
	Extend    int               `json:"extendENIs"` // of the quota
	Excess    string            `json:"excess"`     // for how long
	Idle      map[string]string `json:"idle"`       // ENIs that are not needed, for how long
	Spare     map[string]string `json:"spare"`      // ENIs in no slot, for how long
	Refused   map[string]string `json:"refused"`    // what is held up, and by which code
	Failed    map[string]string `json:"failed"`     // ENIs that their creation has not attached, and why
}

// TestPoolPlan compares the plan for a ledger and what the cloud says with the
// golden text. The time is 2026-11-23 12:00:00 UTC.
func TestPoolPlan(t *testing.T) {
	golden(t, "testdata/pool-*.txtar", func(c poolCase, _ *txtar.Archive) string {
		out := planPool(c.scene(t))
		var b strings.Builder
		for _, st := range out.steps {
			fmt.Fprintln(&b, st.text)
		}
		for _, e := range []struct {
			err  error
			what string
		}{{out.err, ""}, {out.note, "for an ADD: "}, {out.whole, "for an ADD of a pod alone: "}} {
			if e.err != nil && (e.what == "" || e.err != out.err) {
				fmt.Fprintf(&b, "%s%s %s: %v\n", e.what, node.ClassOf(e.err), node.ReasonOf(e.err, "-"), e.err)
			}
		}
		if len(out.steps) == 0 && out.err == nil {
			fmt.Fprintln(&b, "nothing to do")
		}
		if out.again > 0 {
			fmt.Fprintf(&b, "look again in %s\n", out.again)
		}
		return b.String()
	})
}

func (c poolCase) scene(t *testing.T) (poolWant, state, cloudView) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	ago := func(d string) time.Time {
		v, err := time.ParseDuration(d)
		if err != nil {
			t.Fatal(err)
		}
		return now.Add(-v)
	}
	since := func(durations map[string]string) map[string]time.Time {
		out := map[string]time.Time{}
		for k, d := range durations {
			out[k] = ago(d)
		}
		return out
	}
	s := newState()
	s.Quota = tencent.ENILimit{ENIs: 17, IPsPerENI: 51, ExtendENIs: c.Extend}
	for _, slot := range c.Slots {
		s.Slots[slot.Number] = slot
	}
	for _, p := range c.Pods {
		s.Pods[p.Attachment] = p
	}
	if c.Settled != "" {
		s.Settled = ago("-" + c.Settled)
	}
	for a, d := range c.Rested {
		s.Rested[netip.MustParseAddr(a)] = ago("-" + d)
	}
	warm := cmp.Or(c.Warm, &node.WarmIPs{Min: c.IPsPerENI - len(c.Pods), Max: c.IPsPerENI - len(c.Pods)})
	want := poolWant{cluster: "cls-lab00001", facts: node.Facts{InstanceID: "ins-00000001", VPCID: "vpc-lab00001", Zone: "ap-guangzhou-3"}}
	want.network = node.NetworkConfig{SubnetIDs: []string{"subnet-pods0001"}, SecurityGroupIDs: []string{"sg-lab00001"},
		ENIs: cmp.Or(c.MaxENIs, 1), IPsPerENI: c.IPsPerENI, WarmIPs: *warm, ExclusiveENIs: c.Exclusive}
	if len(c.Subnets) > 0 {
		want.network.SubnetIDs = c.Subnets
	}
	if c.Dual {
		want.network.IPFamilies = []node.IPFamily{node.IPv4, node.IPv6}
	}
	if c.Observe {
		want.network.Allocator = node.AllocatorObserve
	}
	view := cloudView{
		enis: c.ENIs, now: now, missing: map[string]time.Time{}, waiting: c.Waiting, wanted: c.Wanted,
		idle: since(c.Idle), spare: since(c.Spare), holds: map[string]hold{}, failed: c.Failed,
		subnets: map[string]tencent.Subnet{
			"subnet-pods0001": {ID: "subnet-pods0001", CIDR: netip.MustParsePrefix("10.0.16.0/20"), CIDR6: netip.MustParsePrefix("2402:4e00:0:16::/64"), Zone: "ap-guangzhou-3", AvailableIPs: 4000},
			"subnet-pods0002": {ID: "subnet-pods0002", CIDR: netip.MustParsePrefix("10.0.32.0/20"), Zone: "ap-guangzhou-3", AvailableIPs: 3},
			"subnet-other001": {ID: "subnet-other001", CIDR: netip.MustParsePrefix("10.0.48.0/20"), Zone: "ap-guangzhou-4", AvailableIPs: 4000},
		},
	}
	if c.Missing != "" {
		view.missing[c.Slots[0].ENI] = ago(c.Missing)
	}
	if c.Excess != "" {
		view.excess = ago(c.Excess)
	}
	for key, code := range c.Refused {
		err := node.Waiting("Refused", "%s", code)
		view.holds[key] = hold{err: err, count: 3, since: ago("20s"), until: now.Add(8 * time.Second)}
	}
	return want, s, view
}

// TestTokens holds that a repeated creation has its token, and nothing else has.
func TestTokens(t *testing.T) {
	want, now := poolWant{facts: node.Facts{InstanceID: "ins-00000001"}}, time.Now()
	var slot Slot
	slot.intend(stepCreate, now)
	first := want.token(slot, stepCreate)
	slot.intend(stepCreate, now.Add(time.Minute))
	if again := want.token(slot, stepCreate); again != first || len(first) > 64 {
		t.Errorf("repeated creation has token %s after %s", again, first)
	}
	seen := map[string]bool{first: true}
	for _, step := range []Step{stepAttach, stepAttach, stepAssign, stepAssign, stepDetach, stepDetach, stepCreate} {
		slot.intend(step, now)
		token := want.token(slot, step)
		if seen[token] {
			t.Errorf("%s has the token of another call", step)
		}
		seen[token] = true
	}
	want.rebuilt = now
	if token := want.token(slot, stepCreate); seen[token] {
		t.Error("a call has the token of one of before the ledger was lost")
	}
	want.rebuilt = time.Time{}
	slot = Slot{Generation: 1}
	slot.intend(stepCreate, now)
	if seen[want.token(slot, stepCreate)] {
		t.Error("the second ENI of a slot has a token of the first")
	}
}
