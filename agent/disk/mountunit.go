package disk

import (
	"fmt"
	"path/filepath"

	systemd "github.com/coreos/go-systemd/v22/unit"
)

// runtimeUnits is where systemd reads units that do not outlive the boot.
const runtimeUnits = "/run/systemd/system"

// mountUnit is how systemd knows the mount of a disk.
type mountUnit struct {
	Path string `json:"path"` // of its file
	Text string `json:"text"` // that is in the file; empty: there is none
	// Stale says that systemd has the unit and has not read the file.
	Stale bool `json:"stale,omitempty"`
}

// unitName returns the name that systemd has for the mount at a directory.
func unitName(mountPoint string) string { return systemd.UnitNamePathEscape(mountPoint) + ".mount" }

func unitPath(mountPoint string) string { return filepath.Join(runtimeUnits, unitName(mountPoint)) }

// unitText returns the file by which systemd takes the mount for one that units may
// require: what only stands in mountinfo is ordered, but not required, by
// RequiresMountsFor=.
//
// The agent mounts by itself, and systemd adopts the mount. systemd would mount
// whatever has the name at that moment, without asking it for its serial, and it can
// be asked only once the bus is up, seconds later in a boot. So the file has an
// assertion under which systemd never mounts anything. The file is there before the
// mount is: systemd reads it when it first sees the mount, and no boot pays for a
// daemon-reload.
//
// At shutdown the agent ends first, or it would mount the disk again; what requires
// the mount ends before it, too.
func unitText(id, device, mountPoint, fs string) string {
	return fmt.Sprintf(`# Written by tkenode at each boot. It mounts the disk itself, once the disk has told its
# serial; systemd only has to know of the mount.
[Unit]
Description=CBS disk %s
Documentation=man:tkenode(8)
AssertPathIsMountPoint=%s
Before=tkenode-agent.service

[Mount]
What=%s
Where=%s
Type=%s
Options=noatime
`, id, mountPoint, device, mountPoint, fs)
}
