package eni

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// watchKernel calls wake whenever links, addresses, routes, rules, their sysctls,
// neighbours of pods or nftables change, of IPv6 if six, after it has told fights who
// did it. It returns when ctx ends or when messages were lost.
func watchKernel(ctx context.Context, six bool, fights *fights, wake func()) error {
	group := func(n int) uint32 { return 1 << (n - 1) }
	families := map[int]uint32{
		unix.NETLINK_ROUTE: group(unix.RTNLGRP_LINK) | group(unix.RTNLGRP_IPV4_IFADDR) | group(unix.RTNLGRP_IPV4_ROUTE) |
			group(unix.RTNLGRP_IPV4_RULE) | group(unix.RTNLGRP_IPV4_NETCONF) | group(unix.RTNLGRP_IPV6_NETCONF),
		unix.NETLINK_NETFILTER: group(unix.NFNLGRP_NFTABLES),
	}
	if six {
		families[unix.NETLINK_ROUTE] |= group(unix.RTNLGRP_IPV6_IFADDR) | group(unix.RTNLGRP_IPV6_ROUTE) | group(unix.RTNLGRP_IPV6_RULE) |
			group(unix.RTNLGRP_NEIGH)
	}
	ended := make(chan error, len(families))
	running := 0
	var conns []*netlink.Conn
	var err error
	for family, groups := range families {
		conn, dialErr := netlink.Dial(family, &netlink.Config{Groups: groups})
		if dialErr != nil {
			err = fmt.Errorf("watch netlink family %d: %w", family, dialErr)
			break
		}
		conns = append(conns, conn)
		running++
		go func() {
			h := heard{fights: fights}
			for {
				messages, err := conn.Receive()
				if err != nil {
					ended <- fmt.Errorf("watch netlink family %d: %w", family, err)
					return
				}
				messages = slices.DeleteFunc(messages, passing)
				for _, m := range messages {
					if family == unix.NETLINK_ROUTE {
						h.route(m)
					} else {
						h.nftables(m)
					}
				}
				if len(messages) > 0 {
					wake()
				}
			}
		}()
	}
	if err == nil {
		wake() // for what has changed before
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case err = <-ended:
			running--
		}
	}
	for _, c := range conns {
		err = errors.Join(err, c.Close())
	}
	for range running {
		<-ended
	}
	return err
}

// passing reports whether a message is of a neighbour that comes and goes by itself,
// as those do that the kernel asks for: none of IPv4 is ours, and of IPv6 those that
// stay, until somebody takes one away.
func passing(m netlink.Message) bool {
	if m.Header.Type != unix.RTM_NEWNEIGH && m.Header.Type != unix.RTM_DELNEIGH || len(m.Data) < unix.SizeofNdMsg {
		return false
	}
	state := binary.NativeEndian.Uint16(m.Data[8:])
	return m.Data[0] != unix.AF_INET6 || state&(unix.NUD_PERMANENT|unix.NUD_FAILED) == 0
}
