//go:build node

package lab

import (
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/lab/cvm"
)

var (
	campaignFile   = flag.String("campaign", "", "file to which the result of the campaign is added")
	campaignSeed   = flag.Uint64("seed", 1, "of the campaign")
	campaignCommit = flag.String("commit", "", "what is tested")
)

const (
	campaignDisks = 19 // and one for containerd, number 0
	plugged       = 4  // of them are plugged while the node runs
	killedOne     = 5  // is plugged while the agent is killed
	cloned        = 6  // was made from a snapshot of another
	foreign       = 7  // holds data that nobody knows
	misnamed      = 8  // tells another serial
	twin          = 9  // is there twice
)

// TestCampaignDisks is what the campaign of disks needs a virtual machine for: serials
// of virtio, uevents, udev, unplugging, and an agent under systemd, through three
// boots of one CVM. make campaign-disk runs it.
func TestCampaignDisks(t *testing.T) {
	l := startLab(t)
	m := &diskCampaign{Lab: l, t: t, Rand: rand.New(rand.NewPCG(*campaignSeed, 0)), figures: map[string]float64{}, was: map[string][32]byte{}}
	began := time.Now()
	m.launch()
	m.plugSome()
	m.pull()
	m.killed()
	m.reordered()
	m.rebaked()
	m.figures["seconds"] = time.Since(began).Round(time.Second).Seconds()
	line, err := json.Marshal(map[string]any{
		"part": "virtual machine", "seed": *campaignSeed, "commit": *campaignCommit, "date": time.Now().UTC().Format(time.DateOnly), "figures": m.figures,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s", line)
	if *campaignFile == "" || t.Failed() {
		return
	}
	f, err := os.OpenFile(*campaignFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err == nil {
		_, err = f.Write(append(line, '\n'))
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// diskCampaign is a node with many disks.
type diskCampaign struct {
	*Lab
	*rand.Rand
	t       *testing.T
	c       *CVM
	figures map[string]float64
	extra   []cvm.Disk          // that nobody wants
	was     map[string][32]byte // files that must not change
	marked  []int               // disks with a file that says which one it is
}

func diskName(i int) string  { return fmt.Sprintf("disk-camp%04d", i) }
func diskMount(i int) string { return fmt.Sprintf("/data/%d", i) }

func (m *diskCampaign) launch() {
	v, err := m.NodeConfigValues(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	token, err := m.Cluster.NewBootstrapToken(m.t.Context(), 2*time.Hour) // the node is made once more at the end
	if err != nil {
		m.t.Fatal(err)
	}
	v.Token = token.Reveal()
	// None comes with the instance: the NodeConfig has to name them all.
	const first = "  - fileSystem: ext4\n    mountPoint: /var/lib/containerd\n"
	var more strings.Builder
	fmt.Fprintf(&more, "  - diskID: %s\n    fileSystem: ext4\n    mountPoint: /var/lib/containerd\n", diskName(0))
	for i := range campaignDisks {
		fs := "ext4"
		if i%4 == 3 {
			fs = "xfs"
		}
		fmt.Fprintf(&more, "  - diskID: %s\n    fileSystem: %s\n    mountPoint: %s\n", diskName(i+1), fs, diskMount(i+1))
	}
	userData := replace(first, more.String())(m.t, m.Lab, v)
	m.c, err = m.Launch(m.t.Context(), LaunchSpec{UserData: userData})
	if err != nil {
		m.t.Fatal(err)
	}
	m.await(map[string]string{"disk/" + diskName(0): "Absent", "disk/" + diskName(1): "Absent"})
}

// disk returns a disk of the lab; the file behind it is made if it is not there.
func (m *diskCampaign) disk(id string) cvm.Disk {
	path := m.host.diskPath(id)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		size := int64(320 << 20)
		if id == diskName(0) { // containerd's
			size = 2 << 30
		}
		err = f.Truncate(size)
		f.Close()
	}
	if err != nil {
		m.t.Fatal(err)
	}
	return cvm.Disk{ID: id, Path: path}
}

// await waits until the agent says of each instance how it stands.
func (m *diskCampaign) await(want map[string]string) map[string]disk.State {
	m.t.Helper()
	ctx := within(m.t, 12*time.Minute)
	for {
		out, err := m.SSH(ctx, m.c.IP, "tkenode disks -o json || true")
		var all []disk.State
		if err == nil {
			err = json.Unmarshal([]byte(out), &all)
		}
		states, left := map[string]disk.State{}, []string{}
		for _, s := range all {
			states[s.Name] = s
		}
		for name, state := range want {
			if !strings.Contains(state, states[name].State) || states[name].State == "" {
				left = append(left, fmt.Sprintf("%s is %s, want %s: %s", name, states[name].State, state, states[name].Message))
			}
		}
		if err == nil && len(left) == 0 {
			return states
		}
		if ctx.Err() != nil {
			m.t.Fatalf("%v\n%s\nconsole:\n%s", err, strings.Join(left, "\n"), Tail(m.c.Console(), 30))
		}
		time.Sleep(2 * time.Second)
	}
}

func (m *diskCampaign) machine() *machine {
	r, err := m.host.machine(m.c.ID)
	if err != nil {
		m.t.Fatal(err)
	}
	return r
}

// mark writes onto disks which ones they are.
func (m *diskCampaign) mark(disks ...int) {
	m.t.Helper()
	var script strings.Builder
	for _, i := range disks {
		fmt.Fprintf(&script, "echo %s > %s/who && ", diskName(i), diskMount(i))
	}
	m.mustRun(m.t, m.c, script.String()+"sync")
	m.marked = append(m.marked, disks...)
}

// check finds every mark where it belongs.
func (m *diskCampaign) check(when string) {
	m.t.Helper()
	for _, i := range m.marked {
		out := m.mustRun(m.t, m.c, fmt.Sprintf("cat %s/who; cat /sys/block/$(basename $(findmnt -no SOURCE %s))/serial", diskMount(i), diskMount(i)))
		if out != diskName(i)+"\n"+diskName(i) {
			m.t.Errorf("%s: on %s is %q", when, diskMount(i), out)
		}
	}
}

// names returns where each marked disk is.
func (m *diskCampaign) names(states map[string]disk.State) map[int]string {
	at := map[int]string{}
	for _, i := range m.marked {
		at[i] = states["disk/"+diskName(i)].Device
	}
	return at
}

func (m *diskCampaign) plugSome() {
	want := map[string]string{}
	for i := range plugged + 1 {
		if err := m.machine().PlugDisk(within(m.t, time.Minute), m.disk(diskName(i))); err != nil {
			m.t.Fatal(err)
		}
		want["disk/"+diskName(i)] = disk.Mounted
	}
	m.await(want)
	m.mark(1, 2, 3, 4)
	m.check("plugged")
}

// pull takes a mounted disk away, and brings it back. While the dead mount is there the
// disk is not mounted over it; after a reboot it is.
func (m *diskCampaign) pull() {
	if err := m.machine().PullDisk(within(m.t, 2*time.Minute), diskName(1)); err != nil {
		m.t.Fatal(err)
	}
	st := m.await(map[string]string{"disk/" + diskName(1): "Absent"})
	m.t.Logf("pulled: %+v", st["disk/"+diskName(1)].Message)
	if err := m.machine().PlugDisk(within(m.t, time.Minute), m.disk(diskName(1))); err != nil {
		m.t.Fatal(err)
	}
	st = m.await(map[string]string{"disk/" + diskName(1): "MountPointBusy, " + disk.Mounted})
	m.t.Logf("plugged again: %s %s", st["disk/"+diskName(1)].State, st["disk/"+diskName(1)].Message)
}

// killed kills the agent again and again while it formats a disk.
func (m *diskCampaign) killed() {
	if err := m.machine().PlugDisk(within(m.t, time.Minute), m.disk(diskName(killedOne))); err != nil {
		m.t.Fatal(err)
	}
	for range 8 {
		m.mustRun(m.t, m.c, fmt.Sprintf("sleep 0.%d; systemctl kill -s KILL tkenode-agent; systemctl reset-failed tkenode-agent", m.IntN(10)))
		m.figures["killed"]++
	}
	st := m.await(map[string]string{"disk/" + diskName(killedOne): "FormatInterrupted, " + disk.Mounted})["disk/"+diskName(killedOne)]
	m.t.Logf("killed: %s %s", st.State, st.Message)
	if st.State != disk.Mounted {
		m.mustRun(m.t, m.c, fmt.Sprintf("tkenode disk format %s --i-have-checked %s", diskName(killedOne), diskName(killedOne)))
		m.await(map[string]string{"disk/" + diskName(killedOne): disk.Mounted})
		m.figures["interrupted"]++
	}
	m.mark(killedOne)
}

// off turns the machine off.
func (m *diskCampaign) off() cvm.Spec {
	m.t.Helper()
	run := m.machine()
	if err := run.Stop(within(m.t, 5*time.Minute)); err != nil {
		m.t.Fatal(err)
	}
	run.follow()
	<-run.done
	for path, sum := range m.was {
		if m.sum(path) != sum {
			m.t.Errorf("%s has been written to", filepath.Base(path))
		}
	}
	return run.spec
}

// on turns the machine on with every disk, in another order.
func (m *diskCampaign) on(spec cvm.Spec) {
	m.t.Helper()
	var all []cvm.Disk
	for i := range campaignDisks + 1 {
		d := m.disk(diskName(i))
		if i == misnamed {
			other := "disk-other0008"
			d.Serial = &other
		}
		all = append(all, d)
	}
	all = append(all, m.extra...)
	m.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	next := spec
	next.Disks = all
	vm, err := cvm.Start(within(m.t, time.Minute), next)
	if err != nil {
		m.t.Fatal(err)
	}
	m.host.keep(vm, spec, m.c.Timeline)
	m.figures["boots"]++
}

func (m *diskCampaign) sum(path string) [32]byte {
	f, err := os.Open(path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		m.t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

// protect notes what the files of disks hold.
func (m *diskCampaign) protect(disks ...cvm.Disk) {
	for _, d := range disks {
		m.was[d.Path] = m.sum(d.Path)
	}
}

func (m *diskCampaign) copy(from, to string) {
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		m.t.Fatalf("cp: %v: %s", err, out)
	}
}

// reordered boots with 20 disks and some more, of which some are not what they seem.
func (m *diskCampaign) reordered() {
	before := m.names(m.await(nil))
	spec := m.off()
	m.copy(m.host.diskPath(diskName(2)), m.host.diskPath(diskName(cloned)))
	if err := os.WriteFile(m.disk(diskName(foreign)).Path, []byte("years of work"), 0o600); err != nil {
		m.t.Fatal(err)
	}
	empty, same := "", diskName(twin)
	mute, second := m.disk("disk-mute0000"), m.disk("disk-twin0000")
	mute.Serial, second.Serial = &empty, &same
	m.extra = []cvm.Disk{mute, second}
	m.protect(m.disk(diskName(cloned)), m.disk(diskName(foreign)), m.disk(diskName(misnamed)), m.disk(diskName(twin)), mute, second)
	m.on(spec)
	states := m.await(m.expected())
	for i, name := range m.names(states) {
		if name != before[i] {
			m.figures["disks with another name"]++
		}
	}
	m.check("reordered")
	var more []int
	for i := twin + 1; i <= campaignDisks; i++ {
		more = append(more, i)
	}
	m.mark(more...)
}

// expected is how each disk has to stand after a boot.
func (m *diskCampaign) expected() map[string]string {
	want := map[string]string{}
	for i := range campaignDisks + 1 {
		want["disk/"+diskName(i)] = disk.Mounted
	}
	want["disk/"+diskName(cloned)], want["disk/"+diskName(foreign)] = "Foreign", "Foreign"
	want["disk/"+diskName(misnamed)], want["disk/"+diskName(twin)] = "Absent", "Ambiguous"
	return want
}

// rebaked replaces the system disk and keeps the others, one of which is rolled back
// to what it held before: what tkenode made is adopted, and nothing is formatted.
func (m *diskCampaign) rebaked() {
	spec := m.off()
	if err := os.Remove(filepath.Join(spec.Dir, "root.qcow2")); err != nil {
		m.t.Fatal(err)
	}
	old := m.host.diskPath(diskName(cloned)) // a copy of disk 2 as it was at the first boot
	m.copy(old, m.host.diskPath(diskName(2)))
	m.on(spec)
	for name, s := range m.await(m.expected()) {
		if s.Proof != "" {
			m.t.Errorf("%s has been formatted: %s", name, s.Proof)
		}
		m.figures["then "+s.State]++
	}
	m.check("rebaked")
	m.off()
}
