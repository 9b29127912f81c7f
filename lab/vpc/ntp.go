package vpc

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"time"
)

// NTPServer is where time1.tencentyun.com answers in the lab.
var NTPServer = netip.AddrPortFrom(netip.AddrFrom4([4]byte{169, 254, 0, 79}), 123)

// clock is what NTP tells.
type clock struct {
	offset  time.Duration
	answers bool
}

// SetClock makes NTP tell the host's time plus offset, or nothing at all.
func (n *Network) SetClock(offset time.Duration, answers bool) {
	n.clock.Store(&clock{offset: offset, answers: answers})
}

func (n *Network) startNTP(ctx context.Context) error {
	conn, err := n.ListenPacket(NTPServer)
	if err != nil {
		return err
	}
	n.services.Go(func() {
		defer context.AfterFunc(ctx, func() { conn.Close() })()
		for {
			var request [48]byte
			size, from, err := conn.ReadFrom(request[:])
			if err != nil {
				if ctx.Err() == nil {
					n.log.Error("NTP stopped", "err", err)
				}
				return
			}
			if c := n.clock.Load(); c.answers && size == len(request) {
				answerNTP(conn, from, request, time.Now().Add(c.offset))
			}
		}
	})
	return nil
}

// answerNTP is a server of RFC 4330 (SNTP), section 5.
func answerNTP(conn net.PacketConn, to net.Addr, request [48]byte, now time.Time) {
	const client, server = 3, 4
	if request[0]&7 != client {
		return
	}
	var reply [48]byte
	reply[0] = request[0]&0x38 | server // no leap second, the client's version
	reply[1] = 2                        // stratum: the host is synchronised to something better
	reply[2] = request[2]               // poll interval
	reply[3] = 0xec                     // precision: 2^-20 s
	binary.BigEndian.PutUint32(reply[8:], 1<<16/1000)
	copy(reply[12:], NTPServer.Addr().AsSlice()) // reference identifier
	stamp := ntpTime(now)
	binary.BigEndian.PutUint64(reply[16:], stamp)
	copy(reply[24:], request[40:]) // originate: the client's transmit time
	binary.BigEndian.PutUint64(reply[32:], stamp)
	binary.BigEndian.PutUint64(reply[40:], stamp)
	conn.WriteTo(reply[:], to)
}

// ntpTime is seconds since 1900 in 32.32 fixed point.
func ntpTime(t time.Time) uint64 {
	const since1900 = 2208988800
	return uint64(t.Unix()+since1900)<<32 | uint64(t.Nanosecond())<<32/1e9
}
