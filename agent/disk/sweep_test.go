//go:build sweep

package disk

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"
)

var peer = flag.String("peer", "", "the program of lab/bench/mountutils")

// TestSweep makes every single read of every content fail, for us and for
// k8s.io/mount-utils, and prints who would have formatted what.
func TestSweep(t *testing.T) {
	began := time.Now()
	dir := t.TempDir()
	contents := append(basicContents(), toolContents()...)
	paths := make([]string, len(contents))
	for i, c := range contents {
		paths[i] = c.make(t, dir)
	}
	theirs := make(chan []peerResult, 1)
	go func() { theirs <- sweepPeer(t, paths) }()

	type ours struct {
		clean                 bool
		reads, tries, permits int64
	}
	results := make([]ours, len(contents))
	for i, c := range contents {
		r := &results[i]
		r.clean, r.reads, r.tries, r.permits = sweepFaults(load(t, paths[i]), 1)
		fmt.Fprintf(os.Stderr, "%3d of %d  %s: %d faults, %s\n", i+1, len(contents), c.name, r.tries, time.Since(began).Round(time.Second))
	}
	them := <-theirs

	fmt.Printf("%-28s | %s | %s\n", "", "tkenode                         ", "mount-utils, SafeFormatAndMount")
	fmt.Printf("%-28s | %-8s %6s %8s %7s | %-8s %6s %7s\n", "content", "no fault", "reads", "faults", "permits", "no fault", "reads", "mkfs")
	var total ours
	var onData, mkfs, mkfsReads int
	for i, c := range contents {
		r, p := results[i], them[i]
		fmt.Printf("%-28s | %-8s %6d %8d %7d | %-8s %6d %7d\n", c.name, verdict(r.clean), r.reads, r.tries, r.permits, verdict(p.Clean), p.Reads, p.Mkfs)
		blank := c.name == "blank"
		if r.clean != blank || r.permits > 0 {
			t.Errorf("%s: formatted without a fault: %v, %d permits with one", c.name, r.clean, r.permits)
		}
		total.tries += r.tries
		total.permits += r.permits
		if !blank {
			mkfs, mkfsReads = mkfs+p.Mkfs, mkfsReads+p.Reads
			if p.Clean {
				onData++
			}
		}
	}
	fmt.Printf("\n%d contents. tkenode: %d permits in %d faults. mount-utils: mkfs on data in %d of %d faults, and of %d contents with none; %s.\n",
		len(contents), total.permits, total.tries, mkfs, mkfsReads, onData, time.Since(began).Round(time.Second))
}

func verdict(formatted bool) string {
	if formatted {
		return "format"
	}
	return "refuse"
}

// peerResult is a line of the peer's output.
type peerResult struct {
	Image string
	Reads int
	Clean bool
	Mkfs  int
}

// sweepPeer has two of the peer's programs look at the images.
func sweepPeer(t *testing.T, paths []string) []peerResult {
	all := make([]peerResult, len(paths))
	var wg sync.WaitGroup
	for half := range 2 {
		wg.Go(func() {
			var mine []int
			var args []string
			for i := half; i < len(paths); i += 2 {
				mine, args = append(mine, i), append(args, paths[i])
			}
			cmd := exec.CommandContext(t.Context(), *peer, args...)
			out, err := cmd.StdoutPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				t.Errorf("run the peer: %v", err)
				return
			}
			lines := bufio.NewScanner(out)
			for n := 0; lines.Scan() && n < len(mine); n++ {
				if err := json.Unmarshal(lines.Bytes(), &all[mine[n]]); err != nil {
					t.Errorf("read the peer's results: %v", err)
				}
			}
			if err := cmd.Wait(); err != nil {
				t.Errorf("the peer: %v", err)
			}
		})
	}
	wg.Wait()
	return all
}

// toolContents are those of tools that packaging/debian-packages-sweep lists.
func toolContents() []diskContent {
	const size = 128 * mib
	sfdisk := func(name, in string) diskContent {
		return diskContent{name: name, size: size, tool: []string{"sfdisk", "-q"}, in: in}
	}
	return []diskContent{
		{name: "btrfs", size: size, tool: []string{"mkfs.btrfs", "-q"}},
		{name: "LUKS2", size: size, in: "secret", tool: []string{"cryptsetup", "-q", "luksFormat", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-"}},
		{name: "NTFS", size: size, tool: []string{"mkntfs", "-q", "-F", "-f"}},
		{name: "vfat", size: size, tool: []string{"mkfs.vfat", "-F", "32"}},
		{name: "exFAT", size: size, tool: []string{"mkfs.exfat"}},
		{name: "f2fs", size: size, tool: []string{"mkfs.f2fs", "-q"}},
		{name: "iso9660", size: size, tool: []string{"genisoimage", "-quiet", "-graft-points", "-o", "", "hosts=/etc/hosts"}},
		sfdisk("GPT", "label: gpt\n"),
		sfdisk("GPT, two partitions", "label: gpt\n,60M\n,\n"),
		sfdisk("MBR", "label: dos\n"),
		sfdisk("MBR, two partitions", "label: dos\n,60M\n,\n"),
	}
}
