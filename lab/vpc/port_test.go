package vpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// machine is a QEMU without a computer in it.
type machine struct {
	t    *testing.T
	conn net.Conn
}

func connect(t *testing.T, n *Network, eni, socket string) *machine {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	for range 10000 {
		if n.Connected(eni) {
			return &machine{t, conn}
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("the fabric does not see the machine")
	return nil
}

func (m *machine) send(frames ...[]byte) {
	m.t.Helper()
	var b []byte
	for _, f := range frames {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(f))), f...)
	}
	if _, err := m.conn.Write(b); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) receive() []byte {
	m.t.Helper()
	var size [4]byte
	if _, err := io.ReadFull(m.conn, size[:]); err != nil {
		m.t.Fatal(err)
	}
	frame := make([]byte, binary.BigEndian.Uint32(size[:]))
	if _, err := io.ReadFull(m.conn, frame); err != nil {
		m.t.Fatal(err)
	}
	return frame
}

// waitFor has from send the frame until it arrives: one that is sent while the fabric still changes connections is
// lost, as on a wire.
func (m *machine) waitFor(from *machine, frame []byte) {
	m.t.Helper()
	for range 100 {
		from.send(frame)
		m.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		var first [4]byte
		if size, _ := io.ReadFull(m.conn, first[:]); size == len(first) {
			m.conn.SetDeadline(time.Now().Add(10 * time.Second))
			io.CopyN(io.Discard, m.conn, int64(binary.BigEndian.Uint32(first[:])))
			return
		}
	}
	m.t.Fatal("no frame arrives")
}

func TestStream(t *testing.T) {
	n := newNetwork(t)
	dir := shortDir(t)
	nodeSocket, podSocket := filepath.Join(dir, "node"), filepath.Join(dir, "pods")
	if err := n.Attach(nodePort(), nodeSocket); err != nil {
		t.Fatal(err)
	}
	if err := n.Attach(podPort(), podSocket); err != nil {
		t.Fatal(err)
	}
	node, pods := connect(t, n, "eni-node", nodeSocket), connect(t, n, "eni-pods", podSocket)

	// Two frames in one write, the second oversized; then one in pieces.
	hello := ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, "hello"))
	pods.send(hello, make([]byte, 40000), hello)
	for _, b := range append([]byte{0, 0, 0, byte(len(hello))}, hello...) {
		pods.conn.Write([]byte{b})
	}
	for range 3 {
		if f := node.receive(); string(f[len(f)-5:]) != "hello" {
			t.Errorf("frame:\n%s", hex.Dump(f))
		}
	}
	wantDrops(t, n, "eni-pods", map[Reason]uint64{DropMalformed: 1})

	// A machine that is started again while its old connection hangs about.
	again := connect(t, n, "eni-node", nodeSocket)
	if _, err := io.Copy(io.Discard, node.conn); err != nil {
		t.Error("the old connection was not ended:", err)
	}
	again.waitFor(pods, hello)

	// A stream out of step ends the connection, and the next one works.
	pods.conn.Write([]byte{0xff, 0xff, 0xff, 0xff, 0})
	if _, err := io.Copy(io.Discard, pods.conn); err != nil && !strings.Contains(err.Error(), "reset") {
		t.Error(err)
	}
	again.waitFor(connect(t, n, "eni-pods", podSocket), hello)

	if err := n.Detach("eni-node"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, again.conn); err != nil {
		t.Error("detached, but still connected:", err)
	}
	if err := n.Detach("eni-node"); err == nil {
		t.Error("detached twice")
	}
	if err := n.Attach(nodePort(), nodeSocket); err != nil {
		t.Error("attach again:", err)
	}
}

