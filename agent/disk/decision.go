package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// What an operator may decide of a disk.
const (
	actAdopt  = "adopt"  // mount the one file system that it holds
	actFormat = "format" // make a file system over whatever it holds
)

// Order is what an operator asks for, and who asks.
type Order struct {
	Act    string `json:"act"`    // adopt or format
	DiskID string `json:"diskID"` // that the disk is wanted as
	Serial string `json:"serial"` // that the operator has found on the disk
	UID    uint32 `json:"-"`
	PID    int32  `json:"-"`
}

// decision is an Order in the ledger. It is good for one disk of one size, once.
type decision struct {
	Act       string    `json:"act"`
	DiskID    string    `json:"diskID"`
	SizeBytes int64     `json:"sizeBytes"`
	UID       uint32    `json:"uid"`
	PID       int32     `json:"pid"`
	At        time.Time `json:"at"`
	Used      time.Time `json:"used,omitzero"`
}

func (c *decision) is(act string, dev device) bool {
	return c.Act == act && c.DiskID == dev.Serial && c.SizeBytes == dev.SizeBytes && c.Used.IsZero()
}

func (c *decision) String() string {
	return fmt.Sprintf("user id %d (pid %d) decided at %s", c.UID, c.PID, c.At.Format("2006-01-02 15:04:05Z"))
}

// command is what an operator types to decide.
func command(act string, dev device) string {
	return fmt.Sprintf("tkenode disk %s %s --i-have-checked %s", act, dev.Serial, dev.Serial)
}

// decision returns what is decided of a disk, or nil. One that cannot be read
// decides nothing.
func (l ledger) decision(id string) *decision {
	b, err := os.ReadFile(filepath.Join(string(l), id+".decision"))
	if err != nil {
		return nil
	}
	c := &decision{}
	r := json.NewDecoder(bytes.NewReader(b))
	r.DisallowUnknownFields()
	if r.Decode(c) != nil || r.More() || c.DiskID != id {
		return nil
	}
	return c
}

// use notes that a decision has been carried out.
func (l ledger) use(c *decision) error {
	used := *c
	used.Used = time.Now().UTC().Truncate(time.Second)
	return l.store(c.DiskID+".decision", used)
}

// ErrRefused is wrapped by what Decide says of an order that cannot be carried out.
var ErrRefused = errors.New("refused")

// Decide takes an operator's decision down in the ledger; the next plan acts on it.
func (d *Disk) Decide(ctx context.Context, o Order) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("%s %s: %w: %w", o.Act, o.DiskID, ErrRefused, fmt.Errorf(format, args...))
	}
	d.drop() // what it would find is known to the operator
	have, err := d.observe(ctx, true)
	if err != nil {
		return err
	}
	at, err := raise(d.want, have)
	dev, found := at.target(o.DiskID, have)
	switch m, mounted := have.at(d.want.MountPoint); {
	case err != nil:
		return refuse("%w", err)
	case o.DiskID != dev.Serial || o.Serial != dev.Serial:
		return refuse("the disk is %s, and you have checked %q", dev, o.Serial)
	case mounted:
		return refuse("%s is mounted on %s", m.Source, m.Target)
	case have.ledgerErr != nil:
		return refuse("%w", have.ledgerErr)
	}
	if err := at.unused(have); err != nil {
		return refuse("%w", err)
	}
	switch c := found; {
	case at.stale != nil:
		return refuse("/dev/%s is yet to be stopped", at.stale.Name)
	case c.Busy:
		return refuse("%s is locked by another program", dev)
	case o.Act == actAdopt && (!adoptable(c) || len(dev.Partitions) > 0):
		return refuse("%s does not hold one file system, ext3, ext4 or xfs, alone and undamaged, but %s", dev, c)
	case o.Act == actAdopt && c.Signatures[0] != string(d.want.FileSystem) && d.want.WhenNotBlank != node.MountFound:
		return refuse("%s holds %s, the NodeConfig asks for %s: set fileSystem or whenNotBlank in it", dev, c, d.want.FileSystem)
	case o.Act != actAdopt && o.Act != actFormat:
		return refuse("it is neither %s nor %s", actAdopt, actFormat)
	}
	c := decision{Act: o.Act, DiskID: dev.Serial, SizeBytes: dev.SizeBytes, UID: o.UID, PID: o.PID, At: time.Now().UTC().Truncate(time.Second)}
	if err := d.ledger.store(c.DiskID+".decision", c); err != nil {
		return err
	}
	d.log.Warn("an operator has decided", "act", c.Act, "disk", dev.String(), "uid", c.UID, "pid", c.PID, "found", found.String())
	return nil
}
