package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/tkenode/tkenode/agent/node"
)

// DiskPeer is what formatting is compared with: what kubelet and the CSI drivers
// format and mount with.
const DiskPeer = "mount-utils SafeFormatAndMount"

// MaxDiskPairs is how many disks a CVM takes: each pair needs one that is new.
const MaxDiskPairs = 20

// DiskOptions say what Disk works with.
type DiskOptions struct {
	Dir      string   // for the files behind the disks, and ledgers
	Peer     string   // the program of lab/bench/mountutils
	Helper   string   // tke-disk
	Runs     int      // pairs
	Progress Progress `json:"-"`
}

// Disk measures how long it takes from a disk that is attached to one that is
// mounted: the agent's module, which proves the disk blank, against the peer, which
// asks blkid. A disk is a loop device with direct I/O on a sparse file, as it is, or
// held to what a disk of the cloud does in a second. Each stage has a process of its
// own, in mount and process namespaces of its own, with which all that it made ends.
func Disk(ctx context.Context, o DiskOptions) ([]Figure, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("only root makes loop devices and mounts: run make bench-disk, which asks for it")
	}
	if o.Runs > MaxDiskPairs {
		return nil, fmt.Errorf("%d pairs need as many new disks, and a CVM takes %d", o.Runs, MaxDiskPairs)
	}
	if _, err := os.Stat(o.Peer); err != nil {
		return nil, fmt.Errorf("find peer: %w; run: make bench-disk", err)
	}
	var figures []Figure
	for _, s := range diskStages {
		o.Progress.Begin(s.name)
		found, err := o.run(ctx, s)
		o.Progress.End(s.name, err)
		if err != nil {
			return nil, fmt.Errorf("measure %s: %w", s.name, err)
		}
		figures = append(figures, found...)
	}
	return figures, nil
}

// diskStage is a part of Disk that has a node of its own.
type diskStage struct {
	name string
	run  func(ctx context.Context, n *diskNode) error
}

var diskStages = []diskStage{
	{"ext4", func(ctx context.Context, n *diskNode) error { return n.measureFormat(ctx, node.Ext4, true) }},
	{"xfs", func(ctx context.Context, n *diskNode) error { return n.measureFormat(ctx, node.XFS, true) }},
	{"ext4 without limits", func(ctx context.Context, n *diskNode) error { return n.measureFormat(ctx, node.Ext4, false) }},
	{"xfs without limits", func(ctx context.Context, n *diskNode) error { return n.measureFormat(ctx, node.XFS, false) }},
	{"attach", measureAttach},
	{"read", measureRead},
}

// DiskNode is the command line of tkelab that a stage's process is started with;
// DiskStage runs it.
const DiskNode = "bench-disk-node"

// run runs a stage in a process of its own.
func (o DiskOptions) run(ctx context.Context, s diskStage) ([]Figure, error) {
	dir, err := os.MkdirTemp(o.Dir, "disk-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	o.Dir = dir
	return runStage(ctx, o.Progress, syscall.CLONE_NEWNS|syscall.CLONE_NEWPID, DiskNode, s.name, o)
}

// DiskStage is the process of one stage; out is its standard output.
func DiskStage(ctx context.Context, args []string, out io.Writer) error {
	if len(args) != 2 || os.Getpid() != 1 {
		return errors.New("it is started by bench disk, in namespaces of its own")
	}
	var o DiskOptions
	if err := json.Unmarshal([]byte(args[1]), &o); err != nil {
		return err
	}
	for _, s := range diskStages {
		if s.name == args[0] {
			n, err := newDiskNode(ctx, o, json.NewEncoder(out))
			if err != nil {
				return err
			}
			return errors.Join(s.run(ctx, n), n.close())
		}
	}
	return fmt.Errorf("no stage %q", args[0])
}
