package cloud

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"
)

// maxDisks is how many data disks a CVM takes.
// Source: https://cloud.tencent.com/document/product/362/5145
const maxDisks = 20

type placement struct {
	Zone      string
	ProjectId uint64 `json:",omitempty"`
}

type diskOut struct {
	DiskId             string
	DiskName           string
	DiskType           string
	DiskUsage          string
	DiskChargeType     string
	DiskSize           int
	DiskState          string
	Attached           bool
	InstanceId         string
	InstanceIdList     []string
	InstanceType       string
	LastAttachInsId    string
	DeleteWithInstance bool
	Portable           bool
	Shareable          bool
	Encrypt            bool
	Rollbacking        bool
	Migrating          bool
	SnapshotCount      int
	CreateTime         string
	Placement          placement
}

func describeDisk(d Disk) diskOut {
	out := diskOut{
		DiskId: d.ID, DiskName: d.Name, DiskType: d.Type, DiskUsage: "DATA_DISK", DiskChargeType: "POSTPAID_BY_HOUR",
		DiskSize: d.SizeGiB, DiskState: d.State, Attached: d.State == attached, InstanceId: d.Instance, InstanceIdList: []string{},
		Encrypt: d.Encrypted, InstanceType: "CVM", LastAttachInsId: d.LastInstance, DeleteWithInstance: d.DeleteWithInstance, Portable: !d.System,
		CreateTime: beijing(d.Created), Placement: placement{Zone: d.Zone},
	}
	if d.System {
		out.DiskUsage = "SYSTEM_DISK"
	}
	return out
}

type describeDisksIn struct {
	DiskIds       []string
	Filters       []filterIn
	Offset, Limit uint64
	OrderField    string
	Order         string
}

var diskFilters = map[string]func(o diskOut) string{
	"disk-id":     func(o diskOut) string { return o.DiskId },
	"disk-name":   func(o diskOut) string { return o.DiskName },
	"disk-type":   func(o diskOut) string { return o.DiskType },
	"disk-usage":  func(o diskOut) string { return o.DiskUsage },
	"disk-state":  func(o diskOut) string { return o.DiskState },
	"instance-id": func(o diskOut) string { return o.InstanceId },
	"portable":    func(o diskOut) string { return strings.ToUpper(strconv.FormatBool(o.Portable)) },
	"zone":        func(o diskOut) string { return o.Placement.Zone },
}

func (r *Region) describeDisks(_ string, in *describeDisksIn) (any, error) {
	if len(in.DiskIds) > 0 && len(in.Filters) > 0 {
		return nil, refuse("InvalidParameterValue", "DiskIds and Filters exclude each other")
	}
	if in.OrderField != "" && in.OrderField != "CREATE_TIME" || in.Order != "" && in.Order != "ASC" && in.Order != "DESC" {
		return nil, refuse("InvalidParameterValue", "order %q %q is not supported", in.OrderField, in.Order)
	}
	disks := r.disks.asOf(r.visible())
	slices.SortStableFunc(disks, func(a, b Disk) int { return a.Created.Compare(b.Created) })
	if in.Order != "ASC" { // the newest first, unless asked otherwise
		slices.Reverse(disks)
	}
	set := []diskOut{}
	for _, d := range disks {
		if len(in.DiskIds) == 0 || slices.Contains(in.DiskIds, d.ID) {
			set = append(set, describeDisk(d))
		}
	}
	for _, f := range in.Filters {
		value := diskFilters[f.Name]
		if value == nil {
			return nil, refuse("InvalidFilter", "filter %q is not known", f.Name)
		}
		set = slices.DeleteFunc(set, func(o diskOut) bool { return !slices.Contains(f.Values, value(o)) })
	}
	total := len(set)
	set, err := page(set, in.Offset, in.Limit)
	return struct {
		TotalCount int
		DiskSet    []diskOut
	}{total, set}, err
}

type attachDisksIn struct {
	InstanceId         string
	DiskIds            []string
	DeleteWithInstance bool
}

// attachDisks attaches all of the disks, or none. The end of it is seen in what
// DescribeDisks says, not in a task.
func (r *Region) attachDisks(id string, in *attachDisksIn) (any, error) {
	instance, ok := r.instances.get(in.InstanceId)
	if !ok {
		return nil, refuse("InvalidInstanceId.NotFound", "instance %q is not found", in.InstanceId)
	}
	disks, err := r.idleDisks(in.DiskIds)
	if err != nil {
		return nil, err
	}
	for _, d := range disks {
		switch {
		case d.State != unattached:
			return nil, refuse("ResourceUnavailable.Attached", "disk %s is %s, to %s", d.ID, d.State, d.Instance)
		case d.Zone != instance.Zone:
			return nil, refuse("ResourceUnavailable.ZoneNotMatch", "disk %s is in %s, instance %s in %s", d.ID, d.Zone, instance.ID, instance.Zone)
		}
	}
	if have := r.dataDisks(instance.ID); len(have)+len(disks) > maxDisks {
		return nil, refuse("LimitExceeded.InstanceAttachedDisk", "instance %s has %d disks, %d more exceed %d", instance.ID, len(have), len(disks), maxDisks)
	}
	for _, d := range disks {
		d.State, d.Instance, d.DeleteWithInstance = attaching, instance.ID, in.DeleteWithInstance
		r.disks.put(d.ID, d)
		r.begin(id, work{
			action: "AttachDisks", target: []string{d.ID}, takes: r.config.Delays.Attach,
			do: func(ctx context.Context) error {
				return r.hypervisor.PlugDisk(ctx, instance.ID, d.volume())
			},
			done: func(err error) {
				d.State, d.LastInstance, d.Attached = attached, instance.ID, time.Now()
				if err != nil {
					d.State, d.Instance = unattached, ""
				}
				r.disks.put(d.ID, d)
			},
		})
	}
	return none{}, nil
}

