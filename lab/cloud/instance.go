package cloud

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// InstanceSpec says what to launch. Empty fields get the first that the region
// has.
type InstanceSpec struct {
	Name      string // also the host name; default the private address, as 10-0-0-30
	Type      string // default S5.MEDIUM4
	Image     string
	Subnet    string     // of the primary ENI
	PrivateIP netip.Addr // of the primary ENI; default the lowest free one
	ENIs      []string   // secondary ENIs that are attached from the start
	UserData  []byte     // not base64
	DataDisks []DiskSpec
	MemoryMiB int // default what the type has; the lab's own machine may have less
}

// DiskSpec is a data disk to create and attach at launch.
type DiskSpec struct {
	SizeGiB            int
	Type               string // default CLOUD_PREMIUM
	DeleteWithInstance bool
	// Content is a raw file of the hypervisor's that the disk begins as, as one made
	// from a snapshot does; empty: blank.
	Content string
	ID      string // default: any
	// Encrypted disks show another size only once they are attached anew.
	Encrypted bool
}

const (
	defaultType     = "S5.MEDIUM4"
	defaultDiskType = "CLOUD_PREMIUM"
	systemDiskGiB   = 50
	maxUserData     = 16 << 10 // https://cloud.tencent.com/document/api/213/15730
)

// Launch creates an instance with its primary ENI and its disks, and runs it.
// What it has created is gone again when it fails.
func (r *Region) Launch(ctx context.Context, spec InstanceSpec) (Instance, error) {
	in, enis, disks, err := r.create(spec)
	if err != nil {
		return Instance{}, fmt.Errorf("launch instance: %w", err)
	}
	m := Machine{
		Instance: in.ID, UUID: in.UUID, Hostname: in.Name, Image: in.Image, UserData: spec.UserData,
		CPUs: instanceTypes[in.Type].CPUs, MemoryMiB: instanceTypes[in.Type].MemoryGiB << 10,
	}
	if spec.MemoryMiB > 0 {
		m.MemoryMiB = spec.MemoryMiB
	}
	for _, d := range disks {
		if !d.System {
			m.Volumes = append(m.Volumes, d.volume())
		}
	}
	err = r.run(ctx, m, enis)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.instances.drop(in.ID)
		for _, e := range enis {
			r.release(e)
		}
		for _, d := range disks {
			r.disks.drop(d.ID)
		}
		return Instance{}, fmt.Errorf("launch instance %s: %w", in.ID, err)
	}
	in.State = running
	r.instances.put(in.ID, in)
	return in, nil
}

// run runs a machine with these ENIs, or leaves no port behind.
func (r *Region) run(ctx context.Context, m Machine, enis []ENI) (err error) {
	attached := 0
	defer func() {
		if err != nil {
			for _, e := range enis[:attached] {
				_ = r.fabric.Detach(e.ID) // nobody else uses the port
			}
		}
	}()
	for _, e := range enis {
		p := e.port(m.Hostname)
		if err := r.fabric.Attach(p); err != nil {
			return err
		}
		attached++
		m.NICs = append(m.NICs, NIC{e.ID, p.MAC})
	}
	return r.hypervisor.Run(ctx, m)
}

