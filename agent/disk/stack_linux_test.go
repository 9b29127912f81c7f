package disk

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// TestReadLayers reads a tree like the kernel's: an array of which one disk is gone, a
// mapping of it, a mapping whose disk is gone, and a plain disk.
func TestReadLayers(t *testing.T) {
	sys := t.TempDir()
	for name, text := range map[string]string{
		"vdb/dev": "253:16", "vdd/dev": "253:48",
		"md128/dev": "9:128", "md128/size": "6285312", "md128/ro": "0", "md128/diskseq": "21", "md128/holders/dm-0": "",
		"md128/md/array_state": "broken", "md128/md/level": "raid0", "md128/md/raid_disks": "3", "md128/md/chunk_size": "524288",
		"md128/md/dev-vdb/slot": "0", "md128/md/dev-vdc/slot": "1", "md128/md/dev-vdd/slot": "2",
		"dm-0/dev": "252:0", "dm-0/size": "6252544", "dm-0/ro": "0", "dm-0/holders/.": "",
		"dm-0/dm/name": "tke-stripe00", "dm-0/dm/uuid": "CRYPT-LUKS2-068b17ba006b80748201ceaac9d23673-tke-stripe00",
		"dm-1/dev": "252:1", "dm-1/size": "8", "dm-1/ro": "1", "dm-1/holders/.": "",
		"dm-1/dm/name": "tke-secret00", "dm-1/dm/uuid": "LVM-whatever",
	} {
		path := filepath.Join(sys, "block", name)
		if filepath.Base(name) == "." {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for from, to := range map[string]string{
		"md128/md/dev-vdb/block": "vdb", "md128/md/dev-vdc/block": "vdc", "md128/md/dev-vdd/block": "vdd",
		"dm-0/slaves/md128": "md128", "dm-1/slaves/vde": "vde",
	} {
		path := filepath.Join(sys, "block", from)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(filepath.Join(sys, "block", to), path)); err != nil {
			t.Fatal(err)
		}
	}
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
