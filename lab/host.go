package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"

	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/cvm"
	"github.com/tkenode/tkenode/lab/vpc"
)

// host is the physical machine of the region: it runs CVMs for lab/cloud and
// connects their NICs to the VPC. It satisfies cloud.Hypervisor and cloud.Fabric.
type host struct {
	dir string
	key string // public, for the login of the image's default user
	net *vpc.Network
	log *slog.Logger

	mu       sync.Mutex        // guards the rest
	images   map[string]string // files by id
	snapshot string            // machines go on from here instead of booting; empty: they boot
	cpus     int               // that it was taken with
	machines map[string]*machine
	launched map[string]*Timeline // by instance, from before the machine runs
}

type machine struct {
	*cvm.Machine
	spec   cvm.Spec // what it has now; the host's lock guards it
	follow context.CancelFunc
	done   chan struct{} // closed when nobody follows the console any more
}

func newHost(dir, key string, network *vpc.Network, log *slog.Logger) *host {
	return &host{
		dir: dir, key: key, net: network, log: log, images: map[string]string{},
		machines: map[string]*machine{}, launched: map[string]*Timeline{},
	}
}

// close ends every machine.
func (h *host) close() error {
	h.mu.Lock()
	ids := slices.Collect(maps.Keys(h.machines))
	h.mu.Unlock()
	var errs []error
	for _, id := range ids {
		errs = append(errs, h.Destroy(context.Background(), id))
	}
	return errors.Join(errs...)
}

func (h *host) socket(eni string) string    { return filepath.Join(h.dir, "net", eni) }
func (h *host) diskPath(disk string) string { return filepath.Join(h.dir, "disks", disk) }

func (h *host) Attach(p cloud.Port) error {
	return h.net.Attach(vpc.Port(p), h.socket(p.ENI))
}

func (h *host) SetAddrs(eni string, addrs []netip.Addr) error { return h.net.SetAddrs(eni, addrs) }

func (h *host) Detach(eni string) error { return h.net.Detach(eni) }

func (h *host) nic(n cloud.NIC) cvm.NIC {
	return cvm.NIC{ID: n.ENI, MAC: n.MAC, Socket: h.socket(n.ENI)}
}

