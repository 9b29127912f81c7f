package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

const openRead = unix.O_RDONLY

// fileSystemSize returns the size in bytes of the file system that is mounted on m,
// as the kernel has it now.
func (d *Disk) fileSystemSize(dev device, m mount) (int64, error) {
	if m.FSType == string(node.XFS) {
		return xfsSize(m.Target, dev)
	}
	f, err := d.open(dev, unix.O_RDONLY)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	// Through the page cache, where ext4 keeps its superblock: what the disk itself
	// holds may be older. Source: linux fs/ext4/super.c, s_sbh
	super := make([]byte, 1024)
	if _, err := f.ReadAt(super, 1024); err != nil {
		return 0, fmt.Errorf("read superblock of %s: %w", dev, err)
	}
	size, ok := ext4Size(super)
	if !ok {
		return 0, fmt.Errorf("read superblock of %s: it is not one of ext4", dev)
	}
	return size, nil
}

// ext4Size reads the size in bytes out of a superblock.
// Source: linux fs/ext4/ext4.h, struct ext4_super_block
func ext4Size(super []byte) (int64, bool) {
	le := binary.LittleEndian
	const has64 = 0x80 // EXT4_FEATURE_INCOMPAT_64BIT
	blocks := int64(le.Uint32(super[0x4:]))
	if le.Uint32(super[0x60:])&has64 != 0 {
		blocks |= int64(le.Uint32(super[0x150:])) << 32
	}
	shift := 10 + le.Uint32(super[0x18:])
	ok := le.Uint16(super[0x38:]) == 0xef53 && shift <= 16 && blocks > 0 && blocks < 1<<46
	return blocks << (shift & 31), ok
}

// xfsGeometry is struct xfs_fsop_geom_v4, which every kernel knows.
// Source: linux fs/xfs/libxfs/xfs_fs.h
type xfsGeometry struct {
	blockSize     uint32
	_             [6]uint32
	maxInodeShare uint32
	blocks        uint64
	_             [72]byte
}

const xfsFSGeometryV4 = 2<<30 | unsafe.Sizeof(xfsGeometry{})<<16 | 'X'<<8 | 124 // _IOR('X', 124, …)

func xfsSize(target string, dev device) (int64, error) {
	f, err := openMount(target, dev)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	g, err := geometry(f)
	return int64(g.blocks) * int64(g.blockSize), err
}

// geometry asks xfs for its geometry, by its root directory.
func geometry(root *os.File) (g xfsGeometry, err error) {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), xfsFSGeometryV4, uintptr(unsafe.Pointer(&g))); errno != 0 {
		err = fmt.Errorf("ask xfs on %s for its size: %w", root.Name(), errno)
	}
	return g, err
}

// xfsGrowth is struct xfs_growfs_data.
// Source: linux fs/xfs/libxfs/xfs_fs.h
type xfsGrowth struct {
	blocks        uint64
	maxInodeShare uint32
	_             uint32
}

const xfsFSGrowData = 1<<30 | unsafe.Sizeof(xfsGrowth{})<<16 | 'X'<<8 | 110 // _IOW('X', 110, …)

// writeCopies has xfs write the copies of its superblock: asked to grow to the size
// that it has, that is all it does. xfs_growfs would not ask.
// Source: linux fs/xfs/xfs_fsops.c, xfs_growfs_data
func writeCopies(root *os.File) error {
	g, err := geometry(root)
	if err != nil {
		return err
	}
	same := xfsGrowth{blocks: g.blocks, maxInodeShare: g.maxInodeShare}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), xfsFSGrowData, uintptr(unsafe.Pointer(&same))); errno != 0 {
		return fmt.Errorf("write copies of the superblock of xfs on %s: %w", root.Name(), errno)
	}
	return nil
}

// openMount opens the mount point and makes sure that dev is mounted there. While
// it is open the file system cannot be unmounted.
func openMount(target string, dev device) (*os.File, error) {
	f, err := os.OpenFile(target, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open mount point: %w", err)
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	if err == nil && devNumber(st.Dev) != dev.Dev {
		err = fmt.Errorf("device %s is mounted there, not %s: %w", devNumber(st.Dev), dev, errChanged)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open mount point %s: %w", target, err)
	}
	return f, nil
}

// mayResize reports whether the kernel would let a program of ours grow an ext4.
// Source: linux fs/ext4/resize.c, ext4_resize_begin
func mayResize() bool {
	has, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	return err != nil || has == 1
}

// growNow has the file system grown, and verifies that it was, and on which disk.
func (d *Disk) growNow(ctx context.Context, g *growing, pin *os.File) error {
	// While it is open it is not unmounted.
	target, err := openMount(g.m.Target, g.dev)
	if err != nil {
		return err
	}
	defer target.Close()
	if g.dev.room()-g.from < blockGroup {
		return writeCopies(target)
	}
	dev := g.dev
	if dev.room() > dev.SizeBytes {
		if dev, err = d.widen(ctx, dev); err != nil {
			return g.terminal("look at `dmesg`, and see that the key is as it was; it is tried again when tkenode-agent is restarted", err)
		}
	}
	args := []string{"resize2fs", "/proc/self/fd/3"}
	if g.m.FSType == string(node.XFS) {
		args = []string{"xfs_growfs", "-d", g.m.Target}
	} else if !mayResize() {
		return g.terminal("see with `systemctl cat tkenode-agent` what takes CAP_SYS_RESOURCE from its CapabilityBoundingSet",
			errors.New("the agent lacks CAP_SYS_RESOURCE"))
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.ExtraFiles = []*os.File{pin} // descriptor 3
	cmd.WaitDelay = 10 * time.Second
	var errs bytes.Buffer
	cmd.Stderr = &errs // xfs_growfs first says much of what is there to its standard output
	if err := cmd.Run(); err != nil {
		return refusal(g, args[0], errs.String(), err)
	}
	if err := d.same(dev); err != nil {
		return err
	}
	size, err := d.fileSystemSize(dev, g.m)
	if err == nil && dev.SizeBytes-size >= blockGroup {
		err = g.terminal("look at `dmesg`", fmt.Errorf("%s says that all is well, and it has %s", args[0], Size(size)))
	}
	if err == nil && g.m.FSType == string(node.XFS) {
		// A program of an agent that was killed may have been faster, and ours then asked
		// for nothing: the size is the right one, and nobody writes the copies.
		err = writeCopies(target)
	}
	return err
}
