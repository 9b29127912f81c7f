package main

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/eni/cni"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// network is a node with one ENI that is full, and one on its way.
func network() eni.State {
	pod := func(namespace, name, a, state string, age time.Duration) eni.PodState {
		return eni.PodState{
			Pod: eni.Pod{
				Attachment: cni.Attachment{ContainerID: "c0ffee", IfName: "eth0"}, Namespace: namespace, Name: name,
				Addr: addr(a), ENI: "eni-pods0001", Since: ago(age),
			},
			Veth: "eni0123456789a", State: state,
		}
	}
	return eni.State{
		Now: now, CloudSeen: ago(20 * time.Second), MetadataRefused: 21,
		Exhausted: "no free VPC address: 2 of 3 addresses in use, 1 resting until 2026-01-02T03:05:07Z at the earliest",
		Blocked:   "ENIAttaching: eni-pods0002 has been attaching for 12s",
		ENIs: []eni.ENIState{
			{
				Slot:   eni.Slot{Number: 0, ENI: "eni-pods0001", MAC: "52:54:00:00:00:02", Subnet: netip.MustParsePrefix("10.0.16.0/20"), Primary: addr("10.0.16.4")},
				Device: "eth1", Ready: true, SubnetID: "subnet-pods0001", SecurityGroups: []string{"sg-pods0001", "sg-pods0002"},
				Addresses: []eni.AddressState{
					{Addr: addr("10.0.16.5"), State: "used", Pod: "default/web-6b8f7c9d4f-x2x7p"},
					{Addr: addr("10.0.16.6"), State: "cooling", Until: now.Add(62 * time.Second)},
					{Addr: addr("10.0.16.7"), State: "used", Pod: "kube-system/coredns-5d78c9869d-8h2vk"},
					{Addr: addr("10.0.16.8"), State: "gone", Pod: "default/db-0"},
				},
			},
			{Slot: eni.Slot{Number: 1, ENI: "eni-pods0002", Intent: "attach", Since: ago(12 * time.Second)}},
		},
		Pods: []eni.PodState{
			pod("default", "db-0", "10.0.16.8", "address gone", 49*time.Hour),
			pod("default", "web-6b8f7c9d4f-x2x7p", "10.0.16.5", "wired", 3*time.Minute),
			pod("kube-system", "coredns-5d78c9869d-8h2vk", "10.0.16.7", "dead", 5*time.Hour),
		},
	}
}

func TestENIText(t *testing.T) {
	var b bytes.Buffer
	out := &terminal{w: &b, tty: true, width: 80}
	renderENI(out, network())
	out.printf("\n")
	calm := network()
	calm.Exhausted, calm.Blocked, calm.CloudSeen, calm.MetadataRefused = "", "", time.Time{}, 0
	calm.ENIs = calm.ENIs[:1]
	calm.ENIs[0].Addresses = []eni.AddressState{{Addr: addr("10.0.16.5"), State: "free"}, {Addr: addr("10.0.16.6"), State: "free"}}
	renderENI(out, calm)
	golden(t, "testdata/eni.txt", b.Bytes())
}

// dual is a node whose pods have addresses of both families.
func dual() eni.State {
	st := network()
	st.Exhausted, st.Blocked, st.MetadataRefused = "", "", 0
	st.ENIs, st.Pods = st.ENIs[:1], st.Pods[1:2]
	st.Pods[0].Addr6 = addr("2402:4e00:1020:1404:0:8cd9:2a67:71f3")
	e := &st.ENIs[0]
	e.Subnet6, e.Primary6 = netip.MustParsePrefix("2402:4e00:1020:1404::/64"), addr("2402:4e00:1020:1404::4")
	e.Addresses = []eni.AddressState{
		{Addr: addr("10.0.16.5"), State: "used", Pod: "default/web-6b8f7c9d4f-x2x7p"}, {Addr: addr("10.0.16.6"), State: "free"},
		{Addr: st.Pods[0].Addr6, State: "used", Pod: "default/web-6b8f7c9d4f-x2x7p"}, {Addr: addr("2402:4e00:1020:1404::6"), State: "cooling", Until: now.Add(62 * time.Second)},
	}
	return st
}

func TestDualStackText(t *testing.T) {
	var b bytes.Buffer
	out := &terminal{w: &b, tty: true, width: 100}
	renderENI(out, dual())
	out.printf("\n")
	renderPods(out, dual())
	golden(t, "testdata/dual.txt", b.Bytes())
}

func TestPodsText(t *testing.T) {
	var b bytes.Buffer
	out := &terminal{w: &b, tty: true, width: 80}
	renderPods(out, network())
	renderPods(out, eni.State{})
	golden(t, "testdata/pods.txt", b.Bytes())
}

func TestExplanationText(t *testing.T) {
	var b bytes.Buffer
	out := &terminal{w: &b, tty: true, width: 80}
	e := eni.Explanation{Subject: "pod default/web-6b8f7c9d4f-x2x7p", Traces: []eni.Trace{{
		Title: "default/web-6b8f7c9d4f-x2x7p  10.0.16.5  container c0ffee  eni-pods0001 of slot 0",
		Legs: []eni.Leg{
			{Title: "out of the pod", Hops: []eni.Hop{
				{Name: "interface", Text: "eth0 10.0.16.5, MAC 0e:d7:24:44:a8:e2, MTU 1500"},
				{Name: "next hop", Text: "via 169.254.1.1 dev eth0, 169.254.1.1 is at 0a:d7:24:44:a8:e2, for good"},
				{Name: "veth", Text: "enid72444a8e21, MAC 0a:d7:24:44:a8:e2, MTU 1500, up"},
				{Name: "nft pods", Text: "10.0.16.5 → slot 0, mark 0x1000000/0x3f000000"},
			}},
			{Title: "to 10.0.16.1, the subnet's gateway", Hops: []eni.Hop{
				{Name: "rule", Text: "1536 from all fwmark 0x1000000/0x3f000000 lookup 4001"},
				{Name: "table 4001", Text: "via 10.0.16.1 dev eth1"},
			}},
			{Title: "eni-pods0001 in slot 0", Hops: []eni.Hop{
				{Name: "cloud", Text: "available, MAC 52:54:00:00:00:02, subnet-pods0001 10.0.16.0/20, security groups sg-pods0001, sg-pods0002"},
			}},
		},
	}}}
	renderExplanation(out, e)
	out.printf("\n")
	e.CloudNotAsked = "vpc DescribeNetworkInterfaces: no answer within 5s"
	e.Traces[0].Legs = e.Traces[0].Legs[1:2]
	renderExplanation(out, e)
	out.printf("\n")
	e.CloudNotAsked = ""
	e.Traces[0].Legs[0].Hops[1].Problems = []eni.Problem{
		{Text: "missing: route default table 4001: via 10.0.16.1 dev eth1 onlink \x1b[2J", Do: "the agent repairs this at once; if it stays: tkenode plan, then journalctl -u tkenode-agent"},
		{Text: "the packet goes nowhere"},
	}
	renderExplanation(out, e)
	golden(t, "testdata/explain.txt", b.Bytes())
}
