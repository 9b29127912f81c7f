package eni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Our nftables table, as nft prints it:
//
//	table inet tkenode {
//		map pods { type ipv4_addr : verdict }
//		chain slot0 { meta mark set meta mark & 0xe0ffffff | 0x01000000 }
//		...
//		chain pods {
//			type filter hook prerouting priority mangle; policy accept;
//			iifname "eni*" meta nfproto ipv4 ip saddr vmap @pods
//			iifname "eni*" meta nfproto ipv4 counter drop
//		}
//	}
//
// One lookup finds the slot of any number of pods; other bits of the mark are
// kept. What comes from a pod with an address that is not a pod's is dropped,
// since without a mark it would leave by the primary ENI.
type nft struct {
	conn *nftables.Conn
	sock *netlink.Conn // of conn
}

// nftLayout names the layout above in the text of plans; every rule carries it,
// so that rules that another version made are replaced.
var nftLayout = fmt.Sprintf("layout 1, %d slots", maxSlots)

var (
	nfTable = &nftables.Table{Name: nftTable, Family: nftables.TableFamilyINet}
	nfMap   = &nftables.Set{Table: nfTable, Name: "pods", IsMap: true, KeyType: nftables.TypeIPAddr, DataType: nftables.TypeVerdict}
)

const slotChain = "slot"

// openNFT opens a socket that lasts: closing one that has removed something waits
// until every CPU has let go of it.
// Source: nft_rcv_nl_event in the kernel's net/netfilter/nf_tables_api.c
func openNFT() (*nft, error) {
	f := &nft{}
	var err error
	f.conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		f.sock = c
		return nil
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return f, nil
}

func (f *nft) close() error { return f.conn.CloseLasting() }

// begin returns the connection, with time for one exchange with the kernel.
func (f *nft) begin() (*nftables.Conn, error) {
	return f.conn, f.sock.SetDeadline(time.Now().Add(netlinkTimeout))
}

// flush carries a transaction out. After a refused one the socket may hold answers
// that nobody waits for, so it is replaced.
func (f *nft) flush() error {
	err := f.conn.Flush()
	if err == nil {
		return nil
	}
	again, openErr := openNFT()
	if openErr != nil {
		return errors.Join(err, openErr)
	}
	err = errors.Join(err, f.close())
	*f = nft{again.conn, again.sock}
	return err
}

// layout returns the chains and the rules of the table.
func layout() ([]*nftables.Chain, []*nftables.Rule) {
	policy := nftables.ChainPolicyAccept
	base := &nftables.Chain{
		Name: "pods", Table: nfTable, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle, Policy: &policy,
	}
	chains := []*nftables.Chain{base}
	fromPod := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(hostPrefix)},
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
	}
	rules := []*nftables.Rule{
		{Table: nfTable, Chain: base, Exprs: append(slices.Clone(fromPod),
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
			&expr.Lookup{SourceRegister: 1, SetName: nfMap.Name, IsDestRegSet: true})},
		{Table: nfTable, Chain: base, Exprs: append(slices.Clone(fromPod),
			&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})},
	}
	for slot := range maxSlots {
		c := &nftables.Chain{Name: fmt.Sprint(slotChain, slot), Table: nfTable}
		chains = append(chains, c)
		rules = append(rules, &nftables.Rule{Table: nfTable, Chain: c, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
				Mask: binaryutil.NativeEndian.PutUint32(^uint32(markMask)),
				Xor:  binaryutil.NativeEndian.PutUint32(slotMark(slot))},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: 1, SourceRegister: true},
		}})
	}
	for _, r := range rules {
		r.UserData = userdata.AppendString(nil, userdata.TypeComment, nftLayout)
	}
	return chains, rules
}

// put replaces the whole table in one transaction, so that no packet sees a part
// of it. Pods that are in its map stay in it.
func (o table) put(k *kernel) error {
	elements, err := k.nft.elements()
	if err != nil {
		return err
	}
	c, err := k.nft.begin()
	if err != nil {
		return err
	}
	c.AddTable(nfTable)
	c.DelTable(nfTable)
	c.AddTable(nfTable)
	chains, rules := layout()
	for _, chain := range chains {
		c.AddChain(chain)
	}
	m := *nfMap
	if err := c.AddSet(&m, nil); err != nil {
		return err
	}
	for _, r := range rules {
		c.AddRule(r)
	}
	const batch = 500 // an attribute holds 64 KiB
	var keep []nftables.SetElement
	for _, e := range elements {
		if e.slot >= 0 && e.slot < maxSlots {
			keep = append(keep, e.nftables()...)
		}
	}
	for part := range slices.Chunk(keep, batch) {
		if err := c.SetAddElements(&m, part); err != nil {
			return err
		}
	}
	return k.nft.flush()
}

