package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

const newDiskGiB = 100

// diskNode is the node of one stage: the mount namespace of this process. Its
// /sys/block is a directory of ours with the real attributes of loop devices, and
// serials, which only disks of virtio and NVMe have.
type diskNode struct {
	reporter
	o      DiskOptions
	log    *slog.Logger
	region *cloud.Region
	api    *tencent.Client
	sealed node.Sealed // of an instance that came with as many disks as a CVM takes
	logTo  *os.File
	boots  int
}

const blockDir, blockNew = "/run/sys/block", "/run/sys/new"

func newDiskNode(ctx context.Context, o DiskOptions, out *json.Encoder) (*diskNode, error) {
	if err := errors.Join(
		unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""),
		unix.Mount("proc", "/proc", "proc", 0, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, ""),
		os.MkdirAll(blockDir, 0o755), os.MkdirAll(blockNew, 0o755),
		unix.Mount(blockDir, "/sys/block", "", unix.MS_BIND, ""),
		os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin"),
	); err != nil {
		return nil, fmt.Errorf("make node: %w", err)
	}
	logTo, err := os.Create(filepath.Join(o.Dir, "log"))
	if err != nil {
		return nil, err
	}
	n := &diskNode{o: o, reporter: reporter{out}, log: slog.New(slog.NewTextHandler(logTo, nil)), logTo: logTo}
	return n, n.launch(ctx)
}

// launch launches the instance that the node is, in a region of its own, and waits
// until the cloud tells of its disks.
func (n *diskNode) launch(ctx context.Context) (err error) {
	config := cloud.Default()
	config.Log = n.log
	if n.region, err = cloud.New(config, bare{}, bare{}); err != nil {
		return err
	}
	spec := cloud.InstanceSpec{DataDisks: make([]cloud.DiskSpec, MaxDiskPairs)}
	for i := range spec.DataDisks {
		spec.DataDisks[i].SizeGiB = newDiskGiB
	}
	in, err := n.region.Launch(ctx, spec)
	if err != nil {
		return err
	}
	metadata := tencent.NewMetadata(tencent.MetadataURL)
	metadata.HTTP.Transport = direct{n.region.Metadata(), in.PrivateIP}
	if n.api, err = tencent.NewClient(node.CloudConfig{APIDomain: config.Domain}, config.Region, metadata); err != nil {
		return err
	}
	n.api.HTTP.Transport = direct{n.region.API(), in.PrivateIP}
	n.sealed.Generation = 1
	n.sealed.Config.Cluster.ID = cluster
	for {
		n.sealed.Facts, err = metadata.Facts(ctx)
		if err == nil && len(n.sealed.Facts.DataDisks) == MaxDiskPairs {
			if _, err = n.api.DescribeDisk(ctx, n.sealed.Facts.DataDisks[0]); err == nil {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(100 * time.Millisecond): // a change shows up late
		}
	}
}

func (n *diskNode) close() error {
	n.region.Close()
	return n.logTo.Close()
}

// module is the agent's module for one disk; first says that the NodeConfig was
// sealed in this boot, without which the cloud does not vouch for it. The module is of
// a boot of its own: a disk that is not there has never been.
func (n *diskNode) module(serial string, fs node.FileSystem, first bool) *disk.Disk {
	n.boots++
	return disk.New(disk.Options{
		Want:   node.DiskConfig{DiskID: serial, FileSystem: fs, MountPoint: n.mountPoint(serial)},
		Sealed: n.sealed, FirstBoot: first, Cloud: n.api, Ledger: filepath.Join(n.o.Dir, "ledger"), Run: filepath.Join(n.o.Dir, fmt.Sprint("run-", n.boots)), Helper: n.o.Helper, Log: n.log,
	})
}

func (n *diskNode) mountPoint(serial string) string { return filepath.Join("/run/mnt", serial) }

// bare is a hypervisor and a network of which nothing is asked.
type bare struct{}

func (bare) Run(context.Context, cloud.Machine) error               { return nil }
func (bare) Destroy(context.Context, string) error                  { return nil }
func (bare) PlugNIC(context.Context, string, cloud.NIC) error       { return nil }
func (bare) UnplugNIC(context.Context, string, string) error        { return nil }
func (bare) PlugDisk(context.Context, string, cloud.Volume) error   { return nil }
func (bare) UnplugDisk(context.Context, string, string) error       { return nil }
func (bare) ResizeDisk(context.Context, string, cloud.Volume) error { return nil }
func (bare) Attach(cloud.Port) error                                { return nil }
func (bare) SetAddrs(string, []netip.Addr) error                    { return nil }
func (bare) Detach(string) error                                    { return nil }

// cbs is a disk of the cloud: a sparse file, and a loop device while it is attached.
type cbs struct {
	serial, file string
	name         string   // loop7
	held         *os.File // the device goes when it is closed
}

func (n *diskNode) newDisk(serial string) (*cbs, error) {
	c := &cbs{serial: serial, file: filepath.Join(n.o.Dir, serial)}
	f, err := os.Create(c.file)
	if err == nil {
		err = errors.Join(f.Truncate(newDiskGiB<<30), f.Close())
	}
	return c, err
}

// attach makes the device, of which nobody knows until it appears.
func (c *cbs) attach() (err error) {
	file, err := os.OpenFile(c.file, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("make loop device: %w", err)
	}
	defer control.Close()
	for {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return fmt.Errorf("make loop device: %w", err)
		}
		c.name = fmt.Sprint("loop", number)
		dev, err := os.OpenFile("/dev/"+c.name, os.O_RDWR, 0)
		if err != nil {
			return fmt.Errorf("make loop device: %w", err)
		}
		config := unix.LoopConfig{Fd: uint32(file.Fd())}
		config.Info.Flags = unix.LO_FLAGS_DIRECT_IO | unix.LO_FLAGS_AUTOCLEAR
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if err == nil {
			c.held, err = os.Open("/dev/" + c.name)
		}
		dev.Close()
		if errors.Is(err, unix.EBUSY) { // somebody else was faster
			continue
		}
		return err
	}
}

