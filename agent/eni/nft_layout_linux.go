package eni

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Our nftables table, as nft prints it, on a node whose primary ENI is eth0 with
// the address 10.0.0.5:
//
//	table inet tkenode {
//		map pods { type ipv4_addr : verdict }                   # address of a pod: its slot
//		map pods6 { type ipv6_addr : verdict }                  # where pods have IPv6 addresses
//		set inside { type ipv4_addr; flags interval }           # who sees a pod's own address
//		set metadata { type ipv4_addr }                         # pods that may ask for metadata
//		chain slot0 { meta mark set meta mark & 0xc0ffffff | 0x01000000 }
//		...
//		chain pods {
//			type filter hook prerouting priority dstnat + 10; policy accept;
//			iifname "eth0" ct status ! confirmed ct mark set ct mark | 0x20000000
//			iifname != "eni*" accept
//			meta nfproto ipv6 goto pods6                    # where pods have IPv6 addresses
//			meta nfproto != ipv4 accept
//			ip saddr vmap @pods
//			meta mark & 0x3f000000 == 0 counter drop
//			meta mark & 0x4000 != 0 ct status ! confirmed ct mark set ct mark | 0x20000000
//			ip daddr != @inside ct status ! confirmed ct mark set ct mark | 0x20000000
//			ct mark & 0x20000000 != 0 meta mark set meta mark & 0xc0ffffff | 0x20000000
//		}
//		chain pods6 {
//			ip6 saddr vmap @pods6
//			meta mark & 0x3f000000 == 0 counter drop
//			ct mark & 0x20000000 != 0 meta mark set meta mark & 0xc0ffffff | 0x20000000
//		}
//		chain outside {
//			type nat hook postrouting priority srcnat; policy accept;
//			oifname "eth0" meta mark & 0x3f000000 == 0x20000000 snat ip to 10.0.0.5 fully-random
//		}
//		chain guard {
//			type filter hook forward priority filter; policy accept;
//			iifname "eni*" ip daddr 169.254.0.23 ip saddr != @metadata jump refuse
//		}
//		chain refuse {
//			counter
//			meta l4proto tcp reject with tcp reset
//			reject with icmpx admin-prohibited
//		}
//	}
//
// One lookup finds the slot of any number of pods, one more whether a destination
// is inside; other bits of both marks are kept. What comes from a pod with an
// address that is not a pod's is dropped.
//
// Which ENI a connection uses is decided by its first packet, and its mark
// remembers it: source NAT is decided then, too, and an answer must leave by the
// ENI that its question came in by. One that came in by the primary ENI, to a
// NodePort or hostPort, is answered through it; one that came from outside to a
// pod's own address, as from a CLB, is answered through the pod's ENI. The chain
// comes after destination NAT, so that a Service is inside if its endpoint is. What
// kube-proxy has marked to be masqueraded, as from a pod to a NodePort, will have the
// node's own address, which the VPC takes by the primary ENI only.
//
// An IPv6 address is a pod's own wherever it goes: there is no source NAT, and every
// connection that a pod opens leaves by the pod's ENI.
//
// The metadata service gives the CAM role's credentials and the user-data to
// whoever asks. A pod that may not is told so at once: by a reset, which unlike
// ICMP errors the kernel sends at any rate.
var (
	nfTable  = &nftables.Table{Name: nftTable, Family: nftables.TableFamilyINet}
	nfPods   = nftables.Set{Table: nfTable, Name: "pods", IsMap: true, KeyType: nftables.TypeIPAddr, DataType: nftables.TypeVerdict}
	nfPods6  = nftables.Set{Table: nfTable, Name: "pods6", IsMap: true, KeyType: nftables.TypeIP6Addr, DataType: nftables.TypeVerdict}
	nfInside = nftables.Set{Table: nfTable, Name: "inside", Interval: true, KeyType: nftables.TypeIPAddr}
	nfPermit = nftables.Set{Table: nfTable, Name: "metadata", KeyType: nftables.TypeIPAddr}

	nfRefuse = &nftables.Chain{Name: "refuse", Table: nfTable}
)

// metadataAddr is the metadata service's.
// Source: https://cloud.tencent.com/document/product/213/4934
var metadataAddr = netip.AddrFrom4([4]byte{169, 254, 0, 23})

const slotChain = "slot"

// masqueradeMark is the bit by which kube-proxy tells packets that it masquerades.
// Source: iptablesMasqueradeBit and nftables.masqueradeBit of KubeProxyConfiguration
const masqueradeMark = 1 << 14

