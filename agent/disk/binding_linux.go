package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// bound returns the binding of this disk's entry; one whose At is zero is what the
// cloud says now, and is not kept yet: with it come those of the others that are new.
// A disk that is named needs none.
func (d *Disk) bound(ctx context.Context, have observed) (_ *binding, fresh []binding, _ error) {
	if d.want.DiskID != "" || d.want.Selector == (node.DiskSelector{}) {
		return nil, nil, nil
	}
	kept, err := d.ledger.bindings()
	if err != nil {
		return nil, nil, err
	}
	if b, ok := bindingOf(kept, d.want.MountPoint); ok {
		if b.Selector != d.want.Selector {
			return nil, nil, node.Terminal("SelectorChanged", fmt.Sprintf("set disks[].diskID: %s in the NodeConfig, or that of another disk", b.DiskID),
				fmt.Errorf("%s was bound to %s on %s by the selector %s, and the NodeConfig now says %s", b.MountPoint, b.DiskID,
					b.At.Format("2006-01-02 15:04:05Z"), describeSelector(b.Selector), describeSelector(d.want.Selector)))
		}
		return &b, nil, nil
	}
	if fresh, err = d.resolve(ctx, kept, have); err != nil {
		return nil, nil, err
	}
	found, ok := bindingOf(fresh, d.want.MountPoint)
	if !ok {
		return nil, nil, fmt.Errorf("resolve the selector of %s: the sealed configuration has no such entry", d.want.MountPoint)
	}
	return &found, fresh, nil
}

// resolve asks the cloud, and decides for all entries of the NodeConfig.
func (d *Disk) resolve(ctx context.Context, kept []binding, have observed) ([]binding, error) {
	ctx, cancel := context.WithTimeout(ctx, cloudPatience)
	defer cancel()
	all := d.sealed.Config.Disks
	i := inventory{Listed: d.sealed.Facts.DataDisks, Used: used(all, have)}
	var err1, err2 error
	var wg sync.WaitGroup
	wg.Go(func() { i.Instance, err1 = d.cloud.DescribeInstance(ctx, d.sealed.Facts.InstanceID) })
	wg.Go(func() { i.Disks, err2 = d.cloud.InstanceDisks(ctx, d.sealed.Facts.InstanceID) })
	wg.Wait()
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("resolve disks[].selector: %w", err)
	}
	return resolve(all, kept, i)
}

// used says which disks somebody else uses already: as a volume of a pod's, say. What
// is mounted where a disk of the NodeConfig belongs is judged there.
func used(all []node.DiskConfig, have observed) map[string]string {
	out := map[string]string{}
	for _, dev := range have.Devices {
		if dev.Serial == "" {
			continue
		}
		err := unused(dev, have)
		ours := slices.ContainsFunc(all, func(e node.DiskConfig) bool {
			m, ok := have.at(e.MountPoint)
			return ok && m.Dev == dev.Dev
		})
		if err != nil && !ours {
			out[dev.Serial] = "used already: " + errors.Unwrap(err).Error()
		}
	}
	return out
}

// keep writes the bindings of all entries down before any of the disks is touched.
// Several disks may want to at once: the first decides for all.
func (d *Disk) keep(ctx context.Context, have observed) error {
	if err := os.MkdirAll(string(d.ledger), 0o700); err != nil {
		return fmt.Errorf("keep bindings of disks: %w", err)
	}
	dir, err := os.Open(string(d.ledger))
	if err != nil {
		return fmt.Errorf("keep bindings of disks: %w", err)
	}
	defer dir.Close()
	if err := lock(ctx, dir); err != nil {
		return fmt.Errorf("keep bindings of disks: %w", err)
	}
	defer func() { _ = unix.Flock(int(dir.Fd()), unix.LOCK_UN) }() // closing does so, too
	kept, err := d.ledger.bindings()
	if err != nil {
		return err
	}
	for _, b := range have.fresh {
		if _, ok := bindingOf(kept, b.MountPoint); ok {
			return nil // somebody was faster; the next plan tells
		}
	}
	for _, b := range have.fresh {
		b.At = time.Now().UTC().Truncate(time.Second)
		kept = append(kept, b)
		d.log.Info("bound", "disk", b.DiskID, "dir", b.MountPoint, "selector", describeSelector(b.Selector), "source", b.Source)
	}
	digest, err := digestOf(kept)
	if err != nil {
		return fmt.Errorf("keep bindings of disks: %w", err)
	}
	return d.ledger.store(bindingsFile, bindings{kept, digest})
}
