package cvm

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// memoryFile is the state of the machine that a snapshot froze, beside its root
// disk and its config drive.
const memoryFile = "memory"

// Snapshot freezes the machine into dir, which it creates in the file system
// that holds the machine's own directory, and ends the machine. The machine must have nothing plugged: a snapshot is restored with a network
// interface of its own, so that two of them can be in one VPC.
//
// What the guest has drawn from its random generator is part of the snapshot,
// as are its machine id and host keys, and for up to a minute, until their kernels
// take up new ones, restored machines may draw the same random numbers (Debian's
// kernel for clouds has no driver for vmgenid): they are for tests.
func (m *Machine) Snapshot(ctx context.Context, dir string) error {
	if err := m.snapshot(ctx, dir); err != nil {
		return fmt.Errorf("snapshot %s: %w", m.spec.Name, err)
	}
	return nil
}

func (m *Machine) snapshot(ctx context.Context, dir string) error {
	m.mu.Lock()
	plugged := len(m.slots)
	m.mu.Unlock()
	if plugged > 0 {
		return fmt.Errorf("%d devices are plugged", plugged)
	}
	// Built beside its place and moved there whole, so that a snapshot that is
	// there can be restored.
	part := dir + ".part"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if err := os.MkdirAll(part, 0o700); err != nil {
		return err
	}
	if err := m.freeze(ctx, filepath.Join(part, memoryFile)); err != nil {
		return errors.Join(err, os.RemoveAll(part))
	}
	if err := m.Kill(); err != nil {
		return err
	}
	for _, name := range []string{rootFile, configFile} {
		err := os.Rename(filepath.Join(m.spec.Dir, name), filepath.Join(part, name))
		if err != nil && (name != configFile || !errors.Is(err, os.ErrNotExist)) {
			return err
		}
	}
	return os.Rename(part, dir)
}

// freeze stops the guest and writes its memory and the state of its devices as
// a migration does; QEMU flushes the disks at the end of it.
func (m *Machine) freeze(ctx context.Context, path string) error {
	if err := m.qmp.do(ctx, "stop", nil, nil); err != nil {
		return err
	}
	// Without a limit of its own QEMU paces a migration as if for a network.
	limit := map[string]any{"max-bandwidth": int64(1) << 40}
	if err := m.qmp.do(ctx, "migrate-set-parameters", limit, nil); err != nil {
		return err
	}
	if err := m.qmp.do(ctx, "migrate", map[string]any{"uri": "exec:exec cat >" + shellQuote(path)}, nil); err != nil {
		return err
	}
	return m.waitMigration(ctx)
}

func (m *Machine) waitMigration(ctx context.Context) error {
	for {
		var state struct {
			Status string
			Error  string `json:"error-desc"`
		}
		if err := m.qmp.do(ctx, "query-migrate", nil, &state); err != nil {
			return err
		}
		switch state.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("QEMU could not move the machine's state: %s %s", state.Status, state.Error)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Restore starts a machine that goes on where the snapshot in dir froze one. The
// processors, the memory and the config drive are the snapshot's; the NICs and
// disks of spec are plugged before the guest runs. The guest's clock stands at
// the snapshot's time until something in it asks for the time.
func Restore(ctx context.Context, spec Spec, dir string) (*Machine, error) {
	m, err := restore(ctx, spec, dir)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", spec.Name, err)
	}
	return m, nil
}

func restore(ctx context.Context, spec Spec, dir string) (*Machine, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(spec.Dir, 0o700); err != nil {
		return nil, err
	}
	root, config := filepath.Join(spec.Dir, rootFile), filepath.Join(dir, configFile)
	if _, err := os.Stat(root); err == nil {
		return nil, fmt.Errorf("%s is there: the machine has run before", root)
	}
	if err := createOverlay(ctx, root, filepath.Join(dir, rootFile)); err != nil {
		return nil, err
	}
	if _, err := os.Stat(config); err == nil {
		if err := os.Symlink(config, filepath.Join(spec.Dir, configFile)); err != nil {
			return nil, err
		}
	}
	nics, disks := spec.NICs, spec.Disks
	spec.NICs, spec.Disks, spec.Config = nil, nil, nil
	m := newMachine(ctx, spec)
	args, err := m.arguments()
	if err != nil {
		return nil, err
	}
	memory := shellQuote(filepath.Join(dir, memoryFile))
	if err := m.run(ctx, append(args, "-S", "-incoming", "exec:exec cat "+memory)); err != nil {
		return nil, err
	}
	if err := m.resume(ctx, nics, disks); err != nil {
		return nil, errors.Join(err, m.Kill())
	}
	return m, nil
}

func (m *Machine) resume(ctx context.Context, nics []NIC, disks []Disk) error {
	if err := m.waitMigration(ctx); err != nil {
		return errors.Join(err, m.lastWords())
	}
	for _, n := range nics {
		if err := m.PlugNIC(ctx, n); err != nil {
			return err
		}
	}
	for _, d := range disks {
		if err := m.PlugDisk(ctx, d); err != nil {
			return err
		}
	}
	return m.qmp.do(ctx, "cont", nil, nil)
}

func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Cached returns the snapshot called name of a machine without NICs and disks
// that has booted spec.Image until ready stood on its console. It is taken where
// dir does not hold one of this very image, make of machine and QEMU; those of
// others with the same name are removed.
func Cached(ctx context.Context, dir, name string, spec Spec, ready string) (string, error) {
	snapshot, err := cached(ctx, dir, name, spec, ready)
	if err != nil {
		return "", fmt.Errorf("snapshot %s of %s: %w", name, spec.Image, err)
	}
	return snapshot, nil
}

func cached(ctx context.Context, dir, name string, spec Spec, ready string) (string, error) {
	spec.Name = name
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	unlock, err := lock(ctx, filepath.Join(dir, name+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	key, err := snapshotKey(ctx, spec, ready)
	if err != nil {
		return "", err
	}
	snapshot := filepath.Join(dir, name+"-"+key)
	if _, err := os.Stat(snapshot); err == nil {
		return snapshot, nil
	}
	old, err := filepath.Glob(filepath.Join(dir, name+"-*"))
	if err != nil {
		return "", err
	}
	for _, path := range old { // machines that run from them keep the files open
		if err := os.RemoveAll(path); err != nil {
			return "", err
		}
	}
	spec.NICs, spec.Disks = nil, nil
	spec.Dir = filepath.Join(dir, name+"-boot")
	defer os.RemoveAll(spec.Dir)
	m, err := Start(ctx, spec)
	if err != nil {
		return "", err
	}
	defer m.Kill()
	if err := m.WaitConsole(ctx, ready); err != nil {
		return "", err
	}
	return snapshot, m.Snapshot(ctx, snapshot)
}

// snapshotKey names everything that decides whether a snapshot can be restored
// and is of use.
func snapshotKey(ctx context.Context, spec Spec, ready string) (string, error) {
	image, err := os.Stat(spec.Image)
	if err != nil {
		return "", err
	}
	version, err := exec.CommandContext(ctx, qemuBinary, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("ask QEMU for its version: %w", err)
	}
	m := newMachine(ctx, spec)
	m.spec.Dir, m.spec.NICs, m.spec.Disks = "", nil, nil
	args, err := m.arguments()
	if err != nil {
		return "", err
	}
	key, err := json.Marshal([]any{spec.Image, image.Size(), image.ModTime().UnixNano(), version, args, spec.Config, ready})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", sha256.Sum256(key))[:16], nil
}

// lock takes the lock file at path, which the kernel gives back when this
// process ends.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}