// disk returns the raw file behind a volume. What nobody has written to it is
// zeros, and takes no space.
func (h *host) disk(ctx context.Context, v cloud.Volume) (cvm.Disk, error) {
	path := h.diskPath(v.Disk)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) && v.Content != "" {
		out, err := exec.CommandContext(ctx, "cp", "--sparse=always", v.Content, path).CombinedOutput()
		if err != nil {
			return cvm.Disk{}, fmt.Errorf("fill volume %s: %w: %s", v.Disk, err, bytes.TrimSpace(out))
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return cvm.Disk{}, fmt.Errorf("open volume: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err == nil && st.Size() < int64(v.SizeGiB)<<30 {
		err = f.Truncate(int64(v.SizeGiB) << 30)
	}
	if err != nil {
		return cvm.Disk{}, fmt.Errorf("size volume %s: %w", v.Disk, err)
	}
	return cvm.Disk{ID: v.Disk, Path: path}, nil
}

// addImage makes a file the image of that id.
func (h *host) addImage(id, file string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.images[id] = file
}

// Run starts an instance and follows its console.
func (h *host) Run(ctx context.Context, m cloud.Machine) error {
	h.mu.Lock()
	image, snapshot, cpus, timeline := h.images[m.Image], h.snapshot, h.cpus, h.timelineLocked(m.Instance)
	h.mu.Unlock()
	spec := cvm.Spec{
		Name: m.Instance, UUID: m.UUID, Dir: h.machineDir(m.Instance), Image: image,
		CPUs: m.CPUs, MemoryMiB: m.MemoryMiB,
		Config: &cvm.ConfigDrive{InstanceID: m.Instance, Hostname: m.Hostname, PublicKeys: []string{h.key}, UserData: m.UserData},
	}
	for _, n := range m.NICs {
		spec.NICs = append(spec.NICs, h.nic(n))
	}
	for _, v := range m.Volumes {
		d, err := h.disk(ctx, v)
		if err != nil {
			return err
		}
		spec.Disks = append(spec.Disks, d)
	}
	timeline.mark(PowerOn)
	var vm *cvm.Machine
	var err error
	if snapshot != "" {
		spec.CPUs, spec.MemoryMiB = cpus, 0 // what the snapshot was taken with
		vm, err = cvm.Restore(ctx, spec, snapshot)
		spec.Config = nil // it is the snapshot's, also when the machine is started again
	} else {
		vm, err = cvm.Start(ctx, spec)
	}
	if err != nil {
		return err
	}
	h.keep(vm, spec, timeline)
	return nil
}

// Destroy ends an instance and removes what only it had.
func (h *host) Destroy(_ context.Context, instance string) error {
	h.mu.Lock()
	m := h.machines[instance]
	delete(h.machines, instance)
	h.mu.Unlock()
	if m == nil {
		return nil
	}
	err := m.Kill()
	m.follow()
	<-m.done
	return err
}

func (h *host) PlugNIC(ctx context.Context, instance string, n cloud.NIC) error {
	m, err := h.machine(instance)
	if err != nil {
		return err
	}
	nic := h.nic(n)
	if err := m.PlugNIC(ctx, nic); err != nil {
		return err
	}
	h.has(m, func(s *cvm.Spec) { s.NICs = append(s.NICs, nic) })
	return nil
}

func (h *host) UnplugNIC(ctx context.Context, instance, eni string) error {
	m, err := h.machine(instance)
	if err != nil {
		return err
	}
	if err := m.UnplugNIC(ctx, eni); err != nil {
		return err
	}
	h.has(m, func(s *cvm.Spec) { s.NICs = slices.DeleteFunc(s.NICs, func(n cvm.NIC) bool { return n.ID == eni }) })
	return nil
}

func (h *host) PlugDisk(ctx context.Context, instance string, v cloud.Volume) error {
	m, err := h.machine(instance)
	if err != nil {
		return err
	}
	d, err := h.disk(ctx, v)
	if err != nil {
		return err
	}
	if err := m.PlugDisk(ctx, d); err != nil {
		return err
	}
	h.has(m, func(s *cvm.Spec) { s.Disks = append(s.Disks, d) })
	return nil
}

func (h *host) UnplugDisk(ctx context.Context, instance, disk string) error {
	m, err := h.machine(instance)
	if err != nil {
		return err
	}
	if err := m.UnplugDisk(ctx, disk); err != nil {
		return err
	}
	h.has(m, func(s *cvm.Spec) { s.Disks = slices.DeleteFunc(s.Disks, func(d cvm.Disk) bool { return d.ID == disk }) })
	return nil
}

// has changes what a machine is started with when it was off.
func (h *host) has(m *machine, change func(*cvm.Spec)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(&m.spec)
}

// ResizeDisk makes a disk larger. One that is encrypted is so for the guest once it
// is plugged anew, and so is one whose machine is off.
func (h *host) ResizeDisk(ctx context.Context, instance string, v cloud.Volume) error {
	m, err := h.machine(instance)
	off := err != nil
	if !off {
		select {
		case <-m.Done():
			off = true
		default:
		}
	}
	if off || v.Encrypted {
		_, err := h.disk(ctx, v)
		return err
	}
	return m.ResizeDisk(ctx, v.Disk, int64(v.SizeGiB)<<30)
}

// PowerOff presses the power button of an instance and waits until it is off.
func (l *Lab) PowerOff(ctx context.Context, c *CVM) error {
	m, err := l.host.machine(c.ID)
	if err != nil {
		return err
	}
	return m.Stop(ctx)
}

// PowerOn starts an instance that is off, with the devices that it had.
func (l *Lab) PowerOn(ctx context.Context, c *CVM) error {
	m, err := l.host.machine(c.ID)
	if err != nil {
		return err
	}
	m.follow()
	<-m.done
	return l.host.start(ctx, m.spec, l.host.timeline(c.ID))
}

// start starts a machine, which may have run before, and follows its console.
func (h *host) start(ctx context.Context, spec cvm.Spec, timeline *Timeline) error {
	vm, err := cvm.Start(ctx, spec)
	if err != nil {
		return err
	}
	h.keep(vm, spec, timeline)
	return nil
}

// keep takes a running machine over.
func (h *host) keep(vm *cvm.Machine, spec cvm.Spec, timeline *Timeline) {
	ctx, cancel := context.WithCancel(context.Background())
	run := &machine{Machine: vm, spec: spec, follow: cancel, done: make(chan struct{})}
	go func() {
		defer close(run.done)
		follow(ctx, vm.Console(), timeline.readLine)
	}()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.machines[spec.Name] = run
}

func (h *host) machineDir(instance string) string { return filepath.Join(h.dir, "cvm", instance) }

func (h *host) machine(instance string) (*machine, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.machines[instance]
	if m == nil {
		return nil, fmt.Errorf("instance %s: its machine is not running", instance)
	}
	return m, nil
}

func (h *host) timeline(instance string) *Timeline {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.timelineLocked(instance)
}

func (h *host) timelineLocked(instance string) *Timeline {
	if h.launched[instance] == nil {
		h.launched[instance] = newTimeline()
	}
	return h.launched[instance]
}
