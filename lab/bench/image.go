package bench

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

// editImage makes a copy of a node image with more files in its root file system,
// of the same format. Nothing is mounted, so no privilege is needed.
func editImage(ctx context.Context, image, out string, files []file) error {
	dir, err := os.MkdirTemp(filepath.Dir(out), "edit-")
	if err != nil {
		return fmt.Errorf("edit image: %w", err)
	}
	defer os.RemoveAll(dir)
	raw := filepath.Join(dir, "disk.raw")
	if _, err := run(ctx, "", "qemu-img", "convert", "-O", "raw", image, raw); err != nil {
		return fmt.Errorf("edit image: %w", err)
	}
	offset, err := partition(raw)
	if err != nil {
		return fmt.Errorf("edit image: %w", err)
	}
	if err := writeFiles(ctx, fmt.Sprintf("%s?offset=%d", raw, offset), dir, files); err != nil {
		return fmt.Errorf("edit image: %w", err)
	}
	if _, err := run(ctx, "", "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, out); err != nil {
		return fmt.Errorf("edit image: %w", err)
	}
	return nil
}

// partition returns where the first partition of a disk starts, by its MBR.
func partition(raw string) (int64, error) {
	const firstEntry, startField, sector = 0x1be, 8, 512
	f, err := os.Open(raw)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var start [4]byte
	if _, err := f.ReadAt(start[:], firstEntry+startField); err != nil {
		return 0, fmt.Errorf("read partition table: %w", err)
	}
	lba := binary.LittleEndian.Uint32(start[:])
	if lba == 0 {
		return 0, fmt.Errorf("%s has no first partition", raw)
	}
	return int64(lba) * sector, nil
}

// writeFiles writes new files, owned by root, into an ext4 file system. dir is for
// what debugfs(8) reads.
func writeFiles(ctx context.Context, device, dir string, files []file) error {
	script, err := debugfsScript(dir, files)
	if err != nil {
		return err
	}
	stderr, err := run(ctx, script, "debugfs", "-w", "-f", "-", device)
	if err != nil {
		return err
	}
	return debugfsError(stderr)
}

// debugfsScript returns the commands that write the files, whose contents it puts
// into dir: debugfs writes only into its working directory, from files.
func debugfsScript(dir string, files []file) (string, error) {
	var script strings.Builder
	made := map[string]bool{"/": true}
	for i, f := range files {
		parent, name := path.Split(f.path)
		script.WriteString("cd /\n") // where "mkdir /a" makes it, whatever it says
		for at := "/"; at != path.Clean(parent); {
			rest := strings.TrimPrefix(strings.TrimPrefix(path.Clean(parent), at), "/")
			first, _, _ := strings.Cut(rest, "/")
			at = path.Join(at, first)
			if !made[at] {
				made[at] = true
				fmt.Fprintf(&script, "mkdir %s\n", at)
			}
		}
		fmt.Fprintf(&script, "cd %s\n", parent)
		if f.link != "" {
			fmt.Fprintf(&script, "symlink %s %s\n", name, f.link)
			continue
		}
		content := filepath.Join(dir, fmt.Sprint("file", i))
		if err := os.WriteFile(content, f.data, 0o600); err != nil {
			return "", err
		}
		const regular = 0o100000
		fmt.Fprintf(&script, "write %s %s\nset_inode_field %s mode 0%o\n", content, name, name, regular|f.mode.Perm())
	}
	return script.String(), nil
}

// debugfsError returns what debugfs complains about: its exit status says nothing.
// A directory that is there already is no complaint.
func debugfsError(stderr string) error {
	for line := range strings.Lines(stderr) {
		line = strings.TrimSpace(line)
		version := strings.HasPrefix(line, "debugfs ")
		if line != "" && !version && !strings.Contains(line, "Ext2 directory already exists") {
			return fmt.Errorf("debugfs: %s", line)
		}
	}
	return nil
}

// formatDisk makes a raw disk with a file system on it. All of it is initialised,
// so that the kernel has nothing left to do after the first mount.
func formatDisk(ctx context.Context, path string, size int64) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return fmt.Errorf("format disk: %w", err)
	}
	if err := os.Truncate(path, size); err != nil {
		return fmt.Errorf("format disk: %w", err)
	}
	_, err := run(ctx, "", "mke2fs", "-q", "-t", "ext4", "-m", "0", "-U", diskUUID, "-E", "assume_storage_prezeroed=1", path)
	if err != nil {
		return fmt.Errorf("format disk: %w", err)
	}
	return nil
}

// run runs a program and returns what it prints on standard error.
func run(ctx context.Context, stdin, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	// Debian keeps the tools of file systems where the PATH of ordinary users does
	// not reach.
	if cmd.Err != nil {
		cmd = exec.CommandContext(ctx, filepath.Join("/usr/sbin", name), args...)
	}
	var stderr strings.Builder
	cmd.Stdin, cmd.Stderr = strings.NewReader(stdin), &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return stderr.String(), nil
}
