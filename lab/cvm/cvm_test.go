package cvm

import (
	"net"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

func testMachine() *Machine {
	return &Machine{
		spec:   Spec{Name: "ins-test0001", UUID: "6f0e2f3c-0000-4000-8000-000000000001", Dir: "/lab/a,b", CPUs: 2, MemoryMiB: 2048},
		accel:  TCG,
		slots:  map[string]int{},
		unplug: map[string]chan struct{}{},
	}
}

var (
	testNIC  = NIC{ID: "eni-test0001", MAC: net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}, Socket: "/lab/port,1"}
	testDisk = Disk{ID: "disk-test0001", Path: "/lab/disk"}
)

func TestArguments(t *testing.T) {
	m := testMachine()
	m.spec.NICs, m.spec.Disks = []NIC{testNIC}, []Disk{testDisk}
	args, err := m.arguments()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range [][2]string{
		{"-accel", "tcg,thread=multi"},
		{"-smbios", "type=1,manufacturer=Tencent Cloud,product=CVM,serial=6f0e2f3c-0000-4000-8000-000000000001"},
		{"-blockdev", "driver=qcow2,node-name=root,discard=unmap,file.driver=file,file.filename=/lab/a,,b/root.qcow2"},
		{"-netdev", "stream,addr.path=/lab/port,,1,addr.type=unix,id=net-eni-test0001,server=off"},
		{"-device", "virtio-net-pci,bus=port0,id=eni-test0001,mac=52:54:00:01:02:03,netdev=net-eni-test0001,romfile="},
		{"-blockdev", "raw,discard=unmap,file.driver=file,file.filename=/lab/disk,node-name=blk-disk-test0001"},
		{"-device", "virtio-blk-pci,bus=port1,drive=blk-disk-test0001,id=disk-test0001,serial=disk-test0001"},
		{"-device", "pcie-root-port,id=port11,bus=pcie.0,chassis=12,addr=0x3.3,multifunction=on"},
	} {
		if i := slices.Index(args, want[1]); i < 1 || args[i-1] != want[0] {
			t.Errorf("no %s %s in\n%s", want[0], want[1], strings.Join(args, "\n"))
		}
	}
}

func TestTypedArguments(t *testing.T) {
	want := map[string]any{
		"type": "stream", "id": "net-eni-test0001", "server": false,
		"addr": map[string]any{"type": "unix", "path": "/lab/port,1"},
	}
	if got := typed(testNIC.backend()); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestSlots(t *testing.T) {
	m := testMachine()
	for i := range rootPorts {
		if slot, err := m.takeSlot(rootPort(i)); err != nil || slot != i {
			t.Fatalf("slot %d, %v", slot, err)
		}
	}
	if _, err := m.takeSlot("one more"); err == nil || err.Error() != "all 12 slots are taken" {
		t.Errorf("err = %v", err)
	}
	m.freeSlot(rootPort(7))
	if _, err := m.takeSlot(rootPort(3)); err == nil {
		t.Error("a device was plugged twice")
	}
	if slot, err := m.takeSlot("again"); err != nil || slot != 7 {
		t.Errorf("slot %d, %v", slot, err)
	}
}

func TestReleaseIsSeenOnce(t *testing.T) {
	m := testMachine()
	if _, err := m.expectRelease("disk-none"); err == nil {
		t.Error("a device that is not there was waited for")
	}
	if _, err := m.takeSlot(testDisk.ID); err != nil {
		t.Fatal(err)
	}
	released, err := m.expectRelease(testDisk.ID)
	if err != nil {
		t.Fatal(err)
	}
	m.event("DEVICE_DELETED", []byte(`{"path": "/machine/peripheral/other", "device": "other"}`))
	m.event("DEVICE_DELETED", []byte(`{"path": "/machine/peripheral/disk-test0001/virtio-backend"}`))
	select {
	case <-released:
		t.Fatal("another device's end was taken for this one's")
	default:
	}
	m.event("DEVICE_DELETED", []byte(`{"path": "/machine/peripheral/disk-test0001", "device": "disk-test0001"}`))
	<-released
}

func TestHasVirtualization(t *testing.T) {
	for cpuinfo, want := range map[string]bool{
		"flags\t\t: fpu vme svm npt\n":                  true,
		"processor\t: 0\nflags\t\t: fpu vmx\n":          true,
		"flags\t\t: fpu vme\nvmx flags\t: vnmi\n":       false,
		"model name\t: svm of the gods\nflags\t: fpu\n": false,
		"flags\t\t: fpu hypervisor svm_lock notvmx2\n":  false,
	} {
		if got := hasVirtualization(cpuinfo); got != want {
			t.Errorf("%q: %v", cpuinfo, got)
		}
	}
}

func TestAwaitTextAcrossWrites(t *testing.T) {
	calls := 0
	w := &awaitText{text: "SeaBIOS", found: func() { calls++ }}
	for _, part := range []string{"noise Sea", "BI", "OS (version 1.16)", "SeaBIOS"} {
		if n, err := w.Write([]byte(part)); n != len(part) || err != nil {
			t.Fatal(n, err)
		}
	}
	if !w.seen || calls != 1 {
		t.Errorf("seen %v, called %d times", w.seen, calls)
	}
}

func TestConfigDrive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.img")
	c := ConfigDrive{InstanceID: "ins-test0001", Hostname: "node-1", PublicKeys: []string{"ssh-ed25519 AAAA test"}, UserData: []byte("#cloud-config\n")}
	for range 2 { // the second time over the first
		if err := c.write(t.Context(), path); err != nil {
			t.Fatal(err)
		}
	}
	debugfs := func(request string) string {
		t.Helper()
		cmd := exec.Command("debugfs", "-R", request, path)
		if cmd.Err != nil {
			cmd = exec.Command("/usr/sbin/debugfs", cmd.Args[1:]...)
		}
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	if got, want := debugfs("cat /openstack/latest/meta_data.json"),
		`{"hostname":"node-1","public_keys":{"key-0":"ssh-ed25519 AAAA test"},"uuid":"ins-test0001"}`; got != want {
		t.Errorf("meta_data.json = %s, want %s", got, want)
	}
	if got := debugfs("cat /openstack/latest/user_data"); got != "#cloud-config\n" {
		t.Errorf("user_data = %q", got)
	}
	if got := debugfs("show_super_stats -h"); !strings.Contains(got, "Filesystem volume name:   config-2\n") {
		t.Errorf("the label is not that of a config drive:\n%s", got)
	}
	c.UserData = make([]byte, maxUserData+1)
	if err := c.write(t.Context(), path); err == nil || !strings.Contains(err.Error(), "user-data of 16385 bytes") {
		t.Errorf("err = %v", err)
	}
}

func TestShellQuote(t *testing.T) {
	const path = `/lab/o'brien $HOME "x"`
	out, err := exec.Command("sh", "-c", "printf %s "+shellQuote(path)).Output()
	if err != nil || string(out) != path {
		t.Errorf("%q, %v", out, err)
	}
}
