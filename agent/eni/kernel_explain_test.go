//go:build kernel

package eni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/vpc"
)

// inRegion makes the node an instance of the lab's region, whose ENI is attached
// and has three addresses for pods.
func (n *testNode) inRegion() (*cloud.Region, *tencent.Client) {
	t := n.t
	config := cloud.Default()
	config.Log, config.Delays = slog.New(slog.DiscardHandler), cloud.Delays{}
	region, err := cloud.New(config, idle{}, idle{})
	must(t, err)
	t.Cleanup(region.Close)
	eni, err := region.CreateENI("subnet-pods0001")
	must(t, err)
	in, err := region.Launch(t.Context(), cloud.InstanceSpec{ENIs: []string{eni.ID}, UserData: []byte("kind: NodeConfig\n")})
	must(t, err)
	metadata := tencent.NewMetadata(tencent.MetadataURL)
	metadata.HTTP.Transport = direct{region.Metadata(), in.PrivateIP.String()}
	api, err := tencent.NewClient(node.CloudConfig{APIDomain: config.Domain}, config.Region, metadata)
	must(t, err)
	api.HTTP.Transport = direct{region.API(), in.PrivateIP.String()}
	_, _, err = api.AssignIPs(t.Context(), eni.ID, 3, "assign")
	must(t, err)
	n.eni = vpc.Port{ENI: eni.ID, MAC: mac(eni.MAC), Subnet: eni.Subnet, Addrs: n.assigned(api, in.ID, eni.ID, 4)}
	n.cloud = api
	n.sealed.Facts.InstanceID = in.ID
	n.sealed.Config.Network.SecurityGroupIDs = []string{"sg-lab00001"}
	n.restart()
	return region, api
}

// assigned waits until the cloud shows that many usable addresses of an ENI.
func (n *testNode) assigned(api *tencent.Client, instance, eni string, want int) []netip.Addr {
	n.t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		enis, err := api.DescribeENIs(n.t.Context(), instance)
		must(n.t, err)
		for _, e := range enis {
			var all []netip.Addr
			for _, ip := range e.IPs {
				if ip.State == tencent.StateAvailable {
					all = append(all, ip.Addr)
				}
			}
			if e.ID == eni && len(all) == want && len(e.IPs) == want && e.AttachedTo(instance) {
				return all
			}
		}
	}
	n.t.Fatalf("%s never had %d usable addresses", eni, want)
	return nil
}

// told is an explanation as a person reads it, a line for each thing.
func told(e Explanation) string {
	var b strings.Builder
	for _, t := range e.Traces {
		for _, l := range t.Legs {
			for _, h := range l.Hops {
				b.WriteString(l.Title + " | " + h.Name + " | " + h.Text + "\n")
				for _, p := range h.Problems {
					b.WriteString("!! " + p.Text + " → " + p.Do + "\n")
				}
			}
		}
	}
	return b.String()
}

// explained asks, and checks that each text is in the answer. With none of them
// beginning with "!!", nothing may be wrong.
func (n *testNode) explained(t *testing.T, q Question, want ...string) Explanation {
	t.Helper()
	e, err := n.net.Explain(t.Context(), q)
	must(t, err)
	text, wrong := told(e), false
	for _, w := range want {
		wrong = wrong || strings.HasPrefix(w, "!!")
		if !strings.Contains(text, w) {
			t.Errorf("not told: %s", w)
		}
	}
	if wrong != (e.Problems() > 0) {
		t.Errorf("%d problems", e.Problems())
	}
	if t.Failed() {
		t.Logf("%s%s", text, e.CloudNotAsked)
	}
	return e
}

