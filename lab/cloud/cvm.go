package cloud

import (
	"slices"
	"strconv"
	"time"
)

// instanceType is what a type of CVM has.
type instanceType struct {
	CPUs, MemoryGiB int
	ENIs, IPs       int // the primary ones included
	extendENIs      int
}

// instanceTypes are those that the lab can launch: the standard family S5.
// Sources: https://cloud.tencent.com/document/product/213/11518 (sizes) and
// https://cloud.tencent.com/document/product/576/18527 (quotas).
var instanceTypes = map[string]instanceType{
	"S5.SMALL2":    {1, 2, 2, 6, 5},
	"S5.MEDIUM2":   {2, 2, 4, 10, 10},
	"S5.MEDIUM4":   {2, 4, 4, 10, 10},
	"S5.LARGE8":    {4, 8, 4, 10, 20},
	"S5.2XLARGE16": {8, 16, 6, 20, 40},
	"S5.4XLARGE32": {16, 32, 8, 30, 64},
}

type dataDiskOut struct {
	DiskSize           int
	DiskType           string
	DiskId             string
	DeleteWithInstance bool
	SnapshotId         *string // null: it was not made from one
}

type systemDiskOut struct {
	DiskSize int
	DiskType string
	DiskId   string
}

type instanceVPC struct{ VpcId, SubnetId string }

type instanceOut struct {
	Placement           placement
	InstanceId          string
	InstanceName        string
	InstanceType        string
	InstanceState       string
	LatestOperation     *string // null: none but the launch
	RestrictState       string
	InstanceChargeType  string
	CPU                 int
	Memory              int
	Uuid                string
	ImageId             string
	CreatedTime         string
	CamRoleName         string
	SystemDisk          systemDiskOut
	DataDisks           []dataDiskOut
	PrivateIpAddresses  []string
	VirtualPrivateCloud instanceVPC
	SecurityGroupIds    []string
}

func (r *Region) describeInstance(in Instance, disks []Disk) instanceOut {
	t := instanceTypes[in.Type]
	out := instanceOut{
		Placement: placement{Zone: in.Zone}, InstanceId: in.ID, InstanceName: in.Name, InstanceType: in.Type, InstanceState: in.State,
		RestrictState: "NORMAL", InstanceChargeType: "POSTPAID_BY_HOUR", CPU: t.CPUs, Memory: t.MemoryGiB, Uuid: in.UUID,
		ImageId: in.Image, CreatedTime: in.Created.UTC().Format(time.RFC3339), CamRoleName: r.config.Role,
		DataDisks: []dataDiskOut{}, PrivateIpAddresses: []string{in.PrivateIP.String()}, SecurityGroupIds: r.config.SecurityGroups,
	}
	out.VirtualPrivateCloud.VpcId = r.config.VPCID
	for _, s := range r.config.Subnets {
		if s.CIDR.Contains(in.PrivateIP) {
			out.VirtualPrivateCloud.SubnetId = s.ID
		}
	}
	disks = slices.SortedStableFunc(slices.Values(disks), func(a, b Disk) int { return a.Attached.Compare(b.Attached) })
	for _, d := range disks {
		switch {
		case d.Instance != in.ID:
		case d.System:
			out.SystemDisk = systemDiskOut{d.SizeGiB, d.Type, d.ID}
		default:
			data := dataDiskOut{d.SizeGiB, d.Type, d.ID, d.DeleteWithInstance, nil}
			if d.Snapshot != "" {
				data.SnapshotId = &d.Snapshot
			}
			out.DataDisks = append(out.DataDisks, data)
		}
	}
	return out
}

type describeInstancesIn struct {
	InstanceIds   []string
	Filters       []filterIn
	Offset, Limit int64
}

var instanceFilters = map[string]func(o instanceOut) string{
	"instance-id":        func(o instanceOut) string { return o.InstanceId },
	"instance-name":      func(o instanceOut) string { return o.InstanceName },
	"instance-state":     func(o instanceOut) string { return o.InstanceState },
	"private-ip-address": func(o instanceOut) string { return o.PrivateIpAddresses[0] },
	"zone":               func(o instanceOut) string { return o.Placement.Zone },
	"vpc-id":             func(o instanceOut) string { return o.VirtualPrivateCloud.VpcId },
	"subnet-id":          func(o instanceOut) string { return o.VirtualPrivateCloud.SubnetId },
}

func (r *Region) describeInstances(_ string, in *describeInstancesIn) (any, error) {
	if len(in.InstanceIds) > 0 && len(in.Filters) > 0 || in.Offset < 0 || in.Limit < 0 {
		return nil, refuse("InvalidParameterValue", "InstanceIds and Filters exclude each other, and Offset and Limit are not negative")
	}
	at := r.visible()
	disks := r.disks.asOf(at)
	set := []instanceOut{}
	for _, i := range r.instances.asOf(at) {
		if len(in.InstanceIds) == 0 || slices.Contains(in.InstanceIds, i.ID) {
			set = append(set, r.describeInstance(i, disks))
		}
	}
	for _, f := range in.Filters {
		value := instanceFilters[f.Name]
		if value == nil {
			return nil, refuse("InvalidFilter", "filter %q is not known", f.Name)
		}
		set = slices.DeleteFunc(set, func(o instanceOut) bool { return !slices.Contains(f.Values, value(o)) })
	}
	total := len(set)
	set, err := page(set, uint64(in.Offset), uint64(in.Limit))
	return struct {
		TotalCount  int
		InstanceSet []instanceOut
	}{total, set}, err
}

type zoneOut struct{ Zone, ZoneName, ZoneId, ZoneState string }

func (r *Region) describeZones(string, *struct{}) (any, error) {
	set := []zoneOut{}
	for _, z := range r.config.Zones {
		set = append(set, zoneOut{z.Name, z.Name, strconv.Itoa(z.ID), "AVAILABLE"})
	}
	return struct {
		TotalCount int
		ZoneSet    []zoneOut
	}{len(set), set}, nil
}
