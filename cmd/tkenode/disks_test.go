package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/kube"
	"github.com/tkenode/tkenode/agent/node"
)

// someDisks are one that is mounted, one that is read, one that is absent, an encrypted
// stripe, one of which a disk is missing, one that is ill and one that is gone.
func someDisks() []disk.State {
	return []disk.State{
		{
			Now: now, Name: "disk/disk-1a2b3c4d", DiskID: "disk-1a2b3c4d", Device: "/dev/vdb", SizeBytes: 100 << 30, State: disk.Mounted, Since: ago(time.Hour),
			MountPoint: "/var/lib/containerd", FileSystem: "ext4", UUID: "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ab",
			BoundBy: "selector", Binding: "by the selector sizeGiB 100, on 2026-01-02 02:03:04Z: the only data disk that fits, as cbs DescribeDisks says; kept for ever",
			Proof:    "new, as the cloud says (cbs DescribeDisks CreateTime 2026-01-02 10:01:00 UTC+8); both ends were read as zero",
			Ledger:   &disk.Past{State: "formatted", At: ago(time.Hour)},
			Steps:    []disk.Step{{Name: "sample", Began: ago(time.Hour), Ended: ago(time.Hour - 350*time.Millisecond)}},
			Trim:     &disk.TrimState{Last: disk.Trim{At: ago(30 * time.Minute), Took: 2100 * time.Millisecond, Bytes: 80 << 30}, Next: now.Add(100 * time.Hour)},
			Warnings: []disk.Warning{{Reason: disk.ReasonNeedsReattach, Since: ago(time.Minute), Message: "the cloud says that disk-1a2b3c4d has 200 GiB, and /dev/vdb has 100 GiB"}},
		},
		{
			Now: now, Name: "disk/disk-read0000", DiskID: "disk-read0000", Device: "/dev/vdc", SizeBytes: 1 << 40, State: "Proving", Since: ago(time.Minute),
			MountPoint: "/data", FileSystem: "xfs", BoundBy: "diskID", Binding: "named by disks[].diskID", Message: "read 1 % of disk-read0000 (/dev/vdc, 1 TiB), 150.0 MiB/s, 1h55m left",
			Evidence: []disk.Evidence{
				{Source: "/sys/block/vdc", Text: "its live serial is disk-read0000", Good: true},
				{Source: "cvm DescribeInstances DataDisks[].SnapshotId", Text: "listed: true, made from the snapshot snap-abc12345"},
			},
			Steps: []disk.Step{{Name: "read", Began: ago(time.Minute)}},
		},
		{
			Now: now, Name: "disk/data", SizeBytes: 0, State: "Absent", MountPoint: "/logs", FileSystem: "ext4", BoundBy: "only disk", Binding: "the only data disk of the instance, not found yet",
			Message: "no data disk is attached; one is wanted for /logs\x1b[2J",
		},
		{
			Now: now, Name: "disk/disk-stripe00", DiskID: "disk-stripe00", BoundBy: "diskIDs", Binding: "named by disks[].diskIDs", Device: "/dev/dm-0", SizeBytes: 200 << 30, State: disk.Mounted, Since: ago(time.Hour),
			MountPoint: "/both", FileSystem: "ext4", UUID: "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ab",
			Members: []disk.Member{{DiskID: "disk-stripe00", Device: "/dev/vdd", SizeBytes: 100 << 30}, {DiskID: "disk-stripe01", Device: "/dev/vde", SizeBytes: 100 << 30}},
			Layers: []string{
				"raid0 /dev/md128 of 2 disks, chunks of 512 KiB, clean",
				"LUKS2 /dev/dm-0 (/dev/mapper/tke-stripe00), uuid 7d2f3ab8-0d0a-8bdc-8a3e-0123456789ab",
			},
		},
		{
			Now: now, Name: "disk/disk-stripe02", DiskID: "disk-stripe02", BoundBy: "diskIDs", Binding: "named by disks[].diskIDs", State: "Absent", MountPoint: "/logs", FileSystem: "ext4",
			Members: []disk.Member{{DiskID: "disk-stripe02", Device: "/dev/vdf", SizeBytes: 100 << 30}, {DiskID: "disk-stripe03"}},
			Message: "the stripe for /logs has 2 disks, and not all are there: disk-stripe03 is not attached; it is never used without one of them",
		},
		{
			Now: now, Name: "disk/disk-ill00000", DiskID: "disk-ill00000", Device: "/dev/vdd", SizeBytes: 1 << 40, State: disk.Mounted, Since: ago(time.Hour),
			MountPoint: "/db", FileSystem: "ext4", UUID: "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ac",
			Health: []node.Condition{{
				Type: node.Ext4Error, Status: node.True, Reason: "DiskDamaged", Since: ago(time.Minute),
				Message: "disk-ill00000 (/dev/vdd) on /db has noted errors (1, the first 2026-01-02 03:03:05Z); run e2fsck",
			}},
		},
		{
			Now: now, Name: "disk/disk-gone0000", DiskID: "disk-gone0000", State: disk.Gone, Since: ago(time.Minute),
			MountPoint: "/cache", FileSystem: "ext4", Fenced: true,
			Message: "disk-gone0000, which was mounted on /cache, is gone since 2026-01-02 03:03:05Z; attach it to this instance again",
		},
	}
}

func TestDisksText(t *testing.T) {
	var b bytes.Buffer
	out := &terminal{w: &b, tty: true, width: 100}
	renderDisks(out, someDisks())
	for _, s := range someDisks() {
		out.printf("\n---\n")
		renderDisk(out, s)
	}
	golden(t, "testdata/disks.txt", b.Bytes())
}

func TestVolumesText(t *testing.T) {
	var b bytes.Buffer
	out := &terminal{w: &b, width: 100}
	others := []disk.Other{
		{DiskID: "disk-csi00001", Device: "/dev/vdc", SizeBytes: 10 << 30, CSI: true, Pods: 1, Volume: "disk-csi00001"},
		{DiskID: "disk-csi00002", Device: "/dev/vdd", SizeBytes: 10 << 30, CSI: true, Volume: "disk-csi00003", Mismatch: "it is the volume disk-csi00003"},
		{DiskID: "disk-csi00004", Device: "/dev/vde", SizeBytes: 10 << 30, CSI: true, Pods: 2},
		{DiskID: "disk-byhand00", Device: "/dev/vdf", SizeBytes: 1 << 40, Mount: "/mnt"},
		{DiskID: "disk-byhand01", Device: "/dev/vdg", SizeBytes: 1 << 40},
	}
	for _, l := range []kube.Limit{
		{},
		{At: now, Max: 20, NotCSI: []string{"disk-1a2b3c4d"}, Driver: 18, Published: 18},
		{At: now, Max: 20, NotCSI: []string{"disk-1a2b3c4d", "disk-byhand00", "disk-byhand01"}, Driver: 18, Published: 17},
		{At: now, Max: 20, NotCSI: []string{"disk-1a2b3c4d", "disk-byhand00", "disk-byhand01"}, Driver: 18, Published: 18, Message: "the API server does not let it be changed"},
		{At: now, Message: "the CBS CSI driver is not registered on this node"},
	} {
		renderVolumes(out, api.Volumes{Others: others, Limit: l})
		others = nil
	}
	golden(t, "testdata/volumes.txt", b.Bytes())
}