// chains returns the chains of the table with their rules.
func (o table) chains() ([]*nftables.Chain, []*nftables.Rule) {
	policy := nftables.ChainPolicyAccept
	pods := &nftables.Chain{
		Name: "pods", Table: nfTable, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 10), Policy: &policy,
	}
	outside := &nftables.Chain{
		Name: "outside", Table: nfTable, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource, Policy: &policy,
	}
	guard := &nftables.Chain{
		Name: "guard", Table: nfTable, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &policy,
	}
	chains := []*nftables.Chain{pods, outside, guard, nfRefuse}
	var rules []*nftables.Rule
	add := func(c *nftables.Chain, parts ...[]expr.Any) {
		r := &nftables.Rule{Table: nfTable, Chain: c, UserData: userdata.AppendString(nil, userdata.TypeComment, o.layout())}
		for _, p := range parts {
			r.Exprs = append(r.Exprs, p...)
		}
		rules = append(rules, r)
	}
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}

	add(pods, deviceIs(expr.MetaKeyIIFNAME, o.dev), firstPacket, usePrimary)
	if o.exclusive {
		chains = append(chains, o.addExclusive(pods, outside, add))
	}
	add(pods, compare(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, expr.CmpOpNeq, []byte(hostPrefix)), accept)
	unmarked := masked(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, markMask, expr.CmpOpEq, 0)
	drop := []expr.Any{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}}
	answers := masked(&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, primaryMark, expr.CmpOpNeq, 0)
	if o.dual {
		pods6 := &nftables.Chain{Name: nfPods6.Name, Table: nfTable}
		chains = append(chains, pods6)
		add(pods, compare(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, expr.CmpOpEq, []byte{unix.NFPROTO_IPV6}),
			[]expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: pods6.Name}})
		add(pods6, []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: source6Offset, Len: 16},
			&expr.Lookup{SourceRegister: 1, SetName: nfPods6.Name, IsDestRegSet: true},
		})
		add(pods6, unmarked, drop)
		add(pods6, answers, setMark(primaryMark))
	}
	add(pods, compare(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, expr.CmpOpNeq, []byte{unix.NFPROTO_IPV4}), accept)
	add(pods, lookup(sourceOffset, &expr.Lookup{SetName: nfPods.Name, IsDestRegSet: true}))
	add(pods, unmarked, drop)
	add(pods, masked(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, masqueradeMark, expr.CmpOpNeq, 0), firstPacket, usePrimary)
	add(pods, lookup(destinationOffset, &expr.Lookup{SetName: nfInside.Name, Invert: true}), firstPacket, usePrimary)
	add(pods, answers, setMark(primaryMark))

	add(outside, deviceIs(expr.MetaKeyOIFNAME, o.dev), masked(&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, markMask, expr.CmpOpEq, primaryMark), o.asNode())
	add(guard,
		compare(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, expr.CmpOpEq, []byte(hostPrefix)),
		compare(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, expr.CmpOpEq, []byte{unix.NFPROTO_IPV4}),
		compare(address4(destinationOffset), expr.CmpOpEq, metadataAddr.AsSlice()),
		lookup(sourceOffset, &expr.Lookup{SetName: nfPermit.Name, Invert: true}),
		[]expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: nfRefuse.Name}})
	add(nfRefuse, []expr.Any{&expr.Counter{}})
	add(nfRefuse, compare(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, expr.CmpOpEq, []byte{unix.IPPROTO_TCP}),
		[]expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	add(nfRefuse, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}})
	for slot := range maxSlots {
		c := &nftables.Chain{Name: fmt.Sprint(slotChain, slot), Table: nfTable}
		chains = append(chains, c)
		add(c, setMark(slotMark(slot)))
	}
	return chains, rules
}

// Where the addresses of a header are.
const (
	sourceOffset      = 12
	destinationOffset = 16
	source6Offset     = 8
)

var (
	// firstPacket matches the packet that begins a connection, and no other: of a
	// connection that is never answered, every packet would be of state new.
	firstPacket = masked(&expr.Ct{Key: expr.CtKeySTATUS, Register: 1}, statusConfirmed, expr.CmpOpEq, 0)
	// usePrimary remembers that the connection uses the primary ENI.
	usePrimary = remember(primaryMark)
)

// remember sets a bit of the connection's mark.
func remember(bit uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host32(^bit), Xor: host32(bit)},
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true},
	}
}

// asNode translates the source to the node's own address.
func (o table) asNode() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: o.primary.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, FullyRandom: true},
	}
}

// statusConfirmed is IPS_CONFIRMED.
// Source: include/uapi/linux/netfilter/nf_conntrack_common.h
const statusConfirmed = 1 << 3

// setMark sets our bits of the packet's mark.
func setMark(mark uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host32(^uint32(markMask)), Xor: host32(mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
	}
}

// deviceIs compares a device's name, all 16 bytes of it.
func deviceIs(key expr.MetaKey, name string) []expr.Any {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return compare(&expr.Meta{Key: key, Register: 1}, expr.CmpOpEq, b)
}

func compare(load expr.Any, op expr.CmpOp, data []byte) []expr.Any {
	return []expr.Any{load, &expr.Cmp{Op: op, Register: 1, Data: data}}
}

// masked compares bits of what load puts in register 1.
func masked(load expr.Any, mask uint32, op expr.CmpOp, value uint32) []expr.Any {
	return []expr.Any{
		load,
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: host32(mask), Xor: host32(0)},
		&expr.Cmp{Op: op, Register: 1, Data: host32(value)},
	}
}

// address4 loads an address of the packet.
func address4(offset uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}
}

// lookup looks an address of the packet up in a set or map.
func lookup(offset uint32, in *expr.Lookup) []expr.Any {
	in.SourceRegister = 1
	return []expr.Any{address4(offset), in}
}

func host32(v uint32) []byte { return binaryutil.NativeEndian.PutUint32(v) }

// intervals returns the elements of a set of prefixes: the first address of each,
// and the first after it.
func intervals(prefixes []netip.Prefix) (out []nftables.SetElement) {
	for _, p := range prefixes {
		first := p.Masked().Addr().As4()
		out = append(out, nftables.SetElement{Key: first[:]})
		end := uint64(binary.BigEndian.Uint32(first[:])) + 1<<(32-p.Bits())
		if end < 1<<32 {
			out = append(out, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, uint32(end)), IntervalEnd: true})
		}
	}
	return out
}
