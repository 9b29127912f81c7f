package disk

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

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

func bindingOf(all []binding, mountPoint string) (binding, bool) {
	i := slices.IndexFunc(all, func(b binding) bool { return b.MountPoint == mountPoint })
	if i < 0 {
		return binding{}, false
	}
	return all[i], true
}

// boundBy says in a word, and in a sentence, why this disk is meant and no other.
func (d *Disk) boundBy(have observed, id string) (word, text string) {
	switch b := have.Binding; {
	case len(d.want.DiskIDs) > 0 && d.want.Attach:
		return "diskIDs", "named by disks[].diskIDs, and attached by the agent"
	case len(d.want.DiskIDs) > 0:
		return "diskIDs", "named by disks[].diskIDs"
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
