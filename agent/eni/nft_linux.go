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
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nft is a connection to nftables of this network namespace.
type nft struct {
	conn *nftables.Conn
	sock *netlink.Conn // of conn
}

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

// put replaces the whole table in one transaction, so that no packet sees a part
// of it. Pods that are in its map stay in it.
func (o table) put(k *kernel) error {
	c, err := k.nft.begin() // the time that the last exchange was given may be over
	if err != nil {
		return err
	}
	elements, err := k.nft.elements(o.dual)
	if err != nil {
		return err
	}
	permits, err := k.nft.list(nfPermit)
	if err != nil {
		return err
	}
	c.AddTable(nfTable)
	c.DelTable(nfTable)
	c.AddTable(nfTable)
	chains, rules := o.chains()
	for _, chain := range chains {
		c.AddChain(chain)
	}
	pods, pods6, inside, permit := nfPods, nfPods6, nfInside, nfPermit // the library writes to them
	if o.dual {
		if err := c.AddSet(&pods6, nil); err != nil {
			return err
		}
	}
	if err := errors.Join(c.AddSet(&pods, nil), c.AddSet(&inside, intervals(o.inside)), c.AddSet(&permit, nil)); err != nil {
		return err
	}
	for _, r := range rules {
		c.AddRule(r)
	}
	const batch = 500 // an attribute holds 64 KiB
	keep := map[*nftables.Set][]nftables.SetElement{&permit: permits}
	for _, e := range elements {
		in := &pods
		if e.addr.Is6() {
			in = &pods6
		}
		if slotNumber(e.slot) && (e.slot < maxSlots || o.exclusive) && (o.dual || in == &pods) {
			keep[in] = append(keep[in], e.nftables()...)
		}
	}
	for set, all := range keep {
		for part := range slices.Chunk(all, batch) {
			if err := c.SetAddElements(set, part); err != nil {
				return err
			}
		}
	}
	return k.nft.flush()
}

// find returns the table, if there is one, compared with the one in want, and its
// elements, of IPv6 if six.
func (f *nft) find(want []object, six bool) ([]object, error) {
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
	var have []object
	for _, o := range want {
		if t, ok := o.(table); ok {
			if t.found, err = f.inspect(t); err != nil {
				return nil, err
			}
			have = append(have, t)
		}
	}
	elements, err := f.elements(six)
	if err != nil {
		return nil, err
	}
	for _, e := range elements {
		have = append(have, e)
	}
	permits, err := f.list(nfPermit)
	if err != nil {
		return nil, err
	}
	for _, e := range permits {
		if addr, ok := netip.AddrFromSlice(e.Key); ok {
			have = append(have, permit{addr})
		}
	}
	return have, nil
}

// refusedNow returns how many packets of pods to the metadata service were refused.
// Its socket is its own: whoever asks waits for no plan.
func refusedNow() (uint64, error) {
	f, err := openNFT()
	if err != nil {
		return 0, err
	}
	n, err := f.refused()
	return n, errors.Join(err, f.close())
}

// refused returns how many packets to the metadata service were refused since the
// table was made.
func (f *nft) refused() (uint64, error) {
	if _, err := f.begin(); err != nil {
		return 0, err
	}
	rules, err := f.conn.GetRules(nfTable, nfRefuse)
	if err != nil {
		return 0, ignore(fmt.Errorf("list nftables rules: %w", err), unix.ENOENT)
	}
	for _, r := range rules {
		for _, e := range r.Exprs {
			if c, ok := e.(*expr.Counter); ok {
				return c.Packets, nil
			}
		}
	}
	return 0, nil
}

// has reports whether there is a set or map.
func (f *nft) has(set nftables.Set) (bool, error) {
	_, err := f.conn.GetSetByName(nfTable, set.Name)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("look for nftables set %s: %w", set.Name, err)
	}
	return err == nil, nil
}

// list returns the elements of a set or map, none if it is not there.
func (f *nft) list(set nftables.Set) ([]nftables.SetElement, error) {
	ok, err := f.has(set)
	if err != nil || !ok {
		return nil, err
	}
	all, err := f.conn.GetSetElements(&set)
	if err != nil {
		return nil, fmt.Errorf("list nftables set %s: %w", set.Name, err)
	}
	return all, nil
}

