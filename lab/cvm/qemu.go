package cvm

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	qemuBinary = "qemu-system-x86_64"
	// rootPorts is how many devices can be plugged. Each is five devices to the
	// guest's udev, which takes some 0.1 s a device without KVM. QEMU boots and
	// restores 28 as well.
	rootPorts = 12
	// portsPerSlot is how many functions a PCI slot has.
	portsPerSlot = 8
)

// Accel says how QEMU runs the guest's instructions.
type Accel string

// The accelerators.
const (
	KVM Accel = "kvm"
	TCG Accel = "tcg" // translated by QEMU: about ten times slower
)

// arguments returns QEMU's command line, without the control socket. Whatever
// is not plugged later is at a fixed place, since a snapshot can be restored
// only into a machine of the same make.
func (m *Machine) arguments() ([]string, error) {
	s := m.spec
	args := []string{
		"-name", escape(s.Name), "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35", "-cpu", "max", "-rtc", "base=utc",
		"-smp", fmt.Sprint(s.CPUs), "-m", fmt.Sprint(s.MemoryMiB),
		// What identifies a CVM to software inside it.
		"-smbios", "type=1,manufacturer=Tencent Cloud,product=CVM,serial=" + escape(s.UUID),
		// The console is QEMU's standard output, and so its file is bounded.
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng,bus=pcie.0,addr=0x10",
		"-blockdev", "driver=qcow2,node-name=root,discard=unmap,file.driver=file,file.filename=" +
			escape(filepath.Join(s.Dir, rootFile)),
		"-device", "virtio-blk-pci,drive=root,bootindex=1,bus=pcie.0,addr=0x11",
	}
	args = append(args, m.accel.arguments()...)
	if s.UUID != "" {
		args = append(args, "-uuid", s.UUID)
	}
	for i := range rootPorts {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=%s,bus=pcie.0,chassis=%d,addr=0x%x.%d,multifunction=on",
			rootPort(i), i+1, 0x2+i/portsPerSlot, i%portsPerSlot))
	}
	config := filepath.Join(s.Dir, configFile)
	if _, err := os.Stat(config); err == nil {
		args = append(args,
			"-blockdev", "driver=raw,node-name=config,read-only=on,file.driver=file,file.filename="+escape(config),
			"-device", "virtio-blk-pci,drive=config,bus=pcie.0,addr=0x12")
	}
	for _, n := range s.NICs {
		slot, err := m.takeSlot(n.ID)
		if err != nil {
			return nil, err
		}
		args = append(args, "-netdev", commandLine(n.backend(), "type"), "-device", commandLine(n.device(slot), "driver"))
	}
	for i, d := range s.Disks {
		device := d.device(0)
		if i < pluggedDisks {
			slot, err := m.takeSlot(d.ID)
			if err != nil {
				return nil, err
			}
			device = d.device(slot)
		} else { // as many as there are functions, but they stay until the machine is off
			at := i - pluggedDisks
			device["bus"], device["addr"], device["multifunction"] = "pcie.0", fmt.Sprintf("0x%x.%d", 0x13+at/portsPerSlot, at%portsPerSlot), "on"
		}
		args = append(args, "-blockdev", commandLine(d.backend(), "driver"), "-device", commandLine(device, "driver"))
	}
	return args, nil
}

// pluggedDisks of those that a machine starts with can be unplugged: some root ports
// are left for others.
const pluggedDisks = 6

func (a Accel) arguments() []string {
	if a == KVM {
		return []string{"-accel", "kvm"}
	}
	return []string{"-accel", "tcg,thread=multi"}
}

func rootPort(i int) string { return fmt.Sprintf("port%d", i) }

// commandLine writes the arguments of a QMP command as QEMU's command line has
// them: the value of first, then key=value in order.
func commandLine(args map[string]string, first string) string {
	line := args[first]
	for _, key := range slices.Sorted(maps.Keys(args)) {
		if key != first {
			line += "," + key + "=" + escape(args[key])
		}
	}
	return line
}

// escape doubles commas, which end a value on QEMU's command line.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

var accelerator struct {
	sync.Mutex
	found Accel
}

// Accelerator reports whether this host can run machines with KVM. The device
// alone is no evidence, so a machine is tried, once in the life of the process.
func Accelerator(ctx context.Context) Accel {
	accelerator.Lock()
	defer accelerator.Unlock()
	if accelerator.found == "" {
		accelerator.found = TCG
		if kvmWorks(ctx) {
			accelerator.found = KVM
		}
	}
	return accelerator.found
}

func kvmWorks(ctx context.Context) bool {
	cpus, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !hasVirtualization(string(cpus)) {
		return false
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	return firmwareRuns(ctx, KVM)
}

func hasVirtualization(cpuinfo string) bool {
	for line := range strings.Lines(cpuinfo) {
		if key, value, _ := strings.Cut(line, ":"); strings.TrimSpace(key) == "flags" {
			flags := strings.Fields(value)
			return slices.Contains(flags, "vmx") || slices.Contains(flags, "svm")
		}
	}
	return false
}

// firmwareRuns starts a machine without disks for as long as its firmware takes
// to introduce itself on QEMU's debug port.
func firmwareRuns(ctx context.Context, a Accel) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, qemuBinary, append(a.arguments(), "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35", "-m", "128", "-chardev", "stdio,id=debug", "-device", "isa-debugcon,iobase=0x402,chardev=debug")...)
	out := &awaitText{text: "SeaBIOS", found: cancel}
	cmd.Stdout = out
	cmd.WaitDelay = time.Second
	// It must not outlive this process; the signal is about the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	return out.seen && (err == nil || errors.Is(ctx.Err(), context.Canceled))
}

// awaitText calls found when text has been written to it.
type awaitText struct {
	text, got string
	seen      bool
	found     func()
}

func (w *awaitText) Write(b []byte) (int, error) {
	if w.got += string(b); !w.seen && strings.Contains(w.got, w.text) {
		w.seen = true
		w.found()
	}
	w.got = w.got[max(0, len(w.got)-len(w.text)):]
	return len(b), nil
}
