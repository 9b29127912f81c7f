package api

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peer is the process at the other end when it connected.
type peer struct {
	pid    int32
	uid    uint32
	groups []uint32 // primary and supplementary
}

// trusted reports whether the peer is root, or the user that the agent runs as,
// which is root except in tests.
func (p peer) trusted() bool { return p.uid == 0 || p.uid == uint32(os.Geteuid()) }

// may reports whether the peer may use a route.
func (p peer) may(a access, group int) bool {
	return p.trusted() || a == read && group >= 0 && slices.Contains(p.groups, uint32(group))
}

type peerKey struct{}

// withPeer keeps in its context who is at the other end of a new connection.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, peerKey{}, c.(*conn).peer)
}

// readPeer asks the kernel who connected.
func readPeer(c *net.UnixConn) (peer, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return peer{}, fmt.Errorf("read peer credentials: %w", err)
	}
	var p peer
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			credErr = err
			return
		}
		p = peer{pid: cred.Pid, uid: cred.Uid, groups: []uint32{cred.Gid}}
		more, err := peerGroups(fd)
		p.groups, credErr = append(p.groups, more...), err
	})
	if err := errors.Join(err, credErr); err != nil {
		return peer{}, fmt.Errorf("read peer credentials: %w", err)
	}
	return p, nil
}

// peerGroups returns the supplementary groups of the process that connected
// (SO_PEERGROUPS, Linux 4.13; golang.org/x/sys has the constant but no call).
func peerGroups(fd uintptr) ([]uint32, error) {
	groups := make([]uint32, 32)
	for {
		size := uint32(len(groups) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, fd, unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE && int(size) > len(groups)*4: // size is what is needed
			groups = make([]uint32, size/4)
		case errno != 0:
			return nil, errno
		default:
			return groups[:size/4], nil
		}
	}
}