// elements returns what is in the maps of pods; of IPv6 if there may be any.
func (f *nft) elements(six bool) ([]element, error) {
	all, err := f.list(nfPods)
	if err == nil && six {
		var more []nftables.SetElement
		more, err = f.list(nfPods6)
		all = append(all, more...)
	}
	if err != nil {
		return nil, err
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
		if attrs.String() == exclusiveChain {
			slot = exclusiveSlot
		}
		if digits, ok := strings.CutPrefix(attrs.String(), slotChain); ok {
			if n, err := strconv.Atoi(digits); err == nil {
				slot = n
			}
		}
	}
	return slot
}

// inspect says in what the table differs from the one that is wanted.
func (f *nft) inspect(want table) (string, error) {
	sets := []nftables.Set{nfPods, nfInside, nfPermit}
	if want.dual {
		sets = append(sets, nfPods6)
	}
	for _, set := range sets {
		if ok, err := f.has(set); err != nil || !ok {
			return "without " + set.Name, err
		}
	}
	inside, err := f.list(nfInside)
	if err != nil {
		return "", err
	}
	if !slices.Equal(bounds(inside), bounds(intervals(want.inside))) {
		return "another inside", nil
	}
	chains, rules := want.chains()
	all, err := f.conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return "", fmt.Errorf("list nftables chains: %w", err)
	}
	have := map[string]string{}
	for _, c := range all {
		if c.Table.Name == nftTable {
			have[c.Name] = hookOf(c)
		}
	}
	for _, c := range chains {
		if have[c.Name] != hookOf(c) {
			return "chain " + c.Name + " is not ours", nil
		}
		got, err := f.conn.GetRules(nfTable, c)
		if err != nil {
			return "", fmt.Errorf("list nftables rules: %w", err)
		}
		ours := slices.DeleteFunc(slices.Clone(rules), func(r *nftables.Rule) bool { return r.Chain != c })
		if !slices.EqualFunc(got, ours, sameRule) {
			return "rules of chain " + c.Name + " are not ours", nil
		}
	}
	if len(have) != len(chains) {
		return "with chains that are not ours", nil
	}
	return "", nil
}

// bounds are the ends of intervals, in order. The kernel may add one at 0.0.0.0.
func bounds(elements []nftables.SetElement) (out []string) {
	for _, e := range elements {
		if addr, ok := netip.AddrFromSlice(e.Key); ok && !(e.IntervalEnd && addr.IsUnspecified()) {
			out = append(out, fmt.Sprint(addr, e.IntervalEnd))
		}
	}
	slices.Sort(out)
	return out
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
		VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: o.chain()},
	}}
}

// in returns the map that the element is in.
func (o element) in() *nftables.Set {
	if o.addr.Is6() {
		return &nfPods6
	}
	return &nfPods
}

// chain is where the address leads to.
func (o element) chain() string {
	if o.slot >= exclusiveSlot {
		return exclusiveChain
	}
	return fmt.Sprint(slotChain, o.slot)
}

func (o element) put(k *kernel) error {
	c, err := k.nft.begin()
	if err != nil {
		return err
	}
	if err := c.SetAddElements(o.in(), o.nftables()); err != nil {
		return err
	}
	if err := k.nft.flush(); !errors.Is(err, unix.EEXIST) {
		return err
	}
	// It leads to another slot: replaced in one transaction.
	if c, err = k.nft.begin(); err != nil {
		return err
	}
	if err := errors.Join(c.SetDeleteElements(o.in(), o.nftablesKey()), c.SetAddElements(o.in(), o.nftables())); err != nil {
		return err
	}
	return k.nft.flush()
}

func (o element) drop(k *kernel) error {
	c, err := k.nft.begin()
	if err != nil {
		return err
	}
	if err := c.SetDeleteElements(o.in(), o.nftablesKey()); err != nil {
		return err
	}
	return ignore(k.nft.flush(), unix.ENOENT)
}

func (o element) nftablesKey() []nftables.SetElement {
	return []nftables.SetElement{{Key: o.addr.AsSlice()}}
}

func (o permit) nftables() []nftables.SetElement {
	return []nftables.SetElement{{Key: o.addr.AsSlice()}}
}

func (o permit) put(k *kernel) error {
	c, err := k.nft.begin()
	if err != nil {
		return err
	}
	if err := c.SetAddElements(&nfPermit, o.nftables()); err != nil {
		return err
	}
	return ignore(k.nft.flush(), unix.EEXIST)
}

func (o permit) drop(k *kernel) error {
	c, err := k.nft.begin()
	if err != nil {
		return err
	}
	if err := c.SetDeleteElements(&nfPermit, o.nftables()); err != nil {
		return err
	}
	return ignore(k.nft.flush(), unix.ENOENT)
}
