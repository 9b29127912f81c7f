package vpc

import (
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzReceive: no frame can crash the fabric, every frame is taken or dropped once, and none gets through in the name
// of somebody else.
func FuzzReceive(f *testing.F) {
	for _, seed := range [][]byte{
		nil,
		ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, "hello")),
		ethernet(podMAC, etherIPv4, datagram(podIP, gateway, 1, 53, "hello")),
		ethernet(podMAC, etherARP, arp(1, podMAC, podENI, otherIP)),
		ethernet(nodeMAC, etherIPv4, datagram(nodeIP, limitedBroadcast, 68, 67, strings.Repeat("\x01", 300))),
		ethernet(podMAC, etherIPv6, make([]byte, 40)),
	} {
		f.Add(seed, false)
		f.Add(seed, true)
	}
	n := newNetwork(f)
	node, pods := addPort(f, n, nodePort()), addPort(f, n, podPort())
	f.Fuzz(func(t *testing.T, frame []byte, primary bool) {
		from, to := pods, node
		if primary {
			from, to = node, pods
		}
		before := accounted(n.Counters()[from.ENI])
		n.receive(from, frame)
		if after := accounted(n.Counters()[from.ENI]); after != before+1 {
			t.Errorf("%d frames accounted for, want 1", after-before)
		}
		for _, got := range sent(to) {
			h, ok := parseIPv4(got[ethernetHeader:])
			if !ok || (*n.owners.Load())[h.src] != from || (*n.owners.Load())[h.dst] != to {
				t.Errorf("%s got through from %s", h.src, from.ENI)
			}
		}
		sent(from)
	})
}

func accounted(c Counters) uint64 {
	sum := c.Tx.Packets
	for why, v := range c.Drops {
		if why != DropQueueFull {
			sum += v
		}
	}
	return sum
}

// BenchmarkForward is one packet from port to port: checks, look-up, copy to the receiver's queue.
func BenchmarkForward(b *testing.B) {
	for _, size := range []int{64, 1514} {
		b.Run(map[int]string{64: "64", 1514: "1514"}[size], func(b *testing.B) {
			n := newNetwork(b)
			node, pods := addPort(b, n, nodePort()), addPort(b, n, podPort())
			frame := ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, strings.Repeat("x", size-42)))
			batch := node.out.take(nil)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				n.receive(pods, frame)
				if i%128 == 127 {
					batch = node.out.take(batch)
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "packets/s")
		})
	}
}

// BenchmarkStream is the same between two machines on unix sockets, system calls and all.
func BenchmarkStream(b *testing.B) {
	n := newNetwork(b)
	dir := shortDir(b)
	var conns []net.Conn
	for _, p := range []Port{nodePort(), podPort()} {
		socket := filepath.Join(dir, p.ENI)
		if err := n.Attach(p, socket); err != nil {
			b.Fatal(err)
		}
		conn, err := net.Dial("unix", socket)
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		for !n.Connected(p.ENI) {
		}
		conns = append(conns, conn)
	}
	frame := ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, strings.Repeat("x", 1472)))
	one := append([]byte{0, 0, byte(len(frame) >> 8), byte(len(frame))}, frame...)
	const burst = 64 // QEMU writes frame by frame; what waits in the socket is read at once
	got := make([]byte, burst*len(one))
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; left -= burst {
		for range min(burst, left) {
			if _, err := conns[1].Write(one); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := io.ReadFull(conns[0], got[:min(burst, left)*len(one)]); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "packets/s")
}
