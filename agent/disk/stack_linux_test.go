package disk

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// tree makes files and links like those of the kernel's in sysfs, below its block
// directory. A name that ends in /. is that of a directory.
func tree(t *testing.T, files, links map[string]string) (sys string) {
	t.Helper()
	sys = t.TempDir()
	for name, text := range files {
		path, isDir := strings.CutSuffix(name, "/.")
		path = filepath.Join(sys, "block", path)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if isDir {
			err = errors.Join(err, os.MkdirAll(path, 0o755))
		} else {
			err = errors.Join(err, os.WriteFile(path, []byte(text+"\n"), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range links {
		path := filepath.Join(sys, "block", from)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(filepath.Join(sys, "block", to), path)); err != nil {
			t.Fatal(err)
		}
	}
	return sys
}

// TestReadLayers reads a tree like the kernel's: an array of which one disk is gone, a
// mapping of it, a mapping whose disk is gone, and a plain disk.
func TestReadLayers(t *testing.T) {
	sys := tree(t, map[string]string{
		"vdb/dev": "253:16", "vdd/dev": "253:48",
		"md128/dev": "9:128", "md128/size": "6285312", "md128/ro": "0", "md128/diskseq": "21", "md128/holders/dm-0": "",
		"md128/md/array_state": "broken", "md128/md/level": "raid0", "md128/md/raid_disks": "3", "md128/md/chunk_size": "524288",
		"md128/md/dev-vdb/slot": "0", "md128/md/dev-vdc/slot": "1", "md128/md/dev-vdd/slot": "2",
		"dm-0/dev": "252:0", "dm-0/size": "6252544", "dm-0/ro": "0", "dm-0/holders/.": "",
		"dm-0/dm/name": "tke-stripe00", "dm-0/dm/uuid": "CRYPT-LUKS2-068b17ba006b80748201ceaac9d23673-tke-stripe00",
		"dm-1/dev": "252:1", "dm-1/size": "8", "dm-1/ro": "1", "dm-1/holders/.": "",
		"dm-1/dm/name": "tke-secret00", "dm-1/dm/uuid": "LVM-whatever",
	}, map[string]string{
		"md128/md/dev-vdb/block": "vdb", "md128/md/dev-vdc/block": "vdc", "md128/md/dev-vdd/block": "vdd",
		"dm-0/slaves/md128": "md128", "dm-1/slaves/vde": "vde",
	})
	got, err := readLayers(sys)
	if err != nil {
		t.Fatal(err)
	}
	want := []layer{
		{device: device{Name: "dm-0", Dev: "252:0", SizeBytes: 6252544 << 9}, Kind: crypt, Beneath: []string{"md128"}, Mapping: "tke-stripe00", UUID: "068b17ba-006b-8074-8201-ceaac9d23673"},
		{device: device{Name: "dm-1", Dev: "252:1", SizeBytes: 8 << 9, ReadOnly: true}, Kind: crypt, Beneath: []string{""}, Mapping: "tke-secret00"},
		{
			device: device{Name: "md128", Dev: "9:128", SizeBytes: 6285312 << 9, Seq: "21", Holders: []string{"dm-0"}},
			Kind:   array, Beneath: []string{"vdb", "", "vdd"}, Level: "raid0", State: "broken", ChunkBytes: 524288,
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// TestDetachedKnowsStripes: no disk of a stripe that is listed is given back, and each
// of one that is not.
func TestDetachedKnowsStripes(t *testing.T) {
	o := Options{Ledger: t.TempDir(), Log: slog.New(slog.DiscardHandler)}
	o.Sealed.Facts.InstanceID = "ins-11111111"
	for _, id := range []string{"disk-first000", "disk-second00"} {
		note := attached{DiskID: id, InstanceID: "ins-11111111", MountPoint: "/data"}
		if err := ledger(o.Ledger).store(id+attachedSuffix, note); err != nil {
			t.Fatal(err)
		}
	}
	if got := Detached(o); len(got) != 2 {
		t.Errorf("%d are given back of a stripe that is not listed", len(got))
	}
	o.Sealed.Config.Disks = []node.DiskConfig{{DiskIDs: []string{"disk-first000", "disk-second00"}, MountPoint: "/data"}}
	if got := Detached(o); len(got) != 0 {
		t.Errorf("%s is given back", got[0].Name())
	}
}

// TestLooksAtTheBottom: who trims, probes, or finds a mount without a note asks the disks
// under an array who they are.
func TestLooksAtTheBottom(t *testing.T) {
	ids := []string{"disk-first000", "disk-second00"}
	d := New(Options{Want: node.DiskConfig{DiskIDs: ids, MountPoint: "/data"}})
	d.sys = tree(t, map[string]string{
		"vdb/dev": "253:16", "vdb/size": "100", "vdb/ro": "0", "vdb/serial": ids[0], "vdb/holders/md128": "",
		"vdc/dev": "253:32", "vdc/size": "100", "vdc/ro": "0", "vdc/serial": ids[1], "vdc/holders/md128": "",
		"md128/dev": "9:128", "md128/size": "180", "md128/ro": "0", "md128/holders/.": "",
		"md128/md/array_state": "clean", "md128/md/level": "raid0", "md128/md/raid_disks": "2", "md128/md/chunk_size": "524288",
		"md128/md/dev-vdb/slot": "0", "md128/md/dev-vdc/slot": "1",
	}, map[string]string{"md128/md/dev-vdb/block": "vdb", "md128/md/dev-vdc/block": "vdc"})
	s := State{DiskID: ids[0], Device: "/dev/md128", Members: []Member{{DiskID: ids[0], Device: "/dev/vdb"}, {DiskID: ids[1], Device: "/dev/vdc"}}}
	e := errand{Sys: d.sys, Name: "md128", Disks: []string{"vdb", "vdc"}}
	note := func() []serving {
		return d.beneath("md128", entry{DiskID: ids[0], Array: &madeArray{Members: ids}})
	}
	if dev, err := d.top(s); err != nil || dev.Name != "md128" || dev.ids() != "disk-first000+disk-second00" {
		t.Errorf("the top is %s, %v", dev, err)
	}
	if got, err := e.serial(); err != nil || got != "disk-first000+disk-second00" {
		t.Errorf("told %q, %v", got, err)
	}
	if got := note(); !reflect.DeepEqual(got, []serving{{DiskID: ids[0], Dev: "253:16"}, {DiskID: ids[1], Dev: "253:32"}}) {
		t.Errorf("note %+v", got)
	}

	serial := filepath.Join(d.sys, "block", "vdc", "serial")
	for _, text := range []string{"disk-other000", ""} {
		if err := os.WriteFile(serial, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if dev, err := d.top(s); !errors.Is(err, errChanged) {
			t.Errorf("the top with %q under it is %s, %v", text, dev, err)
		}
		if got, err := e.serial(); err != nil || (got != "") != (text != "") {
			t.Errorf("told %q, %v", got, err)
		}
	}
	if err := os.RemoveAll(filepath.Dir(serial)); err != nil {
		t.Fatal(err)
	}
	if got := note(); !reflect.DeepEqual(got, []serving{{DiskID: ids[0], Dev: "253:16"}, {DiskID: ids[1]}}) {
		t.Errorf("note of an array that has lost a disk: %+v", got)
	}
}
