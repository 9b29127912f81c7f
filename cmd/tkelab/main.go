// Command tkelab runs a Tencent Cloud region on this machine: it builds what the
// region needs, starts it in the background, launches CVMs in it and shows them
// become nodes.
//
// What the region does is in package lab; here is what a person types and sees.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/tkenode/tkenode/images"
	"github.com/tkenode/tkenode/lab/bench"
)

// command is one row of the table that `tkelab help` is printed from.
type command struct {
	name string
	args string
	help string // empty: not for people
	run  func(ctx context.Context, args []string) error
}

func commands() []command {
	return []command{
		{"demo", "", "build everything, start a region, launch a node, run a pod on it", demo},
		{"build", "", "build the components and the node image", func(ctx context.Context, _ []string) error { return build(ctx) }},
		{"up", "", "start a region without any CVM", up},
		{"launch", "[FILE]", "launch a CVM with the user-data in FILE, or as a node of the lab's cluster", launch},
		{"list", "", "list the CVMs", list},
		{"terminate", "ID", "end a CVM and its disks", terminate},
		{"ssh", "[ID] [COMMAND]", "log in to a CVM (default: the newest), or run a command on it", sshTo},
		{"console", "[ID]", "show the serial console of a CVM", console},
		{"kubectl", "ARGS…", "kubectl as the cluster's administrator", kubectl},
		{"down", "", "stop the region; nothing is left behind", down},
		{"bench", "boot|eni|disk [-n PAIRS]", "measure power-on to Ready, the network of pods, or new disks, against what others have", benchmark},
		{bench.ENINode, "", "", benchNode},
		{bench.DiskNode, "", "", benchDiskNode},
		{"connect", "ADDR", "", connect},
		{"serve", "", "", serve},
	}
}

// Exit codes.
const (
	exitError     = 1
	exitUsage     = 2
	exitInterrupt = 130 // as shells have it for SIGINT
)

// errUsage is a wrong command line.
var errUsage = errors.New("usage")

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if len(args) == 0 || args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		usage(os.Stdout)
		return 0
	}
	for _, c := range commands() {
		if c.name != args[0] {
			continue
		}
		if len(args) == 2 && (args[1] == "-h" || args[1] == "--help") {
			fmt.Printf("tkelab %s %s\n\n  %s\n", c.name, c.args, c.help)
			return 0
		}
		err := c.run(ctx, args[1:])
		switch {
		case err == nil:
			return 0
		case errors.Is(err, errUsage):
			fmt.Fprintf(os.Stderr, "tkelab: %v\nusage: tkelab %s %s\n", err, c.name, c.args)
			return exitUsage
		case ctx.Err() != nil:
			fmt.Fprintln(os.Stderr, "tkelab: interrupted")
			return exitInterrupt
		}
		fmt.Fprintln(os.Stderr, "tkelab:", err)
		return exitError
	}
	fmt.Fprintf(os.Stderr, "tkelab: no command %q; tkelab help lists them\n", args[0])
	return exitUsage
}

func usage(w io.Writer) {
	fmt.Fprintln(w, "tkelab runs a Tencent Cloud region on this machine.")
	fmt.Fprintln(w)
	for _, c := range commands() {
		if c.help != "" {
			fmt.Fprintf(w, "  tkelab %-27s %s\n", c.name+" "+c.args, c.help)
		}
	}
	fmt.Fprintf(w, "\nEverything lives in %s ($TKENODE_CACHE).\n", cacheDir())
}

// cacheDir is where components, images and the running lab are kept.
func cacheDir() string {
	d, err := images.CacheDir()
	if err != nil {
		return filepath.Join(os.TempDir(), "tkenode")
	}
	return d
}

func labDir() string  { return filepath.Join(cacheDir(), "lab") }
func socket() string  { return filepath.Join(labDir(), "tkelab.sock") }
func binDir() string  { return filepath.Join(cacheDir(), "components", "bin") }
func logFile() string { return filepath.Join(labDir(), "tkelab.log") }
