package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// keyOf is the cache key of something made from these inputs, in this order.
func keyOf(inputs ...string) string {
	h := sha256.New()
	for _, in := range inputs {
		fmt.Fprintf(h, "%d:%s,", len(in), in) // unambiguous: ("ab","c") is not ("a","bc")
	}
	return hex.EncodeToString(h.Sum(nil))
}

// treeKey is the key of the files at or below path: names, kinds, contents, link
// targets and whether they can be executed. Nothing else of a file survives git.
func treeKey(path string) (string, error) {
	h := sha256.New()
	err := filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(path, name)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			fmt.Fprintf(h, "dir %q\n", rel)
		case d.Type() == fs.ModeSymlink:
			to, err := os.Readlink(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(h, "link %q %q\n", rel, to)
		default:
			return fileKey(h, rel, name)
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("hash %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func fileKey(h io.Writer, rel, name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	fmt.Fprintf(h, "file %q %v %d\n", rel, info.Mode()&0o100 != 0, info.Size())
	_, err = io.Copy(h, f)
	return err
}

// stampOf is the file that keeps the key file was made with.
func stampOf(file string) string {
	return filepath.Join(filepath.Dir(file), ".key-"+filepath.Base(file))
}

// stamped reports whether file is there and was made with key.
func stamped(file, key string) bool {
	if _, err := os.Stat(file); err != nil {
		return false
	}
	have, err := os.ReadFile(stampOf(file))
	return err == nil && string(have) == key
}

// commit moves the finished tmp to file. The old stamp goes first: whenever
// this is cut off, there is no stamp that vouches for another file's content.
func commit(tmp, file, key string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return fmt.Errorf("keep %s: %w", file, err)
	}
	if err := os.Remove(stampOf(file)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("keep %s: %w", file, err)
	}
	if err := os.Rename(tmp, file); err != nil {
		return fmt.Errorf("keep %s: %w", file, err)
	}
	if err := os.WriteFile(stampOf(file)+".tmp", []byte(key), 0o644); err != nil {
		return fmt.Errorf("keep %s: %w", file, err)
	}
	if err := os.Rename(stampOf(file)+".tmp", stampOf(file)); err != nil {
		return fmt.Errorf("keep %s: %w", file, err)
	}
	return nil
}

// lock keeps a second build out of the cache and removes what builds left that
// were killed.
func (b *builder) lock(ctx context.Context) (unlock func(), err error) {
	dir := filepath.Join(b.Cache, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make cache: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock cache: %w", err)
	}
	const step = "wait for another build"
	for waits := 0; ; waits++ {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			if waits > 0 {
				b.Progress.End(step, nil)
			}
			break
		}
		if waits == 0 {
			b.Progress.Begin(step)
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			err = fmt.Errorf("lock cache: %w", err)
		} else {
			select {
			case <-time.After(time.Second):
				continue
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		b.Progress.End(step, err)
		f.Close()
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(dir, ".new-*"))
	if err == nil {
		for _, name := range left {
			err = errors.Join(err, os.RemoveAll(name))
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("clean cache: %w", err)
	}
	return func() { f.Close() }, nil
}
