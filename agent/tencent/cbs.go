package tencent

import (
	"context"
	"fmt"
)

// Disk is a CBS disk as the API describes it.
type Disk struct {
	ID             string   `json:"DiskId"`
	Usage          string   `json:"DiskUsage"` // SYSTEM_DISK or DATA_DISK
	State          string   `json:"DiskState"` // ATTACHED, UNATTACHED, ATTACHING, ...
	SizeGiB        int      `json:"DiskSize"`
	InstanceID     string   `json:"InstanceId"`
	LastInstanceID string   `json:"LastAttachInsId"` // the instance it was attached to last
	Encrypted      bool     `json:"Encrypt"`
	CreateTime     string   `json:"CreateTime"` // "2006-01-02 15:04:05"; the API does not say in which time zone
	Shareable      bool     `json:"Shareable"`
	InstanceIDs    []string `json:"InstanceIdList"` // of a shareable disk
}

// Instance is what the API knows of a CVM and metadata does not say.
type Instance struct {
	ID          string     `json:"InstanceId"`
	CreatedTime string     `json:"CreatedTime"` // RFC 3339, UTC
	DataDisks   []DataDisk `json:"DataDisks"`
}

// DataDisk is a data disk that a CVM was launched with.
type DataDisk struct {
	ID         string `json:"DiskId"`
	SizeGiB    int    `json:"DiskSize"`
	SnapshotID string `json:"SnapshotId"` // what it was made from; empty: from nothing
}

// DescribeDisks lists the disks that are attached to an instance, the system disk
// included. A CVM has at most 20 data disks, so one page holds them
// (https://cloud.tencent.com/document/product/362/5145).
func (c *Client) DescribeDisks(ctx context.Context, instanceID string) ([]Disk, error) {
	in := struct {
		Filters []filter
		Limit   int
	}{[]filter{{"instance-id", []string{instanceID}}}, 100}
	var out struct{ DiskSet []Disk }
	err := c.call(ctx, "cbs", "DescribeDisks", in, &out)
	return out.DiskSet, err
}

// DescribeInstance describes one CVM.
func (c *Client) DescribeInstance(ctx context.Context, instanceID string) (Instance, error) {
	in := struct{ InstanceIds []string }{[]string{instanceID}}
	var out struct{ InstanceSet []Instance }
	if err := c.call(ctx, "cvm", "DescribeInstances", in, &out); err != nil {
		return Instance{}, err
	}
	if len(out.InstanceSet) != 1 {
		return Instance{}, fmt.Errorf("cvm DescribeInstances: %d answers for %s", len(out.InstanceSet), instanceID)
	}
	return out.InstanceSet[0], nil
}
