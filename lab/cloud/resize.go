package cloud

import (
	"context"
	"encoding/json"
	"fmt"
)

// expanding is the state of a disk that is being made larger.
const expanding = "EXPANDING"

// volume is the end of the disk in a machine.
func (d Disk) volume() Volume {
	return Volume{Disk: d.ID, SizeGiB: d.SizeGiB, Content: d.Content, Encrypted: d.Encrypted}
}

type resizeDiskIn struct {
	DiskId   string
	DiskSize int
}

// resizeDisk makes a disk larger, attached or not. As with AttachDisks, the end of
// it is seen in what DescribeDisks says.
// Source: https://cloud.tencent.com/document/api/362/16310
func (r *Region) resizeDisk(id string, in *resizeDiskIn) (any, error) {
	disks, err := r.idleDisks([]string{in.DiskId})
	if err != nil {
		return nil, err
	}
	d := disks[0]
	switch {
	case in.DiskSize <= d.SizeGiB || in.DiskSize > 32000:
		return nil, refuse("InvalidParameterValue", "DiskSize %d is not larger than the disk's, %d, or larger than 32000", in.DiskSize, d.SizeGiB)
	case d.State != attached && d.State != unattached:
		return nil, refuse("InvalidDisk.Busy", "disk %s is %s", d.ID, d.State)
	}
	before := d
	d.State = expanding
	r.disks.put(d.ID, d)
	larger := before
	larger.SizeGiB = in.DiskSize
	r.begin(id, work{
		action: "ResizeDisk", target: []string{d.ID}, takes: r.config.Delays.Task,
		do: func(ctx context.Context) error { return r.hypervisor.ResizeDisk(ctx, d.Instance, larger.volume()) },
		done: func(err error) {
			if err != nil {
				larger = before
			}
			r.disks.put(d.ID, larger)
		},
	})
	return none{}, nil
}

type diskNumIn struct{ InstanceIds []string }

type attachDetail struct {
	InstanceId        string
	AttachedDiskCount int
	MaxAttachCount    int
}

func (r *Region) describeInstancesDiskNum(_ string, in *diskNumIn) (any, error) {
	at := r.visible()
	set := []attachDetail{}
	for _, id := range in.InstanceIds {
		if _, ok := r.instances.get(id); !ok {
			return nil, refuse("InvalidInstanceId.NotFound", "instance %q is not found", id)
		}
		n := 0
		for _, d := range r.disks.asOf(at) {
			if d.Instance == id && !d.System {
				n++
			}
		}
		set = append(set, attachDetail{id, n, maxDisks})
	}
	return struct{ AttachDetail []attachDetail }{set}, nil
}

// Act makes one call of the API as somebody does who may do anything: the console.
// The end of an asynchronous action is seen in Snapshot.
func (r *Region) Act(action string, in any) error {
	act, ok := actions[action]
	if !ok {
		return fmt.Errorf("there is no action %s", action)
	}
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encode %s: %w", action, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := act.do(r, newUUID(), body); err != nil {
		return fmt.Errorf("%s: %w", action, err)
	}
	return nil
}
