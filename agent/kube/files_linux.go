package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// identity tells one content of a path from the next: files here are replaced,
// not written to.
type identity struct {
	dev, ino  uint64
	size, sec int64
	nsec      int64
}

func identify(path string) identity {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return identity{}
	}
	return identity{st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec}
}

// watchFiles calls changed when one of paths comes, goes or is replaced, their
// directories included. It returns on failure or when ctx ends.
func watchFiles(ctx context.Context, changed func(), paths ...string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("watch files: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer context.AfterFunc(ctx, func() { f.Close() })()
	defer f.Close()
	before := make([]identity, len(paths))
	buf := make([]byte, 64<<10)
	for first := true; ; first = false {
		for _, p := range paths {
			if err := watchNearest(fd, filepath.Dir(p)); err != nil {
				return err
			}
		}
		moved := first // nobody tells what has changed before
		for i, p := range paths {
			now := identify(p)
			moved = moved || now != before[i]
			before[i] = now
		}
		if moved {
			changed()
		}
		// What has happened does not matter, only that something has.
		if _, err := f.Read(buf); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("watch files: %w", err)
		}
	}
}

// watchNearest watches dir, or as long as it is not there the nearest directory
// above it.
func watchNearest(fd int, dir string) error {
	const events = unix.IN_CREATE | unix.IN_CLOSE_WRITE | unix.IN_MOVE | unix.IN_DELETE |
		unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	for at := dir; ; at = filepath.Dir(at) {
		_, err := unix.InotifyAddWatch(fd, at, events)
		switch {
		case errors.Is(err, unix.ENOENT):
			continue // "/" is always there
		case err != nil:
			return fmt.Errorf("watch %s: %w", at, err)
		case at == dir:
			return nil
		}
		// The next directory down may have come before this one was watched.
		if _, err := os.Stat(below(at, dir)); err != nil {
			return nil
		}
		at = filepath.Join(dir, "x") // its parent is dir: try again from there
	}
}

// below returns the directory on the way from at to dir that is next to at.
func below(at, dir string) string {
	for filepath.Dir(dir) != at {
		dir = filepath.Dir(dir)
	}
	return dir
}

// waitForFile returns once path is there.
func waitForFile(ctx context.Context, path string) error {
	ctx, found := context.WithCancelCause(ctx)
	defer found(nil)
	there := errors.New("found")
	err := watchFiles(ctx, func() {
		if identify(path) != (identity{}) {
			found(there)
		}
	}, path)
	if context.Cause(ctx) == there {
		return nil
	}
	return err
}
