package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

func TestExt4Size(t *testing.T) {
	super := func(blocks, blocksHigh, logSize, features uint32, magic uint16) []byte {
		b := make([]byte, 1024)
		binary.LittleEndian.PutUint32(b[0x4:], blocks)
		binary.LittleEndian.PutUint32(b[0x150:], blocksHigh)
		binary.LittleEndian.PutUint32(b[0x18:], logSize)
		binary.LittleEndian.PutUint32(b[0x60:], features)
		binary.LittleEndian.PutUint16(b[0x38:], magic)
		return b
	}
	for name, c := range map[string]struct {
		super []byte
		want  int64 // 0: it is none
	}{
		"20 GiB":                  {super(5<<20, 0, 2, 0x80, 0xef53), 20 << 30},
		"blocks of 1 KiB":         {super(20<<20, 0, 0, 0x80, 0xef53), 20 << 30},
		"32 TiB":                  {super(0, 2, 2, 0x80, 0xef53), 32 << 40},
		"not of 64 bits":          {super(5<<20, 7, 2, 0, 0xef53), 20 << 30},
		"xfs":                     {append([]byte("XFSB"), make([]byte, 1020)...), 0},
		"blocks of no size known": {super(5<<20, 0, 77, 0x80, 0xef53), 0},
		"no blocks":               {super(0, 0, 2, 0x80, 0xef53), 0},
	} {
		got, ok := ext4Size(c.super)
		if ok != (c.want > 0) || ok && got != c.want {
			t.Errorf("%s: %d, %v", name, got, ok)
		}
	}
}

// TestRefusal: what another try can help is tried again, what only a human can end
// is told, with what to do.
func TestRefusal(t *testing.T) {
	g := &growing{dev: device{Name: "vdb", Serial: "disk-abc12345", SizeBytes: 40 << 30}, m: mount{FSType: "ext4", Target: "/data"}, from: 20 << 30}
	failed := exec.CommandContext(t.Context(), "false").Run()
	ctx, cancel := context.WithCancel(t.Context())
	sleep := exec.CommandContext(ctx, "sleep", "600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	cancel()
	killed := sleep.Wait()
	for _, c := range []struct {
		out   string
		err   error
		class node.Class
		want  string
	}{
		{"resize2fs: Permission denied to resize filesystem\n", failed, node.ClassTerminal, "run e2fsck -f /dev/vdb, and reboot"},
		{"Filesystem at /dev/vdb is mounted on /data; on-line resizing required\nresize2fs: On-line resizing not supported", failed, node.ClassTerminal, "run e2fsck -f /dev/vdb and resize2fs /dev/vdb, and reboot"},
		{"resize2fs: Please run 'e2fsck -f /dev/vdb' first.", failed, node.ClassTerminal, "drain the node"},
		{"resize2fs: Device or resource busy While checking for on-line resizing support", failed, node.ClassTransient, "busy"},
		{"xfs_growfs: growfs operation in progress already", failed, node.ClassTransient, "in progress"},
		{"xfs_growfs: XFS_IOC_FSGROWFSDATA xfsctl failed: Resource temporarily unavailable", failed, node.ClassTransient, "unavailable"},
		{"", killed, node.ClassTransient, "signal: killed"},
		{"", errors.Join(exec.ErrNotFound), node.ClassTerminal, "install e2fsprogs"},
		{strings.Repeat("x", 1000), failed, node.ClassTerminal, "exit status 1"},
	} {
		err := refusal(g, "resize2fs", c.out, c.err)
		if node.ClassOf(err) != c.class || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 900 {
			t.Errorf("%q, %v: %v %v", c.out, c.err, node.ClassOf(err), err)
		}
	}
}

// TestSpare: a stripe does not grow, and says of which of its disks something is unused.
func TestSpare(t *testing.T) {
	disk := func(id string, gib int64) device { return device{Name: "vd" + id, Serial: id, SizeBytes: gib << 30} }
	stripe := func(disks ...device) device {
		return device{Name: "md128", Serial: disks[0].Serial, SizeBytes: int64(len(disks)) * (20<<30 - dataAt), under: disks}
	}
	over := func(dev device) device {
		return device{Name: "dm-0", Serial: dev.Serial, SizeBytes: dev.SizeBytes - headerBytes, under: []device{dev}}
	}
	for name, c := range map[string]struct {
		dev    device
		unused string // of what; empty: nothing
		room   int64
	}{
		"a disk":                        {disk("b", 40), "", 40 << 30},
		"an encrypted disk":             {over(disk("b", 20)), "", 20<<30 - headerBytes},
		"a stripe":                      {stripe(disk("b", 20), disk("c", 20)), "", 40<<30 - 2*dataAt},
		"one disk is larger":            {stripe(disk("b", 20), disk("c", 30)), "c (/dev/vdc, 30 GiB)", 40<<30 - 2*dataAt},
		"all are larger, and encrypted": {over(stripe(disk("b", 40), disk("c", 40))), "b (/dev/vdb, 40 GiB), c (/dev/vdc, 40 GiB)", 40<<30 - 2*dataAt - headerBytes},
	} {
		w := spare(c.dev, "/data")
		if (w != nil) != (c.unused != "") || w != nil && !strings.Contains(w.Message, "the rest of "+c.unused+" unused: a stripe does not grow") {
			t.Errorf("%s: %+v", name, w)
		}
		if got := c.dev.room(); got != c.room {
			t.Errorf("%s: room for %d, want %d", name, got, c.room)
		}
	}
	grown := over(disk("b", 20))
	grown.under[0].SizeBytes = 30 << 30
	if got := grown.room(); got != 30<<30-headerBytes {
		t.Errorf("of an encrypted disk that has grown: room for %d", got)
	}
}
