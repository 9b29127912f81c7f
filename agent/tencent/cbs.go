package tencent

import (
	"context"
	"fmt"
	"time"
)

// DiskAttached is the state of a disk that is attached, for good.
const DiskAttached = "ATTACHED"

// Disk is a CBS disk as the API describes it. What is null is empty.
type Disk struct {
	ID             string   `json:"DiskId"`
	Usage          string   `json:"DiskUsage"` // DATA_DISK or SYSTEM_DISK
	State          string   `json:"DiskState"`
	InstanceID     string   `json:"InstanceId"`
	InstanceIDs    []string `json:"InstanceIdList"` // of a shared disk only
	LastInstanceID string   `json:"LastAttachInsId"`
	SizeGiB        int64    `json:"DiskSize"`
	Shareable      bool     `json:"Shareable"`
	Encrypt        bool     `json:"Encrypt"`
	Rollbacking    bool     `json:"Rollbacking"`
	Migrating      bool     `json:"Migrating"`
	Snapshots      int      `json:"SnapshotCount"` // that were taken of it
	CreateTime     string   `json:"CreateTime"`
}

// Created returns when the disk was created. CBS writes the time of day without its
// zone, 2019-11-22 15:04:05, and names no zone anywhere: like the other APIs of this
// age it means Beijing's.
// Source of the form: https://cloud.tencent.com/document/api/362/16315
func (d Disk) Created() (time.Time, error) {
	return time.ParseInLocation(time.DateTime, d.CreateTime, time.FixedZone("UTC+8", 8*60*60))
}

// Instance is a CVM as the API describes it.
type Instance struct {
	ID              string     `json:"InstanceId"`
	CreatedTime     string     `json:"CreatedTime"`
	LatestOperation string     `json:"LatestOperation"` // ResetInstance; empty: not known, or none
	DataDisks       []DataDisk `json:"DataDisks"`
}

// DataDisk is a data disk as an instance has it.
type DataDisk struct {
	ID         string `json:"DiskId"`
	SnapshotID string `json:"SnapshotId"` // that it was made from; empty: none
}

// Created returns when the instance was created: ISO 8601 in UTC,
// 2020-03-10T02:43:51Z.
// Source: https://cloud.tencent.com/document/api/213/15753#Instance
func (i Instance) Created() (time.Time, error) { return time.Parse(time.RFC3339, i.CreatedTime) }

// DescribeDisk describes one disk.
func (c *Client) DescribeDisk(ctx context.Context, id string) (Disk, error) {
	in := struct{ DiskIds []string }{[]string{id}}
	var out struct{ DiskSet []Disk }
	if err := c.call(ctx, "cbs", "DescribeDisks", in, &out); err != nil {
		return Disk{}, err
	}
	if len(out.DiskSet) != 1 || out.DiskSet[0].ID != id {
		return Disk{}, fmt.Errorf("cbs DescribeDisks: %d disks for %s", len(out.DiskSet), id)
	}
	return out.DiskSet[0], nil
}

// DiskCount is how many data disks an instance has, and may have.
type DiskCount struct {
	InstanceID string `json:"InstanceId"`
	Attached   int    `json:"AttachedDiskCount"`
	Max        int    `json:"MaxAttachCount"`
}

// CountDisks asks how many data disks an instance may have. The system disk is
// none of them.
// Source: https://cloud.tencent.com/document/api/362/15669#AttachDetail
func (c *Client) CountDisks(ctx context.Context, instance string) (DiskCount, error) {
	in := struct{ InstanceIds []string }{[]string{instance}}
	var out struct{ AttachDetail []DiskCount }
	if err := c.call(ctx, "cbs", "DescribeInstancesDiskNum", in, &out); err != nil {
		return DiskCount{}, err
	}
	if len(out.AttachDetail) != 1 || out.AttachDetail[0].InstanceID != instance || out.AttachDetail[0].Max <= 0 {
		return DiskCount{}, fmt.Errorf("cbs DescribeInstancesDiskNum: %+v for %s", out.AttachDetail, instance)
	}
	return out.AttachDetail[0], nil
}

// DescribeInstance describes one instance.
func (c *Client) DescribeInstance(ctx context.Context, id string) (Instance, error) {
	in := struct{ InstanceIds []string }{[]string{id}}
	var out struct{ InstanceSet []Instance }
	if err := c.call(ctx, "cvm", "DescribeInstances", in, &out); err != nil {
		return Instance{}, err
	}
	if len(out.InstanceSet) != 1 || out.InstanceSet[0].ID != id {
		return Instance{}, fmt.Errorf("cvm DescribeInstances: %d instances for %s", len(out.InstanceSet), id)
	}
	return out.InstanceSet[0], nil
}
