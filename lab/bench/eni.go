package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
)

// ENIPeer is what the network is compared with: the plugins that the CNI project
// itself keeps for a node whose pods are routed to.
const ENIPeer = "ptp+host-local"

// ENIOptions say what ENI works with.
type ENIOptions struct {
	Dir      string   // for ledgers and logs, on a disk
	Plugin   string   // the binary tke-eni
	Peer     string   // the directory with ptp and host-local
	Runs     int      // ADDs and DELs of each side at each number of pods
	Progress Progress `json:"-"`
}

// ENI measures the network of pods: the shipped plugin and the agent's network
// behind it, in a node that is a network namespace, against plugins that work
// without an agent, in another. Each stage has a process of its own, in network,
// mount and process namespaces of its own, with which all that it made ends.
func ENI(ctx context.Context, o ENIOptions) ([]Figure, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("pods are network namespaces, and only root makes those: run make bench-eni, which asks for it")
	}
	plugin, err := os.Stat(o.Plugin)
	if err != nil {
		return nil, fmt.Errorf("find plugin: %w; run: make build", err)
	}
	figures := []Figure{{Name: "eni.plugin.size", Unit: "MB", Ours: round(float64(plugin.Size()) / 1e6)}}
	for _, s := range eniStages {
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

// eniStage is a part of ENI that has a node of its own.
type eniStage struct {
	name string
	run  func(ctx context.Context, n *eniNode) error
}

var eniStages = []eniStage{
	{"ADD and DEL", measurePods},
	{"round trips", measureTrips},
	{"an empty pool", measureEmpty},
}

// ENINode is the command line of tkelab that a stage's process is started with;
// ENIStage runs it.
const ENINode = "bench-node"

// run runs a stage in a process of its own.
func (o ENIOptions) run(ctx context.Context, s eniStage) (figures []Figure, err error) {
	dir, err := os.MkdirTemp(o.Dir, "eni-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	o.Dir = dir
	return runStage(ctx, o.Progress, syscall.CLONE_NEWNET|syscall.CLONE_NEWNS|syscall.CLONE_NEWPID, ENINode, s.name, o)
}

// ENIStage is the process of one stage; out is its standard output.
func ENIStage(ctx context.Context, args []string, out io.Writer) error {
	if len(args) != 2 || os.Getpid() != 1 {
		return errors.New("it is started by bench eni, in namespaces of its own")
	}
	var o ENIOptions
	if err := json.Unmarshal([]byte(args[1]), &o); err != nil {
		return err
	}
	for _, s := range eniStages {
		if s.name == args[0] {
			n, err := newENINode(o, json.NewEncoder(out))
			if err != nil {
				return err
			}
			return errors.Join(s.run(ctx, n), n.close())
		}
	}
	return fmt.Errorf("no stage %q", args[0])
}
