package eni

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/tencent"
)

// witness is what the node itself still knows when the ledger does not: the pods
// whose links are in the kernel.
type witness struct {
	instance   string
	configured bool // pods have been wired since the node booted
	pods       []Pod
}

// witness looks at the kernel; false while it is not known whose ledger it is.
func (n *Network) witness() (witness, bool, error) {
	sealed, ok := n.sealed()
	if !ok {
		return witness{}, false, nil
	}
	links, err := dump(netlink.LinkList)
	if err != nil {
		return witness{}, false, fmt.Errorf("list links: %w", err)
	}
	w := witness{instance: sealed.Facts.InstanceID}
	for _, l := range links {
		if !ours(l) {
			continue
		}
		if p, ok := podOf(l.Attrs().Name, l.Attrs().Alias); ok {
			p.MTU = l.Attrs().MTU
			w.pods = append(w.pods, p)
		}
	}
	_, err = os.Stat(n.paths.configured)
	w.configured = err == nil
	return w, true, nil
}

// podOf reads the alias of a link back. The link's name proves that the container
// is meant: it follows from it. The namespace's path is not known, so a pod whose
// link is deleted once more has to be added anew.
func podOf(name, text string) (Pod, bool) {
	f := strings.Fields(strings.TrimPrefix(text, aliasPrefix))
	if len(f) != 5 || !strings.HasPrefix(text, aliasPrefix) {
		return Pod{}, false
	}
	four, six, dual := strings.Cut(f[0], ",")
	addr, addrErr := netip.ParseAddr(four)
	slot, slotErr := strconv.Atoi(f[1])
	p := Pod{Attachment: cni.Attachment{ContainerID: f[2], IfName: f[3]}, Addr: addr, Slot: slot}
	if dual && addrErr == nil {
		p.Addr6, addrErr = netip.ParseAddr(six)
	}
	p.Namespace, p.Name, _ = strings.Cut(f[4], "/")
	host, _, _ := vethOf(p.Attachment)
	return p, addrErr == nil && slotErr == nil && slotNumber(slot) && host == name
}

// complete adds to the state of this boot what the ledger has lost: pods whose
// links are there although nothing is recorded of their address. It returns what
// was wrong, or nothing. Where something was, any address may have had a pod until
// a moment ago: all rest.
func (s *state) complete(w witness, damaged error, now time.Time) error {
	var lost []Pod
	for _, p := range w.pods {
		_, known := s.Pods[p.Attachment]
		// Its DEL is recorded, and the link was still to go. One that is older has a
		// record that was lost: with a pod's namespace its link goes, too.
		rests := s.Rested[p.Addr].After(now)
		if !known && !rests {
			lost = append(lost, p)
		}
	}
	why := damaged
	switch {
	case why != nil:
	case len(lost) > 0:
		why = fmt.Errorf("it does not know %d pods that have links, %s among them", len(lost), lost[0])
	case s.Instance == "" && w.configured:
		why = errors.New("it is missing, although pods have been wired since the node booted")
	default:
		return nil
	}
	if s.Instance == "" {
		s.Instance = w.instance
	}
	for _, p := range lost {
		// Two links never have one address; if they do, neither is believed.
		shares := func(q Pod) bool { return q.has(p.Addr) || q.has(p.Addr6) }
		if slices.ContainsFunc(w.pods, func(q Pod) bool { return shares(q) && q.Attachment != p.Attachment }) {
			continue
		}
		// Whoever had the address before has no link: its DEL was lost.
		maps.DeleteFunc(s.Pods, func(_ cni.Attachment, old Pod) bool { return shares(old) })
		p.bind(s.Slots[p.Slot])
		p.ENI, p.Since, p.Found = s.Slots[p.Slot].ENI, now.UTC().Truncate(time.Millisecond), true
		s.Pods[p.Attachment] = p
	}
	s.Settled = now.Add(coolDown).UTC().Truncate(time.Second)
	return why
}

// awaits reports whether a slot must have the ENI that it had when the ledger was
// lost, since pods have addresses of it.
func (s state) awaits(slot int) bool {
	for _, p := range s.Pods {
		if p.ENI == "" && p.Slot == slot {
			return true
		}
	}
	return false
}

// awaited returns the slot that awaits an ENI: one of its pods has an address of it.
func (s state) awaited(e tencent.ENI) (int, bool) {
	for _, p := range s.Pods {
		if p.ENI == "" && slices.ContainsFunc(e.IPs, func(ip tencent.IP) bool { return ip.Addr == p.Addr }) {
			return p.Slot, true
		}
	}
	return 0, false
}

// homeless returns a pod whose slot is not known: the ledger was rebuilt.
func (s state) homeless() (Pod, bool) {
	for _, p := range s.pods() {
		if !s.Slots[p.Slot].taken() {
			return p, true
		}
	}
	return Pod{}, false
}
