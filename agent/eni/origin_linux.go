package eni

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Who has changed what is ours, as far as the kernel tells. Its messages of rules,
// routes, addresses and removed links carry the port of the socket that asked for
// the change, which is the pid of its process, if that has no other socket of the
// family; those of nftables end with pid and name. Of sysctls and of links that
// are set up or down it tells nothing, and so of routes that go with a link.
// Source: fib_nl_delrule, rtmsg_fib, inet6_rt_notify, rtmsg_ifa, neigh_delete,
// rtnl_delete_link and nf_tables_fill_gen_info in the kernel; inet6_ifa_notify leaves
// the port out

// heard looks for a culprit in what the kernel tells. A process may end at any
// moment, so this comes before everything else.
type heard struct {
	fights  *fights
	touched bool    // our nftables table, in a transaction whose end has not been told yet
	port    uint32  // that was looked up last
	owner   culprit // of it
}

func (h *heard) route(m netlink.Message) {
	if kind := routeKind(m); kind != "" && m.Header.PID != 0 { // 0 is the kernel's
		if h.port != m.Header.PID || time.Since(h.owner.at) > time.Second {
			h.port, h.owner = m.Header.PID, ownerOf(m.Header.PID)
		}
		if h.owner.pid != os.Getpid() && h.owner.pid != 0 {
			h.owner.at = time.Now()
			h.fights.blame(kind, h.owner)
		}
	}
}

// routeKind returns the kind of object that a message of rtnetlink is of, if it
// may be one of ours.
func routeKind(m netlink.Message) string {
	attr := func(header int, kind uint16) []byte {
		if len(m.Data) < header {
			return nil
		}
		attrs, err := netlink.UnmarshalAttributes(m.Data[header:])
		if err != nil {
			return nil
		}
		for _, a := range attrs {
			if a.Type == kind {
				return a.Data
			}
		}
		return nil
	}
	six := len(m.Data) > 1 && m.Data[0] == unix.AF_INET6
	switch m.Header.Type {
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		if bytes.Equal(attr(unix.SizeofRtMsg, unix.FRA_PROTOCOL), []byte{protocol}) {
			return "rule" + family(six)
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		table := 0
		if b := attr(unix.SizeofRtMsg, unix.RTA_TABLE); len(b) == 4 {
			table = int(binary.NativeEndian.Uint32(b))
		}
		if len(m.Data) > 5 && m.Data[5] == protocol || table >= podTable && table <= exclusiveTable {
			return "route" + family(six)
		}
	case unix.RTM_DELADDR:
		if len(m.Data) > 1 && m.Data[1] == 32 {
			return "address"
		}
	case unix.RTM_NEWNEIGH: // it fails before it is deleted, and only that says who did it
		if six {
			return "neighbour"
		}
	case unix.RTM_DELLINK:
		if strings.HasPrefix(string(attr(unix.SizeofIfInfomsg, unix.IFLA_IFNAME)), hostPrefix) {
			return "veth"
		}
	}
	return ""
}

func (h *heard) nftables(m netlink.Message) {
	const header = 4 // struct nfgenmsg
	if len(m.Data) < header || int(m.Header.Type)>>8 != unix.NFNL_SUBSYS_NFTABLES {
		return
	}
	attrs, err := netlink.UnmarshalAttributes(m.Data[header:])
	if err != nil {
		return
	}
	if m.Header.Type&0xff != unix.NFT_MSG_NEWGEN {
		// The first attribute of all of them is the name of the table.
		for _, a := range attrs {
			if a.Type == unix.NFTA_TABLE_NAME && m.Data[0] == unix.NFPROTO_INET && unix.ByteSliceToString(a.Data) == nftTable {
				h.touched = true
			}
		}
		return
	}
	c := culprit{at: time.Now()}
	for _, a := range attrs {
		switch a.Type {
		case unix.NFTA_GEN_PROC_PID:
			if len(a.Data) == 4 {
				c.pid = int(binary.BigEndian.Uint32(a.Data))
			}
		case unix.NFTA_GEN_PROC_NAME:
			c.name = unix.ByteSliceToString(a.Data)
		}
	}
	// The pid is of a thread.
	_, notOurs := os.Stat(fmt.Sprint("/proc/self/task/", c.pid))
	if h.touched && c.pid != 0 && notOurs != nil {
		h.fights.blame("nft", c)
	}
	h.touched = false
}

// ownerOf returns the process that has the socket of rtnetlink with that port. When
// that is closed the port is a guess: it may be a pid of a container's.
func ownerOf(port uint32) culprit {
	c := culprit{pid: int(port), at: time.Now()}
	socket := socketOf(port)
	if socket != "" {
		c.pid = 0
		own := []string{strconv.Itoa(os.Getpid()), strconv.Itoa(int(port))}
		others, _ := filepath.Glob("/proc/[0-9]*")
		for _, dir := range append(own, others...) {
			pid := filepath.Base(dir)
			if holds(pid, socket) {
				c.pid, _ = strconv.Atoi(pid)
				break
			}
		}
	}
	if c.pid > maxPID { // a second socket, which the kernel numbers from the other end
		c.pid = 0
	}
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c.pid))
	if err == nil {
		c.name = strings.TrimSpace(string(name))
		if socket == "" {
			c.name = "probably " + c.name
		}
	}
	return c
}

// maxPID is PID_MAX_LIMIT of the kernel.
const maxPID = 1 << 22

// socketOf returns what a descriptor of the socket with that port links to, or
// nothing if there is none any more.
func socketOf(port uint32) string {
	text, err := os.ReadFile("/proc/self/net/netlink")
	if err != nil {
		return ""
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		f := strings.Fields(lines.Text()) // sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
		if len(f) == 10 && f[1] == strconv.Itoa(unix.NETLINK_ROUTE) && f[2] == strconv.FormatUint(uint64(port), 10) {
			return "socket:[" + f[9] + "]"
		}
	}
	return ""
}

func holds(pid, socket string) bool {
	dir := "/proc/" + pid + "/fd/"
	entries, _ := os.ReadDir(dir) // it may have ended
	for _, e := range entries {
		if to, err := os.Readlink(dir + e.Name()); err == nil && to == socket {
			return true
		}
	}
	return false
}
