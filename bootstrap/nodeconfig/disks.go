package nodeconfig

import (
	"cmp"
	"path"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// Directories that a data disk must not hide. The last two hold what bootstrap
// and the agent write before disks are mounted.
var (
	systemDirs = []string{
		"/", "/home", "/media", "/mnt", "/opt", "/root", "/srv", "/var", "/var/cache", "/var/lib", "/var/log", "/var/tmp",
		"/var/lib/systemd", "/var/lib/tkenode",
	}
	systemTrees = []string{
		"/bin", "/boot", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/proc", "/run", "/sbin", "/sys", "/tmp", "/usr", "/var/run",
		"/opt/cni", "/var/lib/tkenode",
	}
)

func (v *validator) disks(disks []node.DiskConfig, alone bool) {
	for i, d := range disks {
		at := index("disks", i)
		v.identity(at, d, alone)
		v.diskIDs(at, d, disks[:i])
		v.encryption(at+".encryption", d)
		switch fs := d.FileSystem; {
		case fs == node.Ext3 && d.WhenNotBlank != node.MountFound:
			v.problem(at+".fileSystem", "ext3 is only mounted where it is found, which takes whenNotBlank: mount; to have the disk formatted write ext4 or xfs")
		case fs != node.Ext3 && fs != node.Ext4 && fs != node.XFS:
			v.problem(at+".fileSystem", "found %s, expected ext4 or xfs", quote(string(fs)))
		}
		if d.WhenNotBlank != node.RefuseFound && d.WhenNotBlank != node.MountFound {
			v.problem(at+".whenNotBlank", "found %s, expected refuse or mount: what holds data is never formatted", quote(string(d.WhenNotBlank)))
		}
		if v.need(at+".mountPoint", d.MountPoint, "write the directory to mount it on, such as /var/lib/containerd") {
			v.mountPoint(at+".mountPoint", d.MountPoint)
		}
	}
}

func (v *validator) mountPoint(field, dir string) {
	before := v.places
	v.places = append(v.places, place{field, dir})
	switch {
	case !path.IsAbs(dir):
		v.problem(field, "found %s, expected an absolute path", quote(dir))
		return
	case path.Clean(dir) != dir:
		v.problem(field, "found %s, did you mean %s?", quote(dir), quote(path.Clean(dir)))
		return
	case strings.ContainsFunc(dir, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`\%"'$`, r) }):
		v.problem(field, "found %s, expected a path of plain characters", quote(dir))
		return
	case slices.Contains(systemDirs, dir) || slices.ContainsFunc(systemTrees, func(t string) bool { return within(dir, t) }):
		v.problem(field, "found %s, which the system itself uses; mount the disk elsewhere, such as on /var/lib/containerd or /data", quote(dir))
	}
	for _, o := range before {
		if within(dir, o.dir) || within(o.dir, dir) {
			v.problem(field, "%s and %s's %s are the same, or one is inside of the other; keep them apart", quote(dir), cmp.Or(parent(o.field), o.field), quote(o.dir))
		}
	}
}

func within(dir, tree string) bool { return dir == tree || strings.HasPrefix(dir, tree+"/") }

// diskIDs holds the ids of d against their form, each other, and those before.
func (v *validator) diskIDs(at string, d node.DiskConfig, before []node.DiskConfig) {
	if n := len(d.DiskIDs); d.DiskIDs != nil && (n < 2 || n > maxDisks) {
		v.problem(at+".diskIDs", "found %d disks, a stripe has 2 to %d; for one disk write diskID", n, maxDisks)
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