// create adds what an instance consists of, PENDING. The primary ENI is the first.
func (r *Region) create(spec InstanceSpec) (Instance, []ENI, []Disk, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, err := r.complete(&spec)
	if err != nil {
		return Instance{}, nil, nil, err
	}
	now, ip := time.Now(), spec.PrivateIP
	in := Instance{
		ID: newID("ins-"), Name: spec.Name, UUID: newUUID(), Type: spec.Type, Image: spec.Image, Zone: s.Zone,
		State: pending, PrivateIP: ip, Created: now, userData: spec.UserData,
	}
	enis := []ENI{{
		ID: newID("eni-"), Name: "Primary ENI", Subnet: s.ID, MAC: r.newMAC(), Primary: true, State: available,
		SecurityGroups: r.config.SecurityGroups[:1], IPs: []IP{{ip, true, available}}, Instance: in.ID, Created: now, Attached: now,
	}}
	for i, id := range spec.ENIs {
		e, err := r.idleENI(id, "UnsupportedOperation.InvalidState")
		if err != nil {
			return Instance{}, nil, nil, err
		}
		if e.Instance != "" {
			return Instance{}, nil, nil, fmt.Errorf("ENI %s is attached to %s", e.ID, e.Instance)
		}
		e = e.copy()
		e.Instance, e.DeviceIndex, e.Attached = in.ID, i+1, now
		enis = append(enis, e)
	}
	disks := []Disk{{
		ID: newID("disk-"), Type: defaultDiskType, System: true, SizeGiB: systemDiskGiB, DeleteWithInstance: true,
	}}
	for _, d := range spec.DataDisks {
		disks = append(disks, Disk{
			ID: cmp.Or(d.ID, newID("disk-")), Encrypted: d.Encrypted, Type: cmp.Or(d.Type, defaultDiskType), SizeGiB: d.SizeGiB, Content: d.Content, DeleteWithInstance: d.DeleteWithInstance,
		})
		if d.Content != "" {
			disks[len(disks)-1].Snapshot = newID("snap-")
		}
	}
	for i := range disks {
		d := &disks[i]
		d.State, d.Zone, d.Instance, d.LastInstance, d.Created = attached, s.Zone, in.ID, in.ID, now
		d.Attached = now.Add(time.Duration(i))
		r.disks.put(d.ID, *d)
	}
	r.instances.put(in.ID, in)
	for _, e := range enis {
		r.enis.put(e.ID, e)
	}
	return in, enis, disks, nil
}

// complete fills in the defaults of a spec, checks it, and returns the subnet of
// its primary ENI. The caller holds mu.
func (r *Region) complete(spec *InstanceSpec) (Subnet, error) {
	spec.Type = cmp.Or(spec.Type, defaultType)
	spec.Image = cmp.Or(spec.Image, r.config.Images[0])
	spec.Subnet = cmp.Or(spec.Subnet, r.config.Subnets[0].ID)
	s, ok := r.subnet(spec.Subnet)
	_, typeOK := instanceTypes[spec.Type]
	switch {
	case !ok:
		return s, fmt.Errorf("subnet %q is not found", spec.Subnet)
	case !typeOK:
		return s, fmt.Errorf("type %q is not one of %v", spec.Type, slices.Sorted(maps.Keys(instanceTypes)))
	case !slices.Contains(r.config.Images, spec.Image):
		return s, fmt.Errorf("image %q is not one of %v", spec.Image, r.config.Images)
	case len(spec.UserData) > maxUserData:
		return s, fmt.Errorf("user-data has %d bytes, at most %d are allowed", len(spec.UserData), maxUserData)
	case len(spec.DataDisks) > maxDisks:
		return s, fmt.Errorf("%d data disks, at most %d are allowed", len(spec.DataDisks), maxDisks)
	case len(spec.ENIs) >= instanceTypes[spec.Type].ENIs:
		return s, fmt.Errorf("%d secondary ENIs, at most %d are allowed", len(spec.ENIs), instanceTypes[spec.Type].ENIs-1)
	}
	for _, d := range spec.DataDisks {
		if d.SizeGiB <= 0 {
			return s, fmt.Errorf("data disk of %d GiB", d.SizeGiB)
		}
		if _, ok := r.disks.get(d.ID); ok {
			return s, fmt.Errorf("disk %s is there already", d.ID)
		}
	}
	if spec.PrivateIP.IsValid() {
		if err := r.checkAddr(s, spec.PrivateIP); err != nil {
			return s, err
		}
	} else {
		addrs, err := r.takeAddrs(s, 1)
		if err != nil {
			return s, err
		}
		spec.PrivateIP = addrs[0]
	}
	if spec.Name == "" {
		b := spec.PrivateIP.As4()
		spec.Name = fmt.Sprintf("%d-%d-%d-%d", b[0], b[1], b[2], b[3])
	}
	return s, nil
}

// release gives an instance's ENI back: a primary one is gone, others are free.
// The caller holds mu.
func (r *Region) release(e ENI) {
	if e.Primary {
		r.enis.drop(e.ID)
		return
	}
	e = e.copy()
	e.Instance, e.DeviceIndex, e.Attached = "", 0, time.Time{}
	r.enis.put(e.ID, e)
}

