package disk

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// trim tells the disk which blocks its file system does not use. It takes minutes,
// and no lock: who holds up the disk is another process, and it comes last for the
// disk as for the processor.
func (d *Disk) trim(ctx context.Context, s State) (bytesTrimmed int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, trimDeadline)
	defer cancel()
	dev, err := d.top(s)
	if err != nil {
		return 0, err
	}
	target, err := openMount(s.MountPoint, dev)
	if err != nil {
		return 0, err
	}
	defer target.Close() // which is descriptor 3 of the program: nothing else can be trimmed
	cmd := exec.CommandContext(ctx, "nice", "-n", "19", "ionice", "-c", "3", "fstrim", "--verbose", "/proc/self/fd/3")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.ExtraFiles = []*os.File{target}
	cmd.WaitDelay = 10 * time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("fstrim %s: %w: %s", dev, err, strings.TrimSpace(string(bytes.ToValidUTF8(out[:min(len(out), 500)], nil))))
	}
	return parseTrim(out)
}

// top asks the disks anew who they are, and returns the device that stands on them.
func (d *Disk) top(s State) (device, error) {
	want, disks := d.want, s.Members
	if len(want.IDs()) == 0 {
		want.DiskID = s.DiskID // which a selector has found
	}
	if len(disks) == 0 {
		disks = []Member{{DiskID: s.DiskID, Device: s.Device}}
	}
	var have observed
	for _, m := range disks {
		dev, err := readDevice(d.sys, filepath.Base(m.Device), nil)
		if err == nil && dev.Serial != m.DiskID {
			err = fmt.Errorf("%s is not %s: %w", dev, m.DiskID, errChanged)
		}
		if err != nil {
			return device{}, err
		}
		have.Devices = append(have.Devices, dev)
	}
	if want.Layered() {
		var err error
		if have.Layers, err = readLayers(d.sys); err != nil {
			return device{}, err
		}
	}
	at, err := raise(want, have)
	if err == nil && len(at.left) > 0 {
		err = fmt.Errorf("%s has no more that it had on it: %w", at.dev(), errChanged)
	}
	if err != nil {
		return device{}, err
	}
	return at.dev(), nil
}