// What a Premium disk of 100 GiB does in a second.
// Source: https://cloud.tencent.com/document/product/362/2353
const (
	premiumOps   = 1800 + 15*newDiskGiB
	premiumBytes = 115e6 // 100 MB, and 0.15 for each GiB
)

// limit holds the device to what a Premium disk does, or lets it go. Zeros that the
// device is asked to write count as written, since it is not known that a disk of the
// cloud makes them by itself; what is discarded counts as one operation.
// Source: linux Documentation/admin-guide/cgroup-v1/blkio-controller.rst
func (c *cbs) limit(on bool) error {
	number, err := os.ReadFile("/sys/class/block/" + c.name + "/dev")
	if err != nil {
		return err
	}
	ops, bytes := 0, 0
	if on {
		ops, bytes = premiumOps, premiumBytes
	}
	for file, value := range map[string]int{"read_bps_device": bytes, "write_bps_device": bytes, "read_iops_device": ops, "write_iops_device": ops} {
		if err := os.WriteFile(filepath.Join(throttle, "blkio.throttle."+file), fmt.Appendf(nil, "%s %d", strings.TrimSpace(string(number)), value), 0); err != nil {
			return fmt.Errorf("limit %s: %w", c.name, err)
		}
	}
	return nil
}

// throttle is the cgroup that every process of the host is in, or above.
const throttle = "/sys/fs/cgroup/blkio"

// appear gives the device a serial.
func (c *cbs) appear() error {
	entry := filepath.Join(blockNew, c.name)
	if err := os.Mkdir(entry, 0o755); err != nil {
		return err
	}
	for _, a := range []string{"dev", "size", "ro", "holders", "diskseq", "stat"} {
		if err := os.Symlink(filepath.Join("/sys/devices/virtual/block", c.name, a), filepath.Join(entry, a)); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(entry, "serial"), []byte(c.serial), 0o644); err != nil {
		return err
	}
	return os.Rename(entry, filepath.Join(blockDir, c.name))
}

// announce has the kernel tell of the device.
func (c *cbs) announce() error {
	return os.WriteFile("/sys/class/block/"+c.name+"/uevent", []byte("change"), 0)
}

// detach takes the device away, unmounted.
func (c *cbs) detach(mountPoint string) error {
	err := errors.Join(os.RemoveAll(filepath.Join(blockDir, c.name)), unix.Unmount(mountPoint, 0))
	return errors.Join(err, c.held.Close())
}

// traffic is how many bytes the kernel has read from a device, written to it and
// discarded of it.
type traffic struct{ read, written, discarded int64 }

// traffic of the device since it has its name.
// Source: linux Documentation/block/stat.rst
func (c *cbs) traffic() (t traffic, err error) {
	text, err := os.ReadFile("/sys/class/block/" + c.name + "/stat")
	if err != nil {
		return t, err
	}
	f := strings.Fields(string(text))
	if len(f) < 15 {
		return t, fmt.Errorf("statistics of %s have %d fields", c.name, len(f))
	}
	const sector = 512
	for at, to := range map[int]*int64{2: &t.read, 6: &t.written, 13: &t.discarded} {
		n, err := strconv.ParseInt(f[at], 10, 54)
		if err != nil {
			return t, fmt.Errorf("read statistics of %s: %w", c.name, err)
		}
		*to = n * sector
	}
	return t, nil
}
