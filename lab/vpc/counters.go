package vpc

import (
	"fmt"
	"sync/atomic"
)

// Lab is the name, in Counters, of the lab's own end of the network.
const Lab = "lab"

// Reason is why a frame was dropped.
type Reason uint8

const (
	delivered     Reason = iota
	DropMAC              // the source MAC is not the ENI's
	DropSource           // the IP source is not assigned to the ENI
	DropARPSender        // the sender of an ARP packet is not assigned to the ENI
	DropUnknown          // nobody has the destination
	DropMalformed        // not a frame, an IP packet, an ARP packet or neighbour discovery of the right size and checksum
	DropIPv6             // the subnet has no IPv6
	DropMulticast        // IPv6 multicast that is no neighbour discovery
	DropProtocol         // neither IPv4, IPv6 nor ARP
	DropLinkDown         // the link was set down, or no machine is connected
	DropQueueFull        // the machine does not read as fast as others write to it
	reasons
)

var reasonText = [reasons]string{
	DropMAC: "wrong MAC", DropSource: "source address", DropARPSender: "ARP sender", DropUnknown: "unknown destination",
	DropMalformed: "malformed", DropIPv6: "IPv6", DropMulticast: "IPv6 multicast", DropProtocol: "unknown protocol", DropLinkDown: "link down",
	DropQueueFull: "queue full",
}

func (r Reason) String() string {
	if r == delivered || r >= reasons {
		return fmt.Sprintf("Reason(%d)", uint8(r))
	}
	return reasonText[r]
}

// MarshalText makes reasons readable as keys of a JSON object.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// Traffic counts frames and their bytes, Ethernet header included.
type Traffic struct {
	Packets, Bytes uint64
}

// Counters of one ENI since it was attached, in the machine's words: Tx is what the machine sent and the fabric took,
// Rx what was queued for the machine. A frame that failed a check counts at its sender, one that could not be handed
// over (link down, queue full) at its receiver.
type Counters struct {
	Tx, Rx Traffic
	Drops  map[Reason]uint64 // only those that happened
}

// Counters of every ENI, and of the lab itself under the name Lab.
func (n *Network) Counters() map[string]Counters {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := map[string]Counters{Lab: n.lab.counts.read()}
	for eni, p := range n.ports {
		all[eni] = p.counts.read()
	}
	return all
}

type counts struct {
	tx, rx traffic
	drops  [reasons]atomic.Uint64
}

type traffic struct {
	packets, bytes atomic.Uint64
}

func (t *traffic) add(size int) {
	t.packets.Add(1)
	t.bytes.Add(uint64(size))
}

func (t *traffic) read() Traffic { return Traffic{Packets: t.packets.Load(), Bytes: t.bytes.Load()} }

func (c *counts) read() Counters {
	out := Counters{Tx: c.tx.read(), Rx: c.rx.read(), Drops: map[Reason]uint64{}}
	for r := range c.drops {
		if v := c.drops[r].Load(); v > 0 {
			out.Drops[Reason(r)] = v
		}
	}
	return out
}

// drop counts, and logs the first frame that failed a check of its sender: that is a wrong set-up or worse, and the
// frame says whose.
func (p *port) drop(why Reason, frame []byte) {
	if p.counts.drops[why].Add(1) != 1 {
		return
	}
	switch why {
	case DropMAC, DropSource, DropARPSender:
		p.network.log.Warn("first frame dropped", "eni", p.ENI, "reason", why.String(), "frame", fmt.Sprintf("% x", frame[:min(len(frame), 42)]))
	}
}
