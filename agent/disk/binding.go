package disk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// binding is the disk that the selector of an entry was found to mean. It is made
// once, and kept before the disk is touched.
type binding struct {
	MountPoint string            `json:"mountPoint"`
	Selector   node.DiskSelector `json:"selector"`
	DiskID     string            `json:"diskID"`
	Source     string            `json:"source"`      // what it rested on
	At         time.Time         `json:"at,omitzero"` // zero: it is not kept yet
}

// bindings is the file of all of them. One file, since they are one decision.
type bindings struct {
	Bindings []binding `json:"bindings"`
	Digest   string    `json:"digest"` // "sha256:…" of Bindings
}

const bindingsFile = "bindings"

func digestOf(all []binding) (string, error) {
	b, err := json.Marshal(all)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// bindings returns what selectors were found to mean. A file that is not as it was
// written is a terminal error: nobody knows then which disks it spoke of.
func (l ledger) bindings() ([]binding, error) {
	path := filepath.Join(string(l), bindingsFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read bindings of disks: %w", err)
	}
	all, err := decodeBindings(b)
	if err != nil {
		return nil, node.Terminal("BindingDamaged",
			"set disks[].diskID in the NodeConfig; or, if none of these disks has been used yet, remove the file, and the selectors are resolved anew",
			fmt.Errorf("read bindings of disks %s: %w", path, err))
	}
	return all, nil
}

func decodeBindings(b []byte) ([]binding, error) {
	var f bindings
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return nil, err
	}
	if d.More() {
		return nil, errors.New("something follows the bindings")
	}
	digest, err := digestOf(f.Bindings)
	if err != nil {
		return nil, err
	}
	if digest != f.Digest {
		return nil, fmt.Errorf("its digest is %q, its content's is %q", f.Digest, digest)
	}
	return f.Bindings, nil
}

// bound returns the binding of this disk's entry; one whose At is zero is what the
// cloud says now, and is not kept yet. A disk that is named needs none.
func (d *Disk) bound(ctx context.Context, have observed) (*binding, error) {
	if d.want.DiskID != "" || d.want.Selector == (node.DiskSelector{}) {
		return nil, nil
	}
	kept, err := d.ledger.bindings()
	if err != nil {
		return nil, err
	}
	if b, ok := bindingOf(kept, d.want.MountPoint); ok {
		if b.Selector != d.want.Selector {
			return nil, node.Terminal("SelectorChanged", fmt.Sprintf("set disks[].diskID: %s in the NodeConfig, or that of another disk", b.DiskID),
				fmt.Errorf("%s was bound to %s on %s by the selector %s, and the NodeConfig now says %s", b.MountPoint, b.DiskID,
					b.At.Format("2006-01-02 15:04:05Z"), describeSelector(b.Selector), describeSelector(d.want.Selector)))
		}
		return &b, nil
	}
	fresh, err := d.resolve(ctx, kept, have)
	if err != nil {
		return nil, err
	}
	b, ok := bindingOf(fresh, d.want.MountPoint)
	if !ok {
		return nil, fmt.Errorf("resolve the selector of %s: the sealed configuration has no such entry", d.want.MountPoint)
	}
	return &b, nil
}

func bindingOf(all []binding, mountPoint string) (binding, bool) {
	i := slices.IndexFunc(all, func(b binding) bool { return b.MountPoint == mountPoint })
	if i < 0 {
		return binding{}, false
	}
	return all[i], true
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
	if _, ok := bindingOf(kept, d.want.MountPoint); ok {
		return nil
	}
	fresh, err := d.resolve(ctx, kept, have)
	if err != nil {
		return err
	}
	for _, b := range fresh {
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

// boundBy says in a word, and in a sentence, why this disk is meant and no other.
func (d *Disk) boundBy(have observed, id string) (word, text string) {
	switch b := have.Binding; {
	case d.want.DiskID != "" && d.want.Attach:
		return "diskID", "named by disks[].diskID, and attached by the agent"
	case d.want.DiskID != "":
		return "diskID", "named by disks[].diskID"
	case b != nil && b.At.IsZero():
		return "selector", fmt.Sprintf("by the selector %s: %s; not kept yet", describeSelector(b.Selector), b.Source)
	case b != nil:
		return "selector", fmt.Sprintf("by the selector %s, on %s: %s; kept for ever", describeSelector(b.Selector), b.At.Format("2006-01-02 15:04:05Z"), b.Source)
	case d.want.Selector != (node.DiskSelector{}):
		return "selector", fmt.Sprintf("by the selector %s, not resolved", describeSelector(d.want.Selector))
	case id == "":
		return "only disk", "the only data disk of the instance, not found yet"
	}
	return "only disk", "the only data disk of the instance when it was first used"
}
