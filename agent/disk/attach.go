package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// attachGrace is how long the cloud may go on saying that a disk is not attached
// after it has been asked to attach it, or the other way round: what it describes
// lags behind what is so, by some seconds. After that the attempt has failed.
const attachGrace = 30 * time.Second

// attachment is a disk that is not here and that the agent may attach.
type attachment struct {
	Disk     tencent.Disk `json:"disk"` // as the cloud describes it
	Instance string       `json:"instance"`
	Zone     string       `json:"zone"`
	Recent   bool         `json:"recent,omitempty"` // it was asked for within attachGrace
}

// attached is the note that this agent asks, or has asked, for a disk to be attached.
// It is written before that, and it is what makes the disk the agent's to detach.
type attached struct {
	DiskID     string    `json:"diskID"`
	InstanceID string    `json:"instanceID"`
	MountPoint string    `json:"mountPoint"`
	At         time.Time `json:"at"`
	Detaching  time.Time `json:"detaching,omitzero"` // when it was asked to detach it
}

// recent reports whether something was asked for within attachGrace.
func recent(at time.Time) bool {
	age := time.Since(at)
	return age >= 0 && age < attachGrace
}

const attachedSuffix = ".attached"

func (l ledger) attached(id string) (attached, error) {
	var a attached
	b, err := os.ReadFile(filepath.Join(string(l), id+attachedSuffix))
	if err != nil {
		return a, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&a); err != nil {
		return attached{}, err
	}
	if d.More() || a.DiskID != id || a.InstanceID == "" || a.MountPoint == "" {
		return attached{}, errors.New("it is incomplete, or about another disk")
	}
	return a, nil
}

// forget removes the note that a disk was attached by this agent.
func (l ledger) forget(id string) error {
	err := os.Remove(filepath.Join(string(l), id+attachedSuffix))
	if err == nil {
		err = syncDir(string(l))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write disk ledger: %w", err)
	}
	return nil
}

// attachable asks the cloud of a disk that is not here.
func (d *Disk) attachable(ctx context.Context, id string) (*attachment, error) {
	ctx, cancel := context.WithTimeout(ctx, cloudPatience)
	defer cancel()
	disk, err := d.cloud.DescribeDisk(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("look where %s is attached: %w", id, err)
	}
	f := d.sealed.Facts
	a := &attachment{Disk: disk, Instance: f.InstanceID, Zone: f.Zone}
	if note, err := d.ledger.attached(id); err == nil && note.InstanceID == f.InstanceID {
		a.Recent = recent(note.At)
	}
	return a, nil
}

// attaching decides what becomes of a disk that is not here. It is never taken from
// another instance.
func attaching(want node.DiskConfig, a attachment) ([]step, error) {
	d := a.Disk
	here := d.InstanceID == a.Instance
	waiting := func(reason, text string) error {
		if d.ErrorPrompt != "" {
			text += " (of the latest operation it says: " + d.ErrorPrompt + ")"
		}
		return node.Waiting(reason, "%s %s", d.ID, text)
	}
	switch {
	case d.Usage == tencent.DiskSystem:
		return nil, node.Terminal("NotADataDisk", "name a data disk in the NodeConfig", fmt.Errorf("%s is a system disk", d.ID))
	case d.Shareable:
		return nil, node.Terminal("DiskShared", "name a disk in the NodeConfig that only one instance can have", fmt.Errorf("%s can be attached to several instances, which would destroy its file system", d.ID))
	case d.InstanceID != "" && !here && d.State != tencent.DiskDetaching:
		return nil, node.Terminal("AttachedElsewhere", "detach it there once nobody uses it, or name another disk; tkenode takes no disk from another instance",
			fmt.Errorf("%s is attached to %s (%s)", d.ID, d.InstanceID, d.State))
	case d.State == tencent.DiskToRecycle:
		return nil, node.Terminal("DiskExpired", "renew the disk in the console, or name another in the NodeConfig", fmt.Errorf("%s has expired and waits to be recycled", d.ID))
	case d.State == tencent.DiskAttached:
		return nil, waiting("Attaching", "is attached, says the cloud, and has not appeared yet")
	case d.State == tencent.DiskAttaching:
		return nil, waiting("Attaching", "is being attached")
	case d.State == tencent.DiskDetaching:
		return nil, waiting("Detaching", "is being detached from "+d.InstanceID+"; it is attached after that")
	case d.State != tencent.DiskUnattached:
		return nil, waiting("DiskBusy", "is "+d.State+"; it is attached after that")
	case d.Rollbacking:
		return nil, waiting("DiskBusy", "is being rolled back to a snapshot; it is attached after that")
	case d.Migrating:
		return nil, waiting("DiskBusy", "is being migrated to another type; it is attached after that")
	case !d.Portable:
		return nil, node.Terminal("DiskNotPortable", "name an elastic disk in the NodeConfig", fmt.Errorf("%s is not elastic, so it can be attached to no other instance", d.ID))
	case d.Placement.Zone != a.Zone:
		return nil, node.Terminal("DiskZoneMismatch", "name a disk of the instance's zone, or make one there of a snapshot", fmt.Errorf("%s is in %s, the instance in %s", d.ID, word(d.Placement.Zone), a.Zone))
	case a.Recent:
		return nil, waiting("Attaching", "was asked for, and the cloud has not begun to attach it")
	}
	return []step{{verb: join, text: fmt.Sprintf("attach %s to %s for %s", d.ID, a.Instance, want.MountPoint)}}, nil
}

// join notes that a disk is this agent's to detach, and begins to attach it.
func (d *Disk) join(ctx context.Context, id string) error {
	instance := d.sealed.Facts.InstanceID
	_, before := d.ledger.attached(id)
	note := attached{DiskID: id, InstanceID: instance, MountPoint: d.want.MountPoint, At: time.Now().UTC().Truncate(time.Second)}
	if err := d.ledger.store(id+attachedSuffix, note); err != nil {
		return err
	}
	d.log.Info("attaching", "disk", id, "instance", instance)
	defer d.account.begin("attach")()
	err := d.cloud.AttachDisk(ctx, instance, id)
	if refused, ok := errors.AsType[*tencent.APIError](err); ok && refused.Class() != node.ClassTransient && before != nil {
		// Nothing was begun: should somebody else attach it now, it is not ours.
		err = errors.Join(err, d.ledger.forget(id))
	}
	if err != nil {
		return fmt.Errorf("attach %s: %w", id, err)
	}
	return nil
}
