package bootstrap

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// readSealed returns the generation in force; the error is fs.ErrNotExist when
// nothing is. Of a damaged one it returns what can be read.
func (r *run) readSealed() (node.Sealed, error) {
	b, err := os.ReadFile(r.path(node.SealedPath))
	if err != nil {
		return node.Sealed{}, err
	}
	s, err := node.DecodeSealed(b)
	if err != nil && json.Unmarshal(b, &s) != nil {
		s = node.Sealed{}
	}
	return s, err
}

// seal writes the next generation. From here on the agent acts.
func (r *run) seal(context.Context) error {
	last, err := r.generationInForce()
	if err != nil {
		return unusable(err)
	}
	if r.sealed, err = node.Seal(last+1, r.config, r.facts, time.Now()); err != nil {
		return err
	}
	r.sealed.Machine = r.machine()
	if err := r.writeSealed(); err != nil {
		return unusable(err)
	}
	r.ledger.confirm(r.sealed)
	return nil
}

func (r *run) writeSealed() error {
	dir := r.path(node.ConfigDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	b, err := r.sealed.Encode()
	if err != nil {
		return err
	}
	file := strconv.Itoa(r.sealed.Generation) + ".json"
	if err := writeFile(filepath.Join(dir, file), b, 0o600); err != nil {
		return err
	}
	if err := replaceLink(file, r.path(node.SealedPath)); err != nil {
		return err
	}
	r.Log.Info("sealed", "generation", r.sealed.Generation, "digest", r.sealed.Digest)
	return nil
}

// generationInForce returns the number of what the current link leads to, be that
// damaged or not, and 0 without a link. A file beyond it was never in force: its
// writer was killed before it made the link.
func (r *run) generationInForce() (int, error) {
	target, err := os.Readlink(r.path(node.SealedPath))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(strings.TrimSuffix(target, ".json"))
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%s leads to %q, which is no generation", node.SealedPath, target)
	}
	return n, nil
}

// moveAside puts away what another instance kept on this disk, the sealed
// configuration last, so that a second try moves the rest. Nothing is deleted:
// whoever captured the image may have wanted some of it.
func (r *run) moveAside(from string) error {
	for _, dir := range []string{
		node.KubeletPKI,
		node.KubeletRoot, // checkpoints that kubelet would trip over
		"/var/lib/tkenode/eni",
		"/var/lib/tkenode/disk",
		node.ConfigDir,
	} {
		old := r.path(dir)
		aside := old + "." + filepath.Base(from)
		// What is empty may be the mount point of a disk, which cannot be renamed.
		if entries, err := os.ReadDir(old); errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
			continue
		}
		if err := os.Rename(old, aside); err != nil {
			return node.Terminal(ReasonState, "move it away by hand, then: systemctl restart tkenode-bootstrap",
				fmt.Errorf("what %s left on this disk is in the way: %w", from, err))
		}
		if err := syncDir(filepath.Dir(old)); err != nil {
			return unusable(err)
		}
		r.Log.Info("moved aside", "dir", dir, "to", aside)
	}
	return nil
}

// unusable marks an error of the disk. It is not terminal: a disk that is full
// or slow now may not be at the next try.
func unusable(err error) error {
	return &node.Error{Class: node.ClassTransient, Reason: ReasonState, Err: err}
}

// writeFile puts data at path, which then has all of it or what it had before,
// whenever the power fails.
func writeFile(path string, data []byte, mode fs.FileMode) error {
	// The same for every file: what a writer that was killed has left, which may be
	// a key, goes with the next.
	temp := filepath.Join(filepath.Dir(path), ".bootstrap.new")
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temp))
	}
	return syncDir(filepath.Dir(path))
}

// replaceLink makes path a link to target, whatever it was.
func replaceLink(target, path string) error {
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, temp); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
