// Command mountutils has the SafeFormatAndMount of k8s.io/mount-utils, by which
// kubelet and the CSI drivers format, look at images of disks while their reads
// fail one by one, and prints for each image how often it would have made a file
// system. Nothing is: the program that would do it only takes a note.
//
// As "mountutils format DEVICE TARGET FSTYPE" it formats and mounts, and prints how
// long that took.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/mount-utils"
	"k8s.io/utils/exec"
)

// stand-ins come first in PATH. The real blkid runs under strace, which makes one of
// its reads of the image fail.
var standIns = map[string]string{
	"blkid": `exec strace -qq -o "$SWEEP_READS" -P "$SWEEP_IMAGE" -e trace=read,pread64 $SWEEP_INJECT /usr/sbin/blkid "$@"`,
	"mount": `exit 0`,
	"fsck":  `exit 0`,
}

// result is a line of output.
type result struct {
	Image string `json:"image"`
	Reads int    `json:"reads"` // of blkid without a fault
	Clean bool   `json:"clean"` // a file system would be made although no read fails
	Mkfs  int    `json:"mkfs"`  // as often would one be made when a read fails
}

func main() {
	run := sweep
	if len(os.Args) == 5 && os.Args[1] == "format" {
		run = formatAndMount
	}
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "mountutils:", err)
		os.Exit(1)
	}
}

func sweep(images []string) error {
	dir, err := os.MkdirTemp("", "mountutils")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for name, script := range standIns {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755))
	}
	for _, name := range []string{"mkfs.ext4", "mkfs.xfs"} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n: > \"$SWEEP_MADE\"\n"), 0o755))
	}
	if err != nil {
		return err
	}
	os.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	os.Setenv("SWEEP_READS", filepath.Join(dir, "reads"))
	os.Setenv("SWEEP_MADE", filepath.Join(dir, "made"))
	for _, image := range images {
		r := result{Image: filepath.Base(image)}
		if r.Clean, r.Reads, err = format(image, 0); err != nil {
			return err
		}
		for n := 1; n <= r.Reads; n++ {
			made, _, err := format(image, n)
			if err != nil {
				return err
			}
			if made {
				r.Mkfs++
			}
		}
		if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
			return err
		}
	}
	return nil
}

// format has the image formatted and mounted if it counts as unformatted, while read
// number fail fails. It says whether it would have been formatted, and how often it
// was read.
func format(image string, fail int) (made bool, reads int, err error) {
	inject := ""
	if fail > 0 {
		inject = fmt.Sprintf("-e inject=read,pread64:error=EIO:when=%d", fail)
	}
	os.Setenv("SWEEP_IMAGE", image)
	os.Setenv("SWEEP_INJECT", inject)
	for _, name := range []string{"SWEEP_MADE", "SWEEP_READS"} {
		if err := os.Remove(os.Getenv(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, 0, err
		}
	}
	m := mount.NewSafeFormatAndMount(mount.NewWithoutSystemd(""), exec.New())
	// What it says of a disk that it refuses is of no interest here.
	_ = m.FormatAndMount(image, os.TempDir(), "ext4", nil)
	if _, err := os.Stat(os.Getenv("SWEEP_MADE")); err == nil {
		made = true
	}
	b, err := os.ReadFile(os.Getenv("SWEEP_READS"))
	if err != nil {
		return false, 0, fmt.Errorf("blkid was not run: %w", err)
	}
	for line := range bytes.Lines(b) {
		if strings.HasPrefix(string(line), "read(") || strings.HasPrefix(string(line), "pread64(") {
			reads++
		}
	}
	return made, reads, nil
}

// formatAndMount formats and mounts a real device.
func formatAndMount(args []string) error {
	m := mount.NewSafeFormatAndMount(mount.NewWithoutSystemd(""), exec.New())
	began := time.Now()
	err := m.FormatAndMount(args[1], args[2], args[3], nil)
	took := time.Since(began)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(struct{ Took time.Duration }{took})
}