// find returns the table, if there is one, and its elements.
func (f *nft) find() ([]object, error) {
	c, err := f.begin()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list nftables tables: %w", err)
	}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == nftTable }) {
		return nil, nil
	}
	found, err := f.inspect()
	if err != nil {
		return nil, err
	}
	have := []object{found}
	elements, err := f.elements()
	if err != nil {
		return nil, err
	}
	for _, e := range elements {
		have = append(have, e)
	}
	return have, nil
}

// hasMap reports whether there is a map of pods.
func (f *nft) hasMap() (bool, error) {
	_, err := f.conn.GetSetByName(nfTable, nfMap.Name)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("look for nftables map: %w", err)
	}
	return err == nil, nil
}

// elements returns the map of pods, empty if there is none.
func (f *nft) elements() ([]element, error) {
	ok, err := f.hasMap()
	if err != nil || !ok {
		return nil, err
	}
	all, err := f.conn.GetSetElements(nfMap)
	if err != nil {
		return nil, fmt.Errorf("list nftables elements: %w", err)
	}
	elements := make([]element, 0, len(all))
	for _, e := range all {
		if addr, ok := netip.AddrFromSlice(e.Key); ok {
			elements = append(elements, element{addr, slotOf(e.Val)})
		}
	}
	return elements, nil
}

// slotOf returns the slot that a verdict leads to, or -1. The library hands the
// attributes of a verdict over as they came.
func slotOf(verdict []byte) int {
	attrs, err := netlink.NewAttributeDecoder(verdict)
	if err != nil {
		return -1
	}
	slot := -1
	for attrs.Next() {
		if attrs.Type() != unix.NFTA_VERDICT_CHAIN {
			continue
		}
		if digits, ok := strings.CutPrefix(attrs.String(), slotChain); ok {
			if n, err := strconv.Atoi(digits); err == nil {
				slot = n
			}
		}
	}
	return slot
}

// inspect compares the table with the layout.
func (f *nft) inspect() (table, error) {
	chains, rules := layout()
	if ok, err := f.hasMap(); err != nil || !ok {
		return table{"without its map"}, err
	}
	all, err := f.conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return table{}, fmt.Errorf("list nftables chains: %w", err)
	}
	have := map[string]string{}
	for _, c := range all {
		if c.Table.Name == nftTable {
			have[c.Name] = hookOf(c)
		}
	}
	for _, c := range chains {
		if have[c.Name] != hookOf(c) {
			return table{"chain " + c.Name + " is not ours"}, nil
		}
		got, err := f.conn.GetRules(nfTable, c)
		if err != nil {
			return table{}, fmt.Errorf("list nftables rules: %w", err)
		}
		var want []*nftables.Rule
		for _, r := range rules {
			if r.Chain == c {
				want = append(want, r)
			}
		}
		if !slices.EqualFunc(got, want, sameRule) {
			return table{"rules of chain " + c.Name + " are not ours"}, nil
		}
	}
	if len(have) != len(chains) {
		return table{"with chains that are not ours"}, nil
	}
	return table{}, nil
}

// hookOf returns what makes a chain a base chain.
func hookOf(c *nftables.Chain) string {
	if c.Hooknum == nil || c.Priority == nil || c.Policy == nil {
		return "regular"
	}
	return fmt.Sprintf("%s %d %d %d", c.Type, *c.Hooknum, *c.Priority, *c.Policy)
}

// sameRule compares what the kernel keeps of a rule as it was given. A rule
// cannot be edited in place without losing its comment.
func sameRule(a, b *nftables.Rule) bool {
	return strings.TrimRight(string(a.UserData), "\x00") == strings.TrimRight(string(b.UserData), "\x00") && len(a.Exprs) == len(b.Exprs)
}

func (o element) nftables() []nftables.SetElement {
	return []nftables.SetElement{{
		Key:         o.addr.AsSlice(),
		VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: fmt.Sprint(slotChain, o.slot)},
	}}
}

func (o element) put(k *kernel) error {
	c, err := k.nft.begin()
	if err != nil {
		return err
	}
	if err := c.SetAddElements(nfMap, o.nftables()); err != nil {
		return err
	}
	if err := k.nft.flush(); !errors.Is(err, unix.EEXIST) {
		return err
	}
	// It leads to another slot: replaced in one transaction.
	if c, err = k.nft.begin(); err != nil {
		return err
	}
	if err := errors.Join(c.SetDeleteElements(nfMap, o.nftablesKey()), c.SetAddElements(nfMap, o.nftables())); err != nil {
		return err
	}
	return k.nft.flush()
}

func (o element) drop(k *kernel) error {
	c, err := k.nft.begin()
	if err != nil {
		return err
	}
	if err := c.SetDeleteElements(nfMap, o.nftablesKey()); err != nil {
		return err
	}
	return ignore(k.nft.flush(), unix.ENOENT)
}

func (o element) nftablesKey() []nftables.SetElement {
	return []nftables.SetElement{{Key: o.addr.AsSlice()}}
}
