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
	dev, err := readDevice(d.sys, filepath.Base(s.Device), nil)
	if err != nil {
		return 0, err
	}
	if dev.Serial != s.DiskID {
		return 0, fmt.Errorf("%s is not %s: %w", dev, s.DiskID, errChanged)
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
