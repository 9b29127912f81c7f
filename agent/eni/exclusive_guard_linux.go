package eni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The guard's table in the pod's network namespace, as nft prints it:
//
//	table inet tkenode {
//		chain output {
//			type filter hook output priority filter; policy accept;
//			oifname "eth0" meta nfproto ipv4 ip daddr 169.254.0.0/16 drop
//		}
//	}

func (o podGuard) layout() (*nftables.Chain, *nftables.Rule) {
	policy := nftables.ChainPolicyAccept
	output := &nftables.Chain{
		Name: "output", Table: nfTable, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter, Policy: &policy,
	}
	mask := netip.AddrFrom4([4]byte{255, 255, 0, 0})
	return output, &nftables.Rule{
		Table: nfTable, Chain: output, UserData: userdata.AppendString(nil, userdata.TypeComment, o.attr()),
		Exprs: slices.Concat(
			deviceIs(expr.MetaKeyOIFNAME, o.pod.IfName),
			compare(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, expr.CmpOpEq, []byte{unix.NFPROTO_IPV4}),
			[]expr.Any{
				address4(destinationOffset),
				&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask.AsSlice(), Xor: make([]byte, 4)},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: linkLocalRange.Addr().AsSlice()},
				&expr.Verdict{Kind: expr.VerdictDrop},
			}),
	}
}

// nftables opens nftables of the pod, for one exchange or two.
func (k *podKernel) nftables() (*nftables.Conn, error) {
	return nftables.New(nftables.WithNetNSFd(int(k.ns.Fd())), nftables.WithSockOptions(func(c *netlink.Conn) error {
		return c.SetDeadline(time.Now().Add(netlinkTimeout))
	}))
}

func (o podGuard) put(k *kernel) error {
	pod, err := k.enter(o.pod.NetNS)
	if err != nil {
		return err
	}
	c, err := pod.nftables()
	if err != nil {
		return fmt.Errorf("open nftables of %s: %w", o.pod, err)
	}
	output, drop := o.layout()
	c.AddTable(nfTable)
	c.DelTable(nfTable)
	c.AddTable(nfTable)
	c.AddChain(output)
	c.AddRule(drop)
	return c.Flush()
}

// observeGuard returns the guard if the pod has one.
func (k *podKernel) observeGuard(p Pod) ([]object, error) {
	c, err := k.nftables()
	if err != nil {
		return nil, fmt.Errorf("open nftables of %s: %w", p, err)
	}
	output, drop := podGuard{pod: p}.layout()
	rules, err := c.GetRules(nfTable, output)
	switch {
	case errors.Is(err, unix.ENOENT):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("list nftables rules of %s: %w", p, err)
	case len(rules) != 1 || !sameRule(rules[0], drop):
		return []object{podGuard{pod: p, found: "other rules"}}, nil
	}
	return []object{podGuard{pod: p}}, nil
}