// ImportImage makes an image known that the hypervisor has under this id.
func (r *Region) ImportImage(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.config.Images = append(r.config.Images, id)
}

// CreateENI creates an ENI that is attached to nothing, at once.
func (r *Region) CreateENI(subnet string, tags ...Tag) (ENI, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, err := r.newENI(&createENIIn{
		VpcId: r.config.VPCID, NetworkInterfaceName: "made by hand", SubnetId: subnet, SecurityGroupIds: r.config.SecurityGroups[:1], Tags: tags,
	})
	if err != nil {
		return e, fmt.Errorf("create ENI: %w", err)
	}
	r.settleENI(e.ID)
	e, _ = r.enis.get(e.ID)
	return e, nil
}

// Terminate ends an instance. Its primary ENI, and the disks that were to go with
// it, are gone; what else was attached is free.
func (r *Region) Terminate(ctx context.Context, id string) error {
	if err := r.terminate(ctx, id); err != nil {
		return fmt.Errorf("terminate instance %s: %w", id, err)
	}
	return nil
}

func (r *Region) terminate(ctx context.Context, id string) error {
	if err := r.close(ctx, id); err != nil {
		return err
	}
	if err := r.hypervisor.Destroy(ctx, id); err != nil {
		return err
	}
	r.mu.Lock()
	enis, disks := r.attachedENIs(id), r.disks.all()
	r.mu.Unlock()
	var errs []error
	for _, e := range enis {
		errs = append(errs, r.fabric.Detach(e.ID))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range enis {
		r.release(e)
	}
	for _, d := range disks {
		switch {
		case d.Instance != id:
		case d.DeleteWithInstance:
			r.disks.drop(d.ID)
		default:
			d.State, d.Instance = unattached, ""
			r.disks.put(d.ID, d)
		}
	}
	r.instances.drop(id)
	maps.DeleteFunc(r.keys, func(_ string, k *roleKey) bool { return k.Instance == id })
	return errors.Join(errs...)
}

// close makes an instance refuse everything new, and waits for the tasks that
// work on its devices.
func (r *Region) close(ctx context.Context, id string) error {
	r.mu.Lock()
	in, ok := r.instances.get(id)
	if ok && in.State != terminating {
		in.State = terminating
		r.instances.put(id, in)
	}
	r.mu.Unlock()
	if !ok {
		return errNoInstance
	}
	for r.busy(id) {
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("wait for its tasks: %w", err)
		}
	}
	return nil
}

func (r *Region) busy(instance string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.enis.all(), func(e ENI) bool { return e.Instance == instance && r.claimed[e.ID] }) ||
		slices.ContainsFunc(r.disks.all(), func(d Disk) bool { return d.Instance == instance && r.claimed[d.ID] })
}

// NoticeSpot makes the metadata service say that the cloud takes an instance
// back at a time.
func (r *Region) NoticeSpot(id string, at time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	in, ok := r.instances.get(id)
	if !ok {
		return fmt.Errorf("notice instance %s: %w", id, errNoInstance)
	}
	in.SpotTermination = at
	r.instances.put(id, in)
	return nil
}

// Snapshot is the region's state for people, without any secret.
type Snapshot struct {
	Instances []Instance
	ENIs      []ENI
	Disks     []Disk
	Tasks     map[string]Task // that have not ended
	Calls     map[string]int  // of each action, authorized ones
}

// Task is a task that has not ended.
type Task struct {
	Action string
	Began  time.Time
}

// Snapshot returns the region's state as it is, not as it is described.
func (r *Region) Snapshot() Snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := Snapshot{
		Instances: r.instances.all(), ENIs: r.enis.all(), Disks: r.disks.all(), Tasks: map[string]Task{}, Calls: maps.Clone(r.calls),
	}
	for i := range s.ENIs {
		s.ENIs[i] = s.ENIs[i].copy()
	}
	for id, t := range r.tasks {
		if t.Status == taskRunning {
			s.Tasks[id] = Task{t.Action, t.Began}
		}
	}
	return s
}
