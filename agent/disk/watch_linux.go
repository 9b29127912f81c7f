package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Watch wakes the disk when a block device comes, goes or changes, and when what
// is mounted at the mount point changes. Meanwhile the disk is tended.
func (d *Disk) Watch(ctx context.Context, wake func()) error {
	events, err := uevents()
	if err != nil {
		return err
	}
	defer events.Close()
	// Not by os.Open: the runtime would poll the file, too, and a change is told
	// to whoever polls first.
	info, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("watch mounts: %w", err)
	}
	defer unix.Close(info)
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
	tending, endTending := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer endTending()
	before, _ := d.mountedNow()
	wake()
	wg.Go(func() { d.tend(tending, wake) })
	fds := []unix.PollFd{
		{Fd: int32(events.Fd()), Events: unix.POLLIN},
		{Fd: int32(info), Events: unix.POLLPRI}, // POLLERR tells of a change, too
		{Fd: int32(ended.Fd()), Events: unix.POLLIN},
	}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch block devices: %w", err)
		}
		if fds[2].Revents != 0 {
			return ctx.Err()
		}
		if fds[0].Revents != 0 {
			block, err := readUevents(events)
			if err != nil {
				return err
			}
			if block {
				wake()
				d.poke()
			}
		}
		if fds[1].Revents != 0 {
			// Pods mount and unmount all the time; only one mount is ours.
			now, err := d.mountedNow()
			if err != nil {
				return err
			}
			if now != before {
				before = now
				wake()
				d.poke()
			}
		}
	}
}

func (d *Disk) mountedNow() (mount, error) {
	all, err := mounts()
	m, _ := observed{Mounts: all}.at(d.want.MountPoint)
	return m, err
}

// uevents returns a socket on which the kernel announces its devices.
func uevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("watch block devices: %w", err)
	}
	const kernel = 1 // the kernel's group; 2 is udevd's
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernel}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("watch block devices: %w", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}

// readUevents reads all that has arrived and reports whether any of it is about
// a block device. Lost messages are an error, so that everything is looked at.
func readUevents(events *os.File) (block bool, err error) {
	buf := make([]byte, 8<<10) // the kernel's limit is 2 KiB and the path
	for {
		n, from, err := unix.Recvfrom(int(events.Fd()), buf, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return block, nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return block, fmt.Errorf("read uevents: %w", err)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); ok && sender.Pid == 0 { // of the kernel, not of a process
			block = block || bytes.Contains(buf[:n], []byte("\x00SUBSYSTEM=block\x00"))
		}
	}
}
