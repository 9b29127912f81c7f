package nodeconfig

import (
	"path"
	"slices"

	"github.com/tkenode/tkenode/agent/node"
)

// diskIDs holds the ids of d against their form, each other, and those before.
func (v *validator) diskIDs(at string, d node.DiskConfig, before []node.DiskConfig) {
	if d.DiskID != "" && len(d.DiskIDs) > 0 {
		v.problem(at+".diskIDs", "stands beside diskID; keep diskID for one disk, diskIDs for a stripe")
	}
	if n := len(d.DiskIDs); d.DiskIDs != nil && (n < 2 || n > node.MaxStripe) {
		v.problem(at+".diskIDs", "found %d disks, a stripe has 2 to %d; for one disk write diskID", n, node.MaxStripe)
	}
	for k, id := range d.IDs() {
		field := at + ".diskID"
		if d.DiskID == "" {
			field = index(at+".diskIDs", k)
		}
		v.id(field, "disk", id)
		if slices.Index(d.IDs(), id) < k {
			v.problem(field, "%s is there twice; keep one", quote(id))
		}
		if j := slices.IndexFunc(before, func(o node.DiskConfig) bool { return slices.Contains(o.IDs(), id) }); j >= 0 {
			v.problem(field, "%s is %s already", quote(id), index("disks", j))
		}
	}
	if len(d.DiskIDs) > 0 && d.WhenNotBlank == node.MountFound {
		v.problem(at+".whenNotBlank", "mount is for one disk: a stripe that tkenode did not make is never assembled")
	}
}

// encryption demands one source of the key, which has to be there before any disk
// is mounted.
func (v *validator) encryption(at string, d node.DiskConfig) {
	e := d.Encryption
	switch {
	case e == nil:
		return
	case e.KeyFile == "" && e.KeyFrom == "":
		v.problem(at, "names no key; write keyFile: with a file, or keyFrom: instance")
	case e.KeyFile != "" && e.KeyFrom != "":
		v.problem(at, "has both keyFile and keyFrom; keep one")
	case e.KeyFrom != "" && e.KeyFrom != node.KeyFromInstance:
		v.problem(at+".keyFrom", "found %s, expected instance", quote(string(e.KeyFrom)))
	case e.KeyFile != "" && (!path.IsAbs(e.KeyFile) || path.Clean(e.KeyFile) != e.KeyFile):
		v.problem(at+".keyFile", "found %s, expected the absolute path of a file", quote(e.KeyFile))
	case e.KeyFile != "" && d.MountPoint != "" && within(e.KeyFile, d.MountPoint):
		v.problem(at+".keyFile", "%s is on the disk that it is to open; keep it elsewhere", quote(e.KeyFile))
	}
	if d.WhenNotBlank == node.MountFound {
		v.problem(at, "does not go with whenNotBlank: mount, which would mount what is not encrypted; keep one")
	}
}