type detachDisksIn struct {
	DiskIds    []string
	InstanceId string
}

func (r *Region) detachDisks(id string, in *detachDisksIn) (any, error) {
	disks, err := r.idleDisks(in.DiskIds)
	if err != nil {
		return nil, err
	}
	for _, d := range disks {
		switch {
		case d.State != attached:
			return nil, refuse("InvalidDisk.NotSupported", "disk %s is %s", d.ID, d.State)
		case in.InstanceId != "" && in.InstanceId != d.Instance:
			return nil, refuse("InvalidParameterValue", "disk %s is attached to %s, not to %s", d.ID, d.Instance, in.InstanceId)
		}
	}
	for _, d := range disks {
		d.State = detaching
		r.disks.put(d.ID, d)
		r.begin(id, work{
			action: "DetachDisks", target: []string{d.ID}, takes: r.config.Delays.Attach,
			do: func(ctx context.Context) error { return r.hypervisor.UnplugDisk(ctx, d.Instance, d.ID) },
			done: func(err error) {
				if d.State = attached; err == nil {
					d.State, d.Instance = unattached, ""
				}
				r.disks.put(d.ID, d)
			},
		})
	}
	return none{}, nil
}

// idleDisks returns the named data disks, if no task works on any of them. The
// caller holds mu.
func (r *Region) idleDisks(ids []string) ([]Disk, error) {
	if len(ids) == 0 || len(ids) > 10 {
		return nil, refuse("InvalidParameterValue.LimitExceeded", "%d disks in a call, want 1 to 10", len(ids))
	}
	var disks []Disk
	for i, id := range ids {
		d, ok := r.disks.get(id)
		switch {
		case !ok:
			return nil, refuse("InvalidDiskId.NotFound", "disk %q is not found", id)
		case slices.Contains(ids[:i], id):
			return nil, refuse("InvalidParameterValue", "disk %s is given twice", id)
		case d.System:
			return nil, refuse("ResourceUnavailable.TypeError", "disk %s is a system disk", id)
		case r.claimed[id]:
			return nil, refuse("ResourceBusy", "disk %s is %s", id, d.State)
		}
		disks = append(disks, d)
	}
	return disks, nil
}

// dataDisks lists the data disks of an instance. The caller holds mu.
func (r *Region) dataDisks(instance string) []Disk {
	return slices.DeleteFunc(r.disks.all(), func(d Disk) bool { return d.Instance != instance || d.System })
}

type createDisksIn struct {
	Placement      placement
	DiskChargeType string
	DiskType       string
	DiskName       string
	DiskSize       int
	DiskCount      int
	ClientToken    string
}

var diskTypes = []string{"CLOUD_BASIC", "CLOUD_PREMIUM", "CLOUD_BSSD", "CLOUD_SSD", "CLOUD_HSSD", "CLOUD_TSSD"}

func (r *Region) createDisks(id string, in *createDisksIn) (any, error) {
	count := max(in.DiskCount, 1)
	switch {
	case !slices.ContainsFunc(r.config.Zones, func(z Zone) bool { return z.Name == in.Placement.Zone }):
		return nil, refuse("InvalidParameterValue", "zone %q is not in %s", in.Placement.Zone, r.config.Region)
	case in.DiskChargeType != "POSTPAID_BY_HOUR":
		return nil, refuse("InvalidAccount.InsufficientBalance", "the lab pays by the hour, not %q", in.DiskChargeType)
	case !slices.Contains(diskTypes, in.DiskType):
		return nil, refuse("InvalidParameter.DiskConfigNotSupported", "disk type %q is not known", in.DiskType)
	case in.DiskSize < 10 || in.DiskSize > 32000 || in.DiskSize%10 != 0:
		return nil, refuse("InvalidParameterValue", "DiskSize %d is not 10 to 32000 in steps of 10", in.DiskSize)
	case count > 50:
		return nil, refuse("InvalidParameterValue.LimitExceeded", "%d disks in a call, at most 50 are allowed", count)
	}
	var ids []string
	for range count {
		ids = append(ids, newID("disk-"))
	}
	r.begin(id, work{
		action: "CreateDisks", target: ids, takes: r.config.Delays.Task,
		done: func(error) {
			for _, id := range ids {
				r.disks.put(id, Disk{
					ID: id, Name: in.DiskName, Type: in.DiskType, SizeGiB: in.DiskSize,
					State: unattached, Zone: in.Placement.Zone, Created: time.Now(),
				})
			}
		},
	})
	return struct{ DiskIdSet []string }{ids}, nil
}

// CreateDisk creates a data disk that is attached to nothing, at once, in a zone;
// empty: the first.
func (r *Region) CreateDisk(zone string, spec DiskSpec) Disk {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := Disk{
		ID: newID("disk-"), Type: cmp.Or(spec.Type, defaultDiskType), SizeGiB: spec.SizeGiB, State: unattached, Content: spec.Content,
		Zone: cmp.Or(zone, r.config.Zones[0].Name), Created: time.Now(),
	}
	r.disks.put(d.ID, d)
	return d
}
