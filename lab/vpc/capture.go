package vpc

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// captureBytes bounds what a slow reader of a capture can make wait; what does not fit is missed, never delayed.
const captureBytes = 4 << 20

// Capture writes what passes the ENI's port, dropped frames of the machine included, to w as pcap until ctx ends or
// the ENI is detached. One capture an ENI at a time.
func (n *Network) Capture(ctx context.Context, w io.Writer, eni string) error {
	n.mu.Lock()
	p, ok := n.ports[eni]
	n.mu.Unlock()
	if !ok {
		return fmt.Errorf("capture %s: not attached", eni)
	}
	c := new(capture)
	c.init(captureBytes)
	if !p.capture.CompareAndSwap(nil, c) {
		return fmt.Errorf("capture %s: being captured already", eni)
	}
	defer p.capture.Store(nil)
	if err := c.write(ctx, w, p.gone); err != nil {
		return fmt.Errorf("capture %s: %w", eni, err)
	}
	if missed := c.missed.Load(); missed > 0 {
		return fmt.Errorf("capture %s: %d frames missed: the reader was too slow", eni, missed)
	}
	return nil
}

type capture struct {
	queue
	missed atomic.Uint64
}

// record queues one frame as a pcap record.
func (c *capture) record(head, body []byte) {
	now, size := time.Now(), uint32(len(head)+len(body))
	var h [16]byte
	binary.LittleEndian.PutUint32(h[0:], uint32(now.Unix()))
	binary.LittleEndian.PutUint32(h[4:], uint32(now.Nanosecond()))
	binary.LittleEndian.PutUint32(h[8:], size)
	binary.LittleEndian.PutUint32(h[12:], size)
	if !c.put(h[:], head, body) {
		c.missed.Add(1)
	}
}

func (c *capture) write(ctx context.Context, w io.Writer, gone <-chan struct{}) error {
	var h [24]byte // magic of nanosecond pcap, version 2.4, snap length, link type Ethernet
	binary.LittleEndian.PutUint32(h[0:], 0xa1b23c4d)
	binary.LittleEndian.PutUint16(h[4:], 2)
	binary.LittleEndian.PutUint16(h[6:], 4)
	binary.LittleEndian.PutUint32(h[16:], 1<<16)
	binary.LittleEndian.PutUint32(h[20:], 1)
	if _, err := w.Write(h[:]); err != nil {
		return err
	}
	var batch []byte
	for ended := false; !ended; {
		select {
		case <-c.wake:
		case <-gone:
			ended = true
		case <-ctx.Done():
			ended = true
		}
		batch = c.take(batch)
		if _, err := w.Write(batch); err != nil {
			return err
		}
	}
	return nil
}
