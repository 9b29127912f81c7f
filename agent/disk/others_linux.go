package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"
)

// watch looks at all disks when a block device comes, goes or changes, and every
// minute. It only reads.
func (o *Others) watch(ctx context.Context) error {
	events, err := uevents()
	if err != nil {
		return err
	}
	defer events.Close()
	ended, end, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("watch block devices: %w", err)
	}
	defer ended.Close()
	stop := context.AfterFunc(ctx, func() { end.Close() })
	defer func() {
		if stop() {
			end.Close()
		}
	}()
	fds := []unix.PollFd{{Fd: int32(events.Fd()), Events: unix.POLLIN}, {Fd: int32(ended.Fd()), Events: unix.POLLIN}}
	for wait := othersSoon; ; {
		if err := o.look(ctx); err != nil {
			return err
		}
		if _, err := unix.Poll(fds, int(wait/time.Millisecond)); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch block devices: %w", err)
		}
		if fds[1].Revents != 0 {
			return ctx.Err()
		}
		wait = othersPeriod
		if fds[0].Revents != 0 {
			if _, err := readUevents(events); err != nil {
				return err
			}
			wait = othersSoon
		}
	}
}

// look looks at all disks once. One that does not answer when it is asked for its
// serial is left to answer: the next look is a minute away.
func (o *Others) look(ctx context.Context) error {
	result := make(chan error, 1)
	go func() {
		all, err := o.observe()
		if err == nil {
			o.set(all)
		}
		result <- err
	}()
	t := time.NewTimer(othersPeriod)
	defer t.Stop()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return errors.New("a disk does not tell its serial")
	}
}

func (o *Others) observe() ([]Other, error) {
	var have observed
	var err error
	if have.Devices, err = devices(o.sys, nil); err != nil {
		return nil, err
	}
	if have.Mounts, err = mounts(); err != nil {
		return nil, err
	}
	data := map[string]string{}
	for _, m := range have.Mounts {
		if path.Base(m.Target) != path.Base(globalMount) {
			continue
		}
		f, err := os.Open(path.Join(path.Dir(m.Target), volumeData))
		if err != nil {
			continue // it is not one of kubelet's
		}
		text, err := io.ReadAll(io.LimitReader(f, maxData))
		if f.Close(); err == nil {
			data[m.Target] = parseVolume(text)
		}
	}
	var ours []string
	for _, s := range o.ours() {
		ours = append(ours, s.IDs()...)
	}
	return others(ours, have, data), nil
}
