package bench

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{3}, 3},
		{[]float64{5, 1}, 3},
		{[]float64{9, 1, 2}, 2},
		{[]float64{4, 1, 9, 2}, 3},
	} {
		before := slices.Clone(c.values)
		if got := median(c.values); got != c.want || !slices.Equal(c.values, before) {
			t.Errorf("median of %v is %v, want %v; left as %v", before, got, c.want, c.values)
		}
	}
}

func TestFigureIsOneLineOfJSON(t *testing.T) {
	start := 0.0
	for want, f := range map[string]Figure{
		// The ratio is that of the pairs (1, 2, 0.5), not of the medians (10/10).
		`{"name":"boot.ready","unit":"s","ours":20,"peer":10,"peer_name":"other","ratio":1,"runs":3}`: compare(
			"boot.ready", "s", "other", []Pair{{10, 10}, {20, 10}, {20, 40}}),
		`{"name":"boot.cloud.attach","unit":"s","ours":3}`:         {Name: "boot.cloud.attach", Unit: "s", Ours: 3},
		`{"name":"boot.step.x","unit":"s","start":0,"ours":0.123}`: {Name: "boot.step.x", Unit: "s", Start: &start, Ours: round(0.12345)},
	} {
		got, err := json.Marshal(f)
		if err != nil || string(got) != want {
			t.Errorf("got  %s, %v\nwant %s", got, err, want)
		}
	}
}

func TestStepsOfOurs(t *testing.T) {
	steps, err := ourSteps.read(`{"began":"2026-01-01T00:00:00Z","steps":[
		{"name":"bootstrap/user-data","began":"2026-01-01T00:00:10.5Z","ended":"2026-01-01T00:00:11Z"},
		{"name":"metrics","began":"2026-01-01T00:00:12Z"}]}`)
	if want := []step{{"bootstrap/user-data", 10.5, 0.5}}; err != nil || !slices.Equal(steps, want) {
		t.Errorf("got %v, %v; want %v", steps, err, want)
	}
	if _, err := ourSteps.read("tkenode: no agent"); err == nil {
		t.Error("no error for what is no ledger")
	}
}

func TestStepsOfUnits(t *testing.T) {
	steps, err := unitSteps.read("Id=containerd.service\nInactiveExitTimestampMonotonic=10000000\nActiveEnterTimestampMonotonic=12500000\n\n" +
		"InactiveExitTimestampMonotonic=13000000\nActiveEnterTimestampMonotonic=0\nId=kubelet.service\n")
	if want := []step{{"containerd.service", 10, 2.5}}; err != nil || !slices.Equal(steps, want) {
		t.Errorf("got %v, %v; want %v", steps, err, want)
	}
	if _, err := unitSteps.read("Id=kubelet.service\n"); err == nil || !strings.Contains(err.Error(), "kubelet.service") {
		t.Errorf("a unit without times: %v", err)
	}
}

func TestStepsFromPowerOn(t *testing.T) {
	got := fromPowerOn([]step{{"b", 20, 5}, {"a", 10, 1}, {"after", 27, 10}}, 2, 30)
	want := []step{{"boot loader", 0, 2}, {"a", 12, 1}, {"b", 22, 5}, {"after", 29, 10}, {"Node Ready", 27, 3}}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
}

func TestReadClock(t *testing.T) {
	now, up, rest, err := readClock("1700000000.250000000\n12.5\n{}\n")
	if now != 1700000000.25 || up != 12.5 || rest != "{}\n" || err != nil {
		t.Errorf("got %v, %v, %q, %v", now, up, rest, err)
	}
	if _, _, _, err := readClock("1700000000.25\n"); err == nil {
		t.Error("no error without the second line")
	}
}

// The peer would run a part of ours if a unit of our package were missing here.
func TestEveryUnitOfOursIsMasked(t *testing.T) {
	entries, err := os.ReadDir("../../packaging/systemd")
	if err != nil {
		t.Fatal(err)
	}
	var shipped []string
	for _, e := range entries {
		shipped = append(shipped, e.Name())
	}
	if !slices.Equal(shipped, units) {
		t.Errorf("the package ships %v, masked are %v", shipped, units)
	}
}

// image makes a disk with one partition, as node images have it.
func image(t *testing.T) string {
	t.Helper()
	raw, out := filepath.Join(t.TempDir(), "disk.raw"), filepath.Join(t.TempDir(), "disk.qcow2")
	head := make([]byte, 1<<20)
	head[0x1be+9] = 2048 >> 8
	if err := os.WriteFile(raw, head, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(raw, 17<<20); err != nil {
		t.Fatal(err)
	}
	tree := t.TempDir()
	if err := os.MkdirAll(filepath.Join(tree, "etc", "systemd"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{
		{"mke2fs", "-q", "-t", "ext4", "-d", tree, "-E", "offset=1048576", raw, "16M"},
		{"qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, out},
	} {
		if _, err := run(t.Context(), "", c[0], c[1:]...); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestEditImage(t *testing.T) {
	out := filepath.Join(t.TempDir(), "edited.qcow2")
	err := editImage(t.Context(), image(t), out, []file{
		{path: "/etc/systemd/a.service", mode: 0o644, data: []byte("[Unit]\n")},
		{path: "/var/lib/kubelet/pki/secret.pem", mode: 0o600, data: []byte("key")},
		{path: "/var/lib/kubelet/pki/current.pem", link: "secret.pem"},
	})
	if err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(t.TempDir(), "edited.raw")
	if _, err := run(t.Context(), "", "qemu-img", "convert", "-O", "raw", out, raw); err != nil {
		t.Fatal(err)
	}
	debugfs := func(request string) string {
		cmd := exec.Command("debugfs", "-R", request, raw+"?offset=1048576")
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin")
		text, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if got := debugfs("cat /etc/systemd/a.service"); got != "[Unit]\n" {
		t.Errorf("unit is %q", got)
	}
	for path, want := range map[string]string{
		"/etc/systemd/a.service":           "0644",
		"/var/lib/kubelet/pki/secret.pem":  "0600",
		"/var/lib/kubelet/pki/current.pem": `Fast link dest: "secret.pem"`,
	} {
		if got := debugfs("stat " + path); !strings.Contains(got, want) || !strings.Contains(got, "User:     0   Group:     0") {
			t.Errorf("%s is not %s of root:\n%s", path, want, got)
		}
	}
}

func TestEditImageRefusesAFileThatIsThere(t *testing.T) {
	f := file{path: "/etc/a", mode: 0o644, data: []byte("x")}
	err := editImage(t.Context(), image(t), filepath.Join(t.TempDir(), "out.qcow2"), []file{f, f})
	if err == nil || !strings.Contains(err.Error(), "already exists") {
		t.Errorf("got %v", err)
	}
}

func TestPartitionRefusesADiskWithout(t *testing.T) {
	raw := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(raw, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := partition(raw); err == nil {
		t.Error("no error")
	}
}