// A machine that does not read must hold up nobody, not even its own end; what waited for it is not for its successor.
func TestStreamStalled(t *testing.T) {
	n := newNetwork(t)
	socket := filepath.Join(shortDir(t), "node")
	if err := n.Attach(nodePort(), socket); err != nil {
		t.Fatal(err)
	}
	stalled := connect(t, n, "eni-node", socket)
	pods := addPort(t, n, podPort())
	frame := ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, strings.Repeat("x", 1400)))
	for n.Counters()["eni-node"].Drops[DropQueueFull] == 0 {
		n.receive(pods, frame)
	}
	stalled.conn.Close()
	for n.Connected("eni-node") {
		time.Sleep(time.Millisecond)
	}
	next := connect(t, n, "eni-node", socket)
	n.receive(pods, ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, "new")))
	if f := next.receive(); !bytes.HasSuffix(f, []byte("new")) {
		t.Errorf("the next machine gets %d bytes that waited for the one before", len(f))
	}
	for n.Counters()["eni-node"].Drops[DropQueueFull] < 2 {
		n.receive(pods, frame)
	}
	if err := n.Detach("eni-node"); err != nil {
		t.Error(err)
	}
}

func TestCapture(t *testing.T) {
	n := newNetwork(t)
	pods := addPort(t, n, podPort())
	ctx, cancel := context.WithCancel(t.Context())
	var file bytes.Buffer
	done := make(chan error, 1)
	go func() { done <- n.Capture(ctx, &file, "eni-pods") }()
	for pods.capture.Load() == nil {
		time.Sleep(time.Millisecond)
	}
	if err := n.Capture(ctx, io.Discard, "eni-pods"); err == nil {
		t.Error("captured twice at a time")
	}
	asked := ethernet(podMAC, etherARP, arp(1, podMAC, podENI, otherIP))
	dropped := ethernet(podMAC, etherIPv4, datagram(nodeIP, nodeIP, 1, 2, ""))
	n.receive(pods, asked)
	n.receive(pods, dropped)
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	want := [][]byte{asked, sent(pods)[0], dropped}
	b := file.Bytes()
	if !bytes.Equal(b[:8], []byte{0x4d, 0x3c, 0xb2, 0xa1, 2, 0, 4, 0}) {
		t.Fatalf("file header % x", b[:24])
	}
	// The question is recorded before its answer, which is what the reader of a capture expects.
	for b = b[24:]; len(b) > 0 && len(want) > 0; want = want[1:] {
		size := binary.LittleEndian.Uint32(b[8:])
		if !bytes.Equal(b[16:16+size], want[0]) {
			t.Errorf("record\n%swant\n%s", hex.Dump(b[16:16+size]), hex.Dump(want[0]))
		}
		b = b[16+size:]
	}
	if len(b)+len(want) != 0 {
		t.Errorf("%d bytes more, %d frames missing", len(b), len(want))
	}
	if err := n.Capture(ctx, io.Discard, "eni-none"); err == nil {
		t.Error("captured an ENI that is not attached")
	}
	go func() { done <- n.Capture(t.Context(), io.Discard, "eni-pods") }()
	for pods.capture.Load() == nil {
		time.Sleep(time.Millisecond)
	}
	n.Detach("eni-pods")
	select {
	case err := <-done:
		if err != nil {
			t.Error("capture of a detached ENI:", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the capture of a detached ENI does not end")
	}
}

// FuzzStream: whatever a machine writes, the fabric takes in step or ends the connection.
func FuzzStream(f *testing.F) {
	frame := ethernet(podMAC, etherIPv4, datagram(podIP, nodeIP, 1, 2, "hello"))
	whole := append(binary.BigEndian.AppendUint32(nil, uint32(len(frame))), frame...)
	f.Add(whole)
	f.Add(append(append([]byte{0, 0, 0x9c, 0x40}, make([]byte, 40000)...), whole...))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0, 0, 0})
	n := newNetwork(f)
	addPort(f, n, nodePort())
	pods := addPort(f, n, podPort())
	f.Fuzz(func(t *testing.T, stream []byte) {
		if err := readStream(&pieces{stream}, pods); err == nil {
			t.Error("the stream did not end")
		}
		sent(pods)
	})
}

// pieces reads in pieces of growing size.
type pieces struct{ rest []byte }

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	size := copy(b, p.rest[:min(len(p.rest), 1+len(p.rest)/3)])
	p.rest = p.rest[size:]
	return size, nil
}
