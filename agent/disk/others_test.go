package disk

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"slices"
	"strings"
	"testing"
)

func csiMount(volume, dev string) mount {
	return mount{Dev: dev, Target: fmt.Sprintf("%s%s/%x%s", volumesDir, CSIDriver, sha256.Sum256([]byte(volume)), globalMount), FSType: "ext4"}
}

func TestOthers(t *testing.T) {
	have := observed{
		Devices: []device{
			{Name: "vda", Dev: "253:0", Serial: "disk-root0001", Partitions: []part{{"vda1", "253:1"}}},
			{Name: "vdb", Dev: "253:16", Serial: "disk-ours0001"},
			{Name: "vdc", Dev: "253:32", Serial: "disk-right001", SizeBytes: 10 << 30},
			{Name: "vdd", Dev: "253:48", Serial: "disk-wrong001"},
			{Name: "vde", Dev: "253:64", Serial: "disk-byhand01"},
			{Name: "vdf", Dev: "253:80", Serial: "disk-idle0001"},
			{Name: "vdg", Dev: "253:96", Serial: ""},
			{Name: "vdh", Dev: "253:112", Serial: "disk-named001"},
			{Name: "vdi", Dev: "253:128", Serial: "disk-untold01"},
			{Name: "nvme0n1", Dev: "259:0", Serial: "SN12345"},
		},
		Mounts: []mount{
			{Dev: "253:1", Target: "/"},
			{Dev: "253:16", Target: "/data"},
			csiMount("disk-right001", "253:32"),
			{Dev: "253:32", Target: kubeletDir + "/pods/1/volumes/kubernetes.io~csi/pvc-1/mount"},
			{Dev: "253:32", Target: kubeletDir + "/pods/2/volumes/kubernetes.io~csi/pvc-1/mount"},
			csiMount("disk-gone0001", "253:48"),
			{Dev: "253:64", Target: "/mnt"},
			csiMount("disk-named001", "253:112"), // nothing beside it says so, but its name
			csiMount("disk-gone0002", "253:128"), // nothing says what it is
		},
	}
	data := map[string]string{have.Mounts[2].Target: "disk-right001", have.Mounts[5].Target: "disk-gone0001"}
	got := map[string]Other{}
	for _, o := range others([]string{"disk-ours0001"}, have, data) {
		got[o.DiskID] = o
	}
	for id, want := range map[string]string{
		"disk-right001": "csi true, 2 pods, volume disk-right001, mismatch false",
		"disk-wrong001": "csi true, 0 pods, volume disk-gone0001, mismatch true",
		"disk-byhand01": "csi false, 0 pods, volume , mismatch false",
		"disk-idle0001": "csi false, 0 pods, volume , mismatch false",
		"disk-named001": "csi true, 0 pods, volume disk-named001, mismatch false",
		"disk-untold01": "csi true, 0 pods, volume , mismatch false",
	} {
		o, ok := got[id]
		if text := fmt.Sprintf("csi %v, %d pods, volume %s, mismatch %v", o.CSI, o.Pods, o.Volume, o.Mismatch != ""); !ok || text != want {
			t.Errorf("%s: %s, want %s", id, text, want)
		}
	}
	if len(got) != 6 {
		t.Errorf("%d others: %v", len(got), got)
	}
	if text := got["disk-wrong001"].Mismatch; !strings.Contains(text, "is the volume disk-gone0001 and has /dev/vdd mounted, whose live serial is disk-wrong001") {
		t.Error(text)
	}

	// Our own disk where a volume should be is told of as well.
	have.Mounts = append(have.Mounts, csiMount("disk-idle0001", "253:16"))
	data[have.Mounts[len(have.Mounts)-1].Target] = "disk-idle0001"
	all := others([]string{"disk-ours0001"}, have, data)
	if i := slices.IndexFunc(all, func(o Other) bool { return o.DiskID == "disk-ours0001" }); i < 0 || all[i].Mismatch == "" {
		t.Errorf("ours as another's volume: %+v", all)
	}

	o := NewOthers(func() []State { return nil }, slog.New(slog.DiscardHandler))
	_, changed, known := o.All()
	o.set(all)
	select {
	case <-changed:
	default:
		t.Error("a change is not told")
	}
	since := o.Warnings()[0].Since
	o.set(others([]string{"disk-ours0001"}, have, data))
	if c := o.Warnings(); since.IsZero() || !c[0].Since.Equal(since) || known || len(c) != 1 || strings.Count(c[0].Message, "live serial") != 2 {
		t.Errorf("known at first: %v; warnings %+v", known, c)
	}
}

func TestNotCSI(t *testing.T) {
	ours := []State{{DiskID: "disk-ours0001", Members: []Member{{DiskID: "disk-ours0001"}, {DiskID: "disk-ours0002"}}}, {DiskID: "disk-ours0003"}, {Name: "disk/data"}}
	all := []Other{{DiskID: "disk-csi00001", CSI: true}, {DiskID: "disk-csi00002"}, {DiskID: "disk-byhand01", Mount: "/mnt"}}
	if got := NotCSI(ours, all, []string{"disk-csi00002"}); !slices.Equal(got, []string{"disk-byhand01", "disk-ours0001", "disk-ours0002", "disk-ours0003", "disk/data"}) {
		t.Errorf("%v", got)
	}
}

func FuzzVolumeData(f *testing.F) {
	f.Add([]byte(`{"driverName":"com.tencent.cloud.csi.cbs","volumeHandle":"disk-abc12345","nodeName":"10.0.0.5"}`))
	f.Add([]byte(`{"driverName":"other","volumeHandle":"disk-abc12345"}`))
	f.Add([]byte(`{"volumeHandle":7`))
	f.Fuzz(func(t *testing.T, text []byte) {
		if v := parseVolume(text); v != "" && (!diskID.MatchString(v) || !json.Valid(text)) {
			t.Errorf("%q of %q", v, text)
		}
	})
}

// TestOthersOnlyReads: nothing in the files about other disks can write to one, or
// run a program.
func TestOthersOnlyReads(t *testing.T) {
	allowed := map[string][]string{
		"os":   {"Open", "Pipe"},
		"unix": {"Poll", "PollFd", "POLLIN", "EINTR"},
		"exec": {}, "syscall": {},
	}
	for _, name := range []string{"others.go", "others_linux.go"} {
		tree, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok {
				if pkg, ok := sel.X.(*ast.Ident); ok && allowed[pkg.Name] != nil && !slices.Contains(allowed[pkg.Name], sel.Sel.Name) {
					t.Errorf("%s calls %s.%s", name, pkg.Name, sel.Sel.Name)
				}
			}
			return true
		})
	}
}
