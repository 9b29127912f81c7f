package eni

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// inhabitant returns a process that lives in a network namespace, or 0.
func inhabitant(netns string) (pid int, err error) {
	var want unix.Stat_t
	if err := unix.Stat(netns, &want); errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	all, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 { // init is in the node's own
			continue
		}
		var ns unix.Stat_t
		err = unix.Stat(filepath.Join("/proc", e.Name(), "ns/net"), &ns)
		switch {
		case err == nil && ns.Ino == want.Ino && ns.Dev == want.Dev:
			return pid, nil
		case err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH):
			return 0, err // one that cannot be looked at may be the one
		}
	}
	return 0, nil
}
