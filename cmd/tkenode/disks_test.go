package main

import (
	"bytes"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/disk"
)

// someDisks are one that is mounted, one that is read, one that is absent, an encrypted
// stripe, and one of which a disk is missing.
func someDisks() []disk.State {
	return []disk.State{
		{
			Now: now, Name: "disk/disk-1a2b3c4d", DiskID: "disk-1a2b3c4d", Device: "/dev/vdb", SizeBytes: 100 << 30, State: disk.Mounted, Since: ago(time.Hour),
			MountPoint: "/var/lib/containerd", FileSystem: "ext4", UUID: "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ab",
			Proof:  "new, as the cloud says (cbs DescribeDisks CreateTime 2026-01-02 10:01:00 UTC+8); both ends were read as zero",
			Ledger: &disk.Past{State: "formatted", At: ago(time.Hour)},
			Steps:  []disk.Step{{Name: "sample", Began: ago(time.Hour), Ended: ago(time.Hour - 350*time.Millisecond)}},
		},
		{
			Now: now, Name: "disk/disk-read0000", DiskID: "disk-read0000", Device: "/dev/vdc", SizeBytes: 1 << 40, State: "Proving", Since: ago(time.Minute),
			MountPoint: "/data", FileSystem: "xfs", Message: "read 1 % of disk-read0000 (/dev/vdc, 1 TiB), 150.0 MiB/s, 1h55m left",
			Evidence: []disk.Evidence{
				{Source: "/sys/block/vdc", Text: "its live serial is disk-read0000", Good: true},
				{Source: "cvm DescribeInstances DataDisks[].SnapshotId", Text: "listed: true, made from the snapshot snap-abc12345"},
			},
			Steps: []disk.Step{{Name: "read", Began: ago(time.Minute)}},
		},
		{
			Now: now, Name: "disk/data", SizeBytes: 0, State: "Absent", MountPoint: "/logs", FileSystem: "ext4",
			Message: "no data disk is attached; one is wanted for /logs\x1b[2J",
		},
		{
			Now: now, Name: "disk/disk-stripe00", DiskID: "disk-stripe00", Device: "/dev/dm-0", SizeBytes: 200 << 30, State: disk.Mounted, Since: ago(time.Hour),
			MountPoint: "/both", FileSystem: "ext4", UUID: "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ab",
			Members: []disk.Member{{DiskID: "disk-stripe00", Device: "/dev/vdd", SizeBytes: 100 << 30}, {DiskID: "disk-stripe01", Device: "/dev/vde", SizeBytes: 100 << 30}},
			Layers: []string{
				"raid0 /dev/md128 of 2 disks, chunks of 512 KiB, clean",
				"LUKS2 /dev/dm-0 (/dev/mapper/tke-stripe00), uuid 7d2f3ab8-0d0a-8bdc-8a3e-0123456789ab",
			},
		},
		{
			Now: now, Name: "disk/disk-stripe02", DiskID: "disk-stripe02", State: "Absent", MountPoint: "/logs", FileSystem: "ext4",
			Members: []disk.Member{{DiskID: "disk-stripe02", Device: "/dev/vdf", SizeBytes: 100 << 30}, {DiskID: "disk-stripe03"}},
			Message: "the stripe for /logs has 2 disks, and not all are there: disk-stripe03 is not attached; it is never used without one of them",
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
