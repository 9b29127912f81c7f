package vpc

import (
	"fmt"
	"net"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// NewTap creates a tap with the given name and MAC in the network namespace of the calling thread, for AttachTap. It
// needs CAP_NET_ADMIN, leaves the interface down, and the interface goes when the file is closed.
func NewTap(name string, mac net.HardwareAddr) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	if err := setTap(fd, name, mac); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("create tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun:"+name), nil
}

func setTap(fd int, name string, mac net.HardwareAddr) error {
	request, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return err
	}
	hardware := struct {
		name [unix.IFNAMSIZ]byte
		addr unix.RawSockaddr
		_    [8]byte // the rest of struct ifreq
	}{addr: unix.RawSockaddr{Family: unix.ARPHRD_ETHER}}
	for i, b := range mac {
		hardware.addr.Data[i] = int8(b)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCSIFHWADDR, uintptr(unsafe.Pointer(&hardware))); errno != 0 {
		return fmt.Errorf("set MAC %s: %w", mac, errno)
	}
	return nil
}