func TestKernelExplain(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		region, api := n.inRegion()
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		web, db := newPod(t, "web"), newPod(t, "db")
		addr, dbAddr := web.add(), db.add()
		name, hostMAC, _ := vethOf(keyOf(web.container()))
		pod := Question{Pod: "default/web"}
		bits, primaryBits := fmt.Sprintf("%#x/%#x", slotMark(0), markMask), fmt.Sprintf("%#x/%#x", primaryMark, markMask)

		t.Run("as it should be", func(t *testing.T) {
			want := []string{
				"out of the pod | next hop | via 169.254.1.1 dev eth0, 169.254.1.1 is at " + hostMAC + ", for good\n",
				"out of the pod | veth | " + name + ", MAC " + hostMAC,
				"out of the pod | nft pods | " + addr.String() + " → slot 0, mark " + bits + "\n",
				"to 10.0.16.1, the subnet's gateway | rule | 1536 from all fwmark " + bits + " lookup 4001\n",
				"to 10.0.16.1, the subnet's gateway | table 4001 | via 10.0.16.1 dev eth1\n",
				"to 10.0.16.1, the subnet's gateway | SNAT | none, it leaves as " + addr.String() + "\n",
				"to 192.0.2.1, an address outside of the VPC | nft pods | not in network.nonMasqueradeCIDRs, so by the primary ENI: mark " + primaryBits + "\n",
				"to 192.0.2.1, an address outside of the VPC | rule | 32766 from all lookup main\n",
				"to 192.0.2.1, an address outside of the VPC | table main | via 10.0.0.1 dev eth0\n",
				"to 192.0.2.1, an address outside of the VPC | SNAT | it leaves as 10.0.0.5, the node's own\n",
				"device | eth1, MAC " + n.eni.MAC.String(),
				"cloud | available, MAC " + n.eni.MAC.String() + ", subnet-pods0001 10.0.16.0/20, security groups sg-lab00001\n",
				"back from 10.0.16.1, in by eth1 | rule | 512 from all lookup 4000\n",
				"back from 10.0.16.1, in by eth1 | table 4000 | dev " + name + "\n",
				"back from 192.0.2.1, in by eth0 | table 4000 | dev " + name + "\n",
			}
			if e := n.explained(t, pod, want...); e.CloudNotAsked != "" {
				t.Errorf("cloud not asked: %s", e.CloudNotAsked)
			}
			n.explained(t, Question{IP: addr}, want...)
			n.explained(t, Question{IP: addr, To: dbAddr}, "to "+dbAddr.String()+" | rule | 512 from all lookup 4000\n", "| table 4000 | dev eni")
			n.explained(t, Question{Pod: "default/web", To: netip.MustParseAddr("10.0.0.5")}, "is this node's own\n", "back from 10.0.0.5 | table 4000 | dev "+name)
			n.explained(t, Question{Pod: "default/web", To: metadataAddr}, "to 169.254.0.23, the metadata service | nft guard | refused: ")
		})
		t.Run("TKE's layout", func(t *testing.T) {
			n.sealed.Config.Network.Layout = node.LayoutTKECompat
			n.sealed.Config.Network.MetadataAccess = []string{"default/web"}
			n.converge()
			n.explained(t, pod,
				"to 10.0.16.1, the subnet's gateway | rule | 1536 from "+addr.String()+" lookup 4001\n",
				"to 192.0.2.1, an address outside of the VPC | rule | 1535 from all fwmark "+primaryBits+" lookup main\n",
				"back from 10.0.16.1, in by eth1 | rule | 512 from all to "+addr.String()+" lookup main\n",
				"back from 192.0.2.1, in by eth0 | table main | dev "+name+"\n")
			n.explained(t, Question{Pod: "default/web", To: dbAddr}, "| rule | 512 from all to "+dbAddr.String()+" lookup main\n", "| table main | dev eni")
			n.explained(t, Question{Pod: "default/web", To: metadataAddr}, "nft guard | the pod may ask: ")
			sh(t, "ip rule del pref 1535; ip route del "+addr.String())
			n.explained(t, pod, "!! missing: rule 1535 from all fwmark "+primaryBits+" lookup main → "+doWait,
				"!! it leads to table 4001, not to table main → "+doWait, "!! missing: route "+addr.String()+" table main: dev "+name)
			n.sealed.Config.Network.Layout, n.sealed.Config.Network.MetadataAccess = node.LayoutMark, nil
			n.converge()
		})
		for _, c := range []struct {
			name, script string
			inPod        bool
			want         []string
		}{
			{"rule deleted", "ip rule del pref 1536", false, []string{
				"rule | 32766 from all lookup main\n", "!! missing: rule 1536 from all fwmark " + bits + " lookup 4001 → " + doWait,
				"!! the VPC drops " + addr.String() + " on eth0",
			}},
			{"wrong table", "ip route add default via 10.0.0.1 dev eth0 table 99; ip rule add pref 100 from " + addr.String() + " lookup 99", false, []string{
				"rule | 100 from " + addr.String() + " lookup 99\n", "!! it leads to table 99, not to table 4001 → " + doForeign,
			}},
			{"default route deleted", "ip rule del pref 100; ip route del default via 10.0.16.1 table 4001", false, []string{
				"| table 4001 | the kernel refuses: unreachable\n", "!! missing: route default table 4001: via 10.0.16.1 dev eth1 onlink", "!! the packet goes nowhere",
			}},
			{"nft element deleted", "nft flush map inet tkenode pods", false, []string{
				"leads to no slot: the packet is dropped here\n", "!! missing: nft pod " + addr.String() + ": slot 0",
			}},
			{"nft table deleted", "nft delete table inet tkenode", false, []string{"the packet gets no mark\n", "!! missing: nft table inet tkenode", "!! the VPC drops"}},
			{"route back deleted", "ip route del " + addr.String() + " table 4000", false, []string{"!! missing: route " + addr.String() + " table 4000", "!! it leads to table"}},
			{"ENI down", "ip link set eth1 down", false, []string{"!! wrong: link eth1: up mac ", " is what it should be (found down mac "}},
			{"neighbour", "ip neigh replace 169.254.1.1 lladdr 02:00:00:00:00:09 dev eth0 nud permanent", true, []string{
				"next hop | via 169.254.1.1 dev eth0, 169.254.1.1 is at 02:00:00:00:00:09",
				"!! wrong: pod default/web neighbour 169.254.1.1: " + hostMAC + " permanent is what it should be (found 02:00:00:00:00:09 permanent) → " + doRestart,
			}},
		} {
			t.Run(c.name, func(t *testing.T) {
				if c.inPod {
					must(t, web.enter(func() error { sh(t, c.script); return nil }))
				} else {
					sh(t, c.script)
				}
				n.explained(t, pod, c.want...)
				if !c.inPod {
					n.converge()
				}
			})
		}
		must(t, web.enter(func() error {
			sh(t, "ip neigh replace 169.254.1.1 lladdr "+hostMAC+" dev eth0 nud permanent")
			return nil
		}))
		n.explained(t, pod, "device | eth1")

		t.Run("of no pod", func(t *testing.T) {
			if _, err := n.net.Explain(t.Context(), Question{Pod: "default/nobody"}); !errors.Is(err, ErrNotHere) || !strings.Contains(err.Error(), "default/nobody") {
				t.Errorf("unknown pod: %v", err)
			}
			free := n.eni.Addrs[3]
			n.explained(t, Question{IP: n.eni.Addrs[0]}, "ledger | "+n.eni.ENI+"'s own, in slot 0; pods are never given it\n", "cloud | assigned to "+n.eni.ENI+" available\n")
			n.explained(t, Question{IP: free}, "ledger | an address of "+n.eni.ENI+" in slot 0, no pod has it\n", "left over | nothing\n")
			n.explained(t, Question{IP: netip.MustParseAddr("203.0.113.7")}, "ledger | no ENI has it, and no pod\n", "cloud | no ENI of this instance has it\n",
				"rule | 32766 from all lookup main\n", "| table main | via 10.0.0.1 dev eth0\n")
			sh(t, "nft add element inet tkenode pods { "+free.String()+" : jump slot0 }; nft add element inet tkenode metadata { "+free.String()+" }; ip rule add pref 1536 proto 154 from "+free.String()+" lookup 4001; ip route add "+free.String()+" dev eth1 table 4000")
			n.explained(t, Question{IP: free}, "!! the map of pods has it: nft pod "+free.String()+": slot 0", "!! a route leads to it: route "+free.String()+" table 4000",
				"!! a rule has it: rule 1536 from "+free.String()+" lookup 4001", "!! it may ask the metadata service: nft metadata "+free.String())
			n.converge()
		})
		t.Run("dead", func(t *testing.T) {
			lost := newPod(t, "lost")
			lost.add()
			must(t, lost.ns.Close())
			n.explained(t, Question{Pod: "default/lost"}, "!! the pod's network namespace is not there → the runtime's DEL")
		})
		t.Run("cloud", func(t *testing.T) {
			region.Inject(cloud.Fault{Action: "vpc:DescribeNetworkInterfaces", Code: "RequestLimitExceeded"})
			if e := n.explained(t, pod, "cloud | not asked: "); !strings.Contains(e.CloudNotAsked, "RequestLimitExceeded") {
				t.Errorf("cloud not asked: %q", e.CloudNotAsked)
			}
			region.Inject(cloud.Fault{Action: "vpc:DescribeNetworkInterfaces", Delay: time.Minute})
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			if e, err := n.net.Explain(ctx, pod); err != nil || !strings.Contains(e.CloudNotAsked, "no answer within 5s") {
				t.Errorf("the cloud is silent: %+v, %v", e, err)
			}
			_, err := api.UnassignIPs(t.Context(), n.eni.ENI, []netip.Addr{addr})
			must(t, err)
			n.assigned(api, n.sealed.Facts.InstanceID, n.eni.ENI, 3)
			n.explained(t, pod, "!! "+addr.String()+" is not assigned to "+n.eni.ENI+" any more: the VPC drops what the pod sends → delete the pod")
			n.sealed.Config.Network.SecurityGroupIDs = []string{"sg-other001"}
			n.explained(t, Question{Pod: "default/db"}, "!! the NodeConfig's security groups are sg-other001")
		})
	})
}
