package disk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

const (
	// cloudPatience bounds the question: the disk can be read instead, but that takes
	// minutes, so a call that fails for a moment is repeated.
	cloudPatience = 10 * time.Second
	cloudPause    = 500 * time.Millisecond
	// young is how old an instance may be for what came with it to be new. The clock
	// is right to five minutes, or the cloud would not have answered a signed request.
	young = time.Hour
)

// Cloud is the cloud API. AttachDisk and DetachDisk only begin, and DescribeDisk tells
// how it ends.
type Cloud interface {
	DescribeDisk(ctx context.Context, id string) (tencent.Disk, error)
	DescribeInstance(ctx context.Context, id string) (tencent.Instance, error)
	InstanceDisks(ctx context.Context, instance string) ([]tencent.Disk, error)
	AttachDisk(ctx context.Context, instance, id string) error
	DetachDisk(ctx context.Context, instance, id string) error
}

// Evidence is one thing that speaks for or against a disk's being blank.
type Evidence struct {
	Source string `json:"source"` // where it was read: "cbs DescribeDisks CreateTime"
	Text   string `json:"text"`
	Good   bool   `json:"good"` // it speaks for it
}

// origin asks the cloud whether dev is as new as the instance. It is only asked in
// the boot in which the first configuration was sealed, and for a disk that the
// ledger has never seen.
func (d *Disk) origin(ctx context.Context, dev device, past entry) []Evidence {
	var all []Evidence
	add := func(good bool, source, format string, args ...any) {
		all = append(all, Evidence{source, fmt.Sprintf(format, args...), good})
	}
	add(past.State == "", "ledger of disks", "seen before: %s", word(past.State))
	add(d.firstBoot && d.sealed.Generation == 1, "bootstrap's report", "generation %d, sealed in this boot: %v", d.sealed.Generation, d.firstBoot)
	if _, sound := unsound(all); !sound {
		return all
	}
	disk, in, err := d.describe(ctx, dev.Serial)
	if err != nil {
		add(false, "cloud API", "cannot be asked: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
		return all
	}
	return append(all, judge(dev, d.sealed.Facts, disk, in, time.Now())...)
}

// describe asks the cloud for a disk and the instance, both at once.
func (d *Disk) describe(ctx context.Context, id string) (disk tencent.Disk, in tencent.Instance, err error) {
	ctx, cancel := context.WithTimeout(ctx, cloudPatience)
	defer cancel()
	for {
		var err1, err2 error
		var wg sync.WaitGroup
		wg.Go(func() { disk, err1 = d.cloud.DescribeDisk(ctx, id) })
		wg.Go(func() { in, err2 = d.cloud.DescribeInstance(ctx, d.sealed.Facts.InstanceID) })
		wg.Wait()
		if now := errors.Join(err1, err2); now == nil || err == nil || ctx.Err() == nil {
			err = now // one that was cut off says nothing
		}
		if err == nil || node.ClassOf(err1) == node.ClassTerminal || node.ClassOf(err2) == node.ClassTerminal {
			return disk, in, err
		}
		select {
		case <-time.After(cloudPause):
		case <-ctx.Done():
			return disk, in, err
		}
	}
}

// judge holds what the cloud says against what is so of a disk that was created
// together with its instance and never used by another.
func judge(dev device, facts node.Facts, disk tencent.Disk, in tencent.Instance, now time.Time) []Evidence {
	var all []Evidence
	add := func(good bool, source, format string, args ...any) {
		all = append(all, Evidence{source, fmt.Sprintf(format, args...), good})
	}
	const disks, instances = "cbs DescribeDisks ", "cvm DescribeInstances "
	add(slices.Contains(facts.DataDisks, dev.Serial), "metadata volumes/", "at launch the instance had %s", list(facts.DataDisks))
	add(disk.State == tencent.DiskAttached && disk.InstanceID == in.ID && disk.ID == dev.Serial && disk.Usage == "DATA_DISK", disks+"DiskState, InstanceId, DiskUsage",
		"%s %s to %s", disk.Usage, disk.State, word(disk.InstanceID))
	add(disk.LastInstanceID == "" || disk.LastInstanceID == in.ID, disks+"LastAttachInsId", "last attached to %s", word(disk.LastInstanceID))
	add(!disk.Shareable && len(disk.InstanceIDs) == 0, disks+"Shareable, InstanceIdList", "shared: %v, with %s", disk.Shareable, list(disk.InstanceIDs))
	add(!disk.Rollbacking && !disk.Migrating, disks+"Rollbacking, Migrating", "rolled back: %v, migrated: %v", disk.Rollbacking, disk.Migrating)
	add(disk.Snapshots == 0, disks+"SnapshotCount", "%d snapshots were taken of it", disk.Snapshots)
	add(disk.SizeGiB<<30 == dev.SizeBytes, disks+"DiskSize", "%d GiB, and the device has %s", disk.SizeGiB, Size(dev.SizeBytes))

	i := slices.IndexFunc(in.DataDisks, func(d tencent.DataDisk) bool { return d.ID == dev.Serial })
	snapshot := ""
	if i >= 0 {
		snapshot = in.DataDisks[i].SnapshotID
	}
	add(i >= 0 && snapshot == "", instances+"DataDisks[].SnapshotId", "listed: %v, made from the snapshot %s", i >= 0, word(snapshot))
	add(in.LatestOperation == "" || in.LatestOperation == "RunInstances", instances+"LatestOperation", "%s", word(in.LatestOperation))
	began, err := in.Created()
	add(err == nil && now.Sub(began) <= young, instances+"CreatedTime", "%s, and it is %s now", word(in.CreatedTime), now.UTC().Format(time.RFC3339))
	created, err2 := disk.Created()
	// A time to come says that the zone is another than is thought.
	add(err == nil && err2 == nil && !created.Before(began) && created.Before(now.Add(5*time.Minute)), disks+"CreateTime", "%s UTC+8", word(disk.CreateTime))
	return all
}

// unsound returns the first piece of evidence that speaks against, if there is one.
func unsound(all []Evidence) (Evidence, bool) {
	i := slices.IndexFunc(all, func(e Evidence) bool { return !e.Good })
	if i < 0 {
		return Evidence{}, true
	}
	return all[i], false
}

func word(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

func list(s []string) string { return word(strings.Join(s, ", ")) }
