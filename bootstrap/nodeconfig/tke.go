package nodeconfig

import (
	"regexp"
	"slices"

	"github.com/tkenode/tkenode/agent/node"
)

// diskType is the form of a type of disk: CLOUD_PREMIUM.
// Source: the comment of Disk.DiskType in tencentcloud-sdk-go, cbs/v20170312
var diskType = regexp.MustCompile(`^CLOUD_[A-Z]{2,20}$`)

// maxDiskGiB is the largest disk that there is.
// Source: https://cloud.tencent.com/document/product/362/2353
const maxDiskGiB = 32_000

const typeForm = "expected a type of cloud disk, such as CLOUD_PREMIUM"

// identity checks how an entry of disks says which disk it means.
func (v *validator) identity(at string, d node.DiskConfig, alone bool) {
	s := d.Selector
	_, selects := v.present[at+".selector"]
	switch named := d.DiskID != "" || d.DiskIDs != nil; {
	case d.DiskID != "" && d.DiskIDs != nil:
		v.problem(at+".diskIDs", "stands beside diskID; keep diskID for one disk, diskIDs for a stripe")
	case named && selects:
		v.problem(at+".selector", "the disk is named by diskID already; keep one of them")
	case named:
	case selects && s == (node.DiskSelector{}):
		v.problem(at+".selector", "is empty; write at least one of type, sizeGiB and order")
	case d.Attach:
		v.problem(at+".diskID", "missing; only a disk that is named can be attached")
	case !selects && !alone:
		v.problem(at+".diskID", "missing; with more than one disk each needs its id, or a selector")
	}
	if s.Type != "" && !diskType.MatchString(s.Type) {
		v.problem(at+".selector.type", "found %s, "+typeForm, quote(s.Type))
	}
	v.limit(at+".selector.sizeGiB", s.SizeGiB, maxDiskGiB)
	v.limit(at+".selector.order", s.Order, maxDisks)
}

// maxDisks is how many data disks an instance has at most.
// Source: https://cloud.tencent.com/document/product/362/5145
const maxDisks = 20

// dataDisks checks TKE's own forms of the list of disks.
func (v *validator) dataDisks(c *node.Config) {
	all := c.DataDisks
	if _, ok := v.present["mountTarget"]; ok {
		v.mountPoint("mountTarget", c.MountTarget)
		if len(c.Disks)+len(all) > 0 {
			v.problem("mountTarget", "is for an instance with one data disk; list it under dataDisks or disks with the others")
		}
	}
	for i, d := range all {
		at := index("dataDisks", i)
		if d.DiskPartition != "" {
			v.problem(at+".DiskPartition", "found %s, the name of a device, which may be another disk's at the next boot; leave it out, or list the disk under disks by its diskID", quote(d.DiskPartition))
		}
		if d.DiskType != "" && !diskType.MatchString(d.DiskType) {
			v.problem(at+".DiskType", "found %s, "+typeForm, quote(d.DiskType))
		}
		v.limit(at+".DiskSize", d.DiskSize, maxDiskGiB)
		if len(all)+len(c.Disks) > 1 && (d.DiskType == "" || d.DiskSize == 0) {
			v.problem(at, "with more than one disk each needs DiskType and DiskSize, by which it is told from the others")
		}
		v.automatic(at, d)
	}
}

// automatic checks what becomes of a disk of TKE's form.
func (v *validator) automatic(at string, d node.TKEDataDisk) {
	switch {
	case !d.AutoFormatAndMount && d.MountTarget != "":
		v.problem(at+".MountTarget", "with AutoFormatAndMount false the disk is left alone; leave MountTarget out, or set AutoFormatAndMount: true")
	case !d.AutoFormatAndMount:
	case v.need(at+".MountTarget", d.MountTarget, "write the directory to mount it on, such as /var/lib/containerd"):
		v.mountPoint(at+".MountTarget", d.MountTarget)
	}
	if fs := d.FileSystem; fs != "" && !slices.Contains([]node.FileSystem{node.Ext3, node.Ext4, node.XFS}, fs) {
		v.problem(at+".FileSystem", "found %s, expected ext3, ext4 or xfs", quote(string(fs)))
	}
}

// fromTKE translates TKE's forms. What is not to be formatted and mounted is not ours,
// but counts where disks are alike.
func fromTKE(all []node.TKEDataDisk, mountTarget string) []node.DiskConfig {
	var disks []node.DiskConfig
	if mountTarget != "" { // the only data disk
		disks = append(disks, node.DiskConfig{FileSystem: node.Ext4, MountPoint: mountTarget, WhenNotBlank: node.MountFound})
	}
	for i, d := range all {
		if !d.AutoFormatAndMount {
			continue
		}
		out := node.DiskConfig{
			Selector:   node.DiskSelector{Type: d.DiskType, SizeGiB: d.DiskSize},
			FileSystem: d.FileSystem, MountPoint: d.MountTarget, WhenNotBlank: node.MountFound,
		}
		if out.FileSystem == "" {
			out.FileSystem = node.Ext4
		}
		alike, place := 0, 0
		for j, o := range all {
			if o.DiskType == d.DiskType && o.DiskSize == d.DiskSize {
				if alike++; j == i {
					place = alike
				}
			}
		}
		if alike > 1 {
			out.Selector.Order = place
		}
		disks = append(disks, out)
	}
	return disks
}
