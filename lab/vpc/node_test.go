//go:build node

package vpc

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

// A virtual machine without a disk boots from the network: QEMU's own firmware asks DHCP and takes what it is offered.
func TestNodeFirmwareTakesTheLease(t *testing.T) {
	n := newNetwork(t)
	socket := filepath.Join(shortDir(t), "eth0")
	p := nodePort()
	if err := n.Attach(p, socket); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	reader, writer := io.Pipe()
	captured := make(chan error, 1)
	go func() {
		err := n.Capture(ctx, writer, p.ENI)
		writer.Close()
		captured <- err
	}()

	var console bytes.Buffer
	vm := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "tcg", "-machine", "q35", "-m", "128",
		"-nodefaults", "-display", "none",
		"-netdev", "stream,id=eth0,server=off,addr.type=unix,addr.path="+socket,
		"-device", fmt.Sprintf("virtio-net-pci,netdev=eth0,mac=%s,bootindex=0", p.MAC))
	vm.Stdout, vm.Stderr = &console, &console
	if err := vm.Start(); err != nil {
		t.Fatal(err)
	}
	requested := requestedAddress(t, reader)
	cancel()
	reader.Close()
	vm.Wait() // killed
	<-captured
	if !requested {
		t.Errorf("no request of the offered address: %v\n%s", n.Counters()[p.ENI], console.String())
	}
	drops := n.Counters()[p.ENI].Drops
	delete(drops, DropIPv6) // the firmware looks for a router
	if len(drops) > 0 {
		t.Errorf("dropped: %v", drops)
	}
}

// requestedAddress reads a capture until the machine requests the address that it was offered.
func requestedAddress(t *testing.T, capture io.Reader) bool {
	if _, err := io.CopyN(io.Discard, capture, 24); err != nil {
		return false
	}
	for {
		var head [16]byte
		if _, err := io.ReadFull(capture, head[:]); err != nil {
			return false
		}
		frame := make([]byte, binary.LittleEndian.Uint32(head[8:]))
		if _, err := io.ReadFull(capture, frame); err != nil {
			return false
		}
		h, ok := parseIPv4(frame[ethernetHeader:])
		if !ok || !h.dhcp {
			continue
		}
		m, err := dhcpv4.FromBytes(h.payload[8:])
		if err != nil {
			t.Fatal(err)
		}
		t.Log(m.MessageType(), m.RequestedIPAddress())
		if m.MessageType() == dhcpv4.MessageTypeRequest && m.RequestedIPAddress().Equal(nodeIP.AsSlice()) {
			return true
		}
	}
}
