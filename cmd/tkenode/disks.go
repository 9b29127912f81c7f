package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/disk"
)

var disksCommand = command{
	name: "disks",
	help: "the disks of the NodeConfig, and how each stands",
	long: `One line for every disk: its id, size, state, mount point, file system, and what it rested on that it was
blank when it was formatted. Under a disk that is not mounted is said why, and what to do.`,
	flags: func(fs *flag.FlagSet) action {
		format := output(fs)
		return func(ctx context.Context, out *terminal, _ []string) error {
			asJSON, err := isJSON(*format)
			if err != nil {
				return err
			}
			all, err := askDisks(ctx)
			if err != nil {
				return err
			}
			if asJSON {
				return out.json(all)
			}
			renderDisks(out, all)
			return nil
		}
	},
}

var explainDiskCommand = command{
	name: "explain disk",
	args: "DISK",
	help: "what a disk is, how it stands, and every piece of evidence",
	long: `Its identity and state, what the ledger says was done to it, the evidence by which it was or was not found
blank, each with where it was read, and the steps with their times. Evidence and steps are those since the
agent started. Nothing is looked at anew: that is what tkenode wake does.`,
	flags: func(fs *flag.FlagSet) action {
		format := output(fs)
		return func(ctx context.Context, out *terminal, args []string) error {
			asJSON, err := isJSON(*format)
			if err != nil {
				return err
			}
			if len(args) != 1 {
				return usagef("explain disk takes the id of a disk; tkenode disks lists them")
			}
			all, err := askDisks(ctx)
			if err != nil {
				return err
			}
			for _, s := range all {
				if !s.Has(args[0]) && args[0] != s.Name {
					continue
				}
				if asJSON {
					err = out.json(s)
				} else {
					renderDisk(out, s)
				}
				if err == nil && s.State != disk.Mounted {
					err = told{errUnmet}
				}
				return err
			}
			return fmt.Errorf("the NodeConfig has no disk %q; tkenode disks lists them", args[0])
		}
	},
}

var diskAdoptCommand = command{
	name: "disk adopt",
	args: "DISK",
	help: "mount the file system that a disk holds, although tkenode did not make it (root)",
	long: `The disk has to hold one file system, ext4 or xfs, and nothing else. Nothing is written to it but what mounting
writes. The decision is taken down in the ledger of disks with your user id, and is good once.`,
	flags: func(fs *flag.FlagSet) action { return decide(fs, "adopt") },
}

var diskFormatCommand = command{
	name: "disk format",
	args: "DISK",
	help: "make a file system over whatever a disk holds, which is lost (root)",
	long: `For a disk that tkenode refuses to format because it is not blank. Look first at what it holds: tkenode explain
disk. The decision is taken down in the ledger of disks with your user id; it is good once, for the disk with
exactly this serial and size. A disk that is mounted, held, swapped to or locked, or whose ends cannot be read, is not formatted.`,
	flags: func(fs *flag.FlagSet) action { return decide(fs, "format") },
}

// decide tells the agent what an operator has decided.
func decide(fs *flag.FlagSet, act string) action {
	checked := fs.String("i-have-checked", "", "the `serial` that the disk itself tells, as in /sys/block/*/serial")
	return func(ctx context.Context, out *terminal, args []string) error {
		if len(args) != 1 || *checked == "" {
			return usagef("disk %s wants the id of a disk, and --i-have-checked with the serial that you have found on it", act)
		}
		c := api.NewClient(api.Socket)
		defer c.Close()
		ctx, cancel := context.WithTimeout(ctx, explainDeadline)
		defer cancel()
		if err := c.Decide(ctx, disk.Order{Act: act, DiskID: args[0], Serial: *checked}); err != nil {
			return err
		}
		out.printf("taken down; the agent acts on it now: tkenode disks\n")
		return nil
	}
}

func askDisks(ctx context.Context) ([]disk.State, error) {
	c := api.NewClient(api.Socket)
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, askDeadline)
	defer cancel()
	return c.Disks(ctx)
}

// renderDisks prints a table, and under it what is in the way of each disk.
func renderDisks(t *terminal, all []disk.State) {
	if len(all) == 0 {
		t.printf("the NodeConfig lists no disks\n")
		return
	}
	rows := [][]string{{"DISK", "SIZE", "STATE", "MOUNT POINT", "FS", "PROOF"}}
	for _, s := range all {
		proof, _, _ := strings.Cut(s.Proof, ";")
		proof, _, _ = strings.Cut(proof, " (")
		if proof == "" && s.Ledger != nil {
			proof = "held a file system when it was found"
		}
		name := clean(cmp.Or(s.DiskID, s.Name))
		if n := len(s.Members); n > 1 {
			name += fmt.Sprintf(" +%d", n-1)
		}
		rows = append(rows, []string{name, cmp.Or(sizeOf(s), "-"), s.State, clean(s.MountPoint), string(s.FileSystem), cmp.Or(clean(proof), "-")})
	}
	width := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, cell := range r {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for n, r := range rows {
		line := ""
		for i, cell := range r[:len(r)-1] {
			cell = pad(cell, width[i]+2)
			if n > 0 && i == 2 {
				cell = t.paint(diskColor(r[2]), cell)
			}
			line += cell
		}
		line += r[len(r)-1]
		if n == 0 {
			line = t.paint(faint, line)
		}
		t.printf("%s\n", line)
		if n > 0 && all[n-1].Message != "" {
			t.block("  ", all[n-1].Message)
		}
	}
}

func sizeOf(s disk.State) string {
	if s.SizeBytes == 0 {
		return ""
	}
	return disk.Size(s.SizeBytes)
}

func diskColor(state string) string {
	switch state {
	case disk.Mounted:
		return green
	case disk.Planned, disk.Unknown, "Proving", "Absent", "Settling", "Busy":
		return yellow
	}
	return red
}

// renderDisk prints all that is known of one disk.
func renderDisk(t *terminal, s disk.State) {
	t.printf("%s\n", t.paint(bold+";"+diskColor(s.State), clean(cmp.Or(s.DiskID, s.Name))+": "+s.State))
	if s.Message != "" {
		t.block("  ", s.Message)
	}
	line := func(name, text string) {
		for i, l := range t.lines(text, 15) {
			if i > 0 {
				name = ""
			}
			if l != "" {
				t.printf("  %s%s\n", t.paint(faint, pad(name, 13)), l)
			}
		}
	}
	t.printf("\n")
	for i, m := range s.Members {
		where := "is not there"
		if m.Device != "" {
			where = fmt.Sprintf("is %s, %s", m.Device, disk.Size(m.SizeBytes))
		}
		line(fmt.Sprintf("disk %d", i), m.DiskID+" "+where)
	}
	for _, l := range s.Layers {
		line("layer", l)
	}
	switch {
	case s.Device != "" && len(s.Layers)+len(s.Members) > 0:
		line("device", s.Device+", "+disk.Size(s.SizeBytes))
	case s.Device != "":
		line("device", fmt.Sprintf("%s, %s; its live serial is %s", s.Device, disk.Size(s.SizeBytes), s.DiskID))
	}
	line("mount point", s.MountPoint)
	line("file system", strings.TrimSpace(string(s.FileSystem)+" "+s.UUID))
	if s.Ledger != nil {
		line("ledger", s.Ledger.State+" "+clock(s.Ledger.At, s.Now))
	}
	line("proof", s.Proof)
	if !s.Since.IsZero() {
		line("since", clock(s.Since, s.Now))
	}
	if len(s.Evidence) > 0 {
		t.printf("\nevidence that it is blank\n")
		width := 0
		for _, e := range s.Evidence {
			width = max(width, utf8.RuneCountInString(e.Source))
		}
		for _, e := range s.Evidence {
			mark, color := "ok", green
			if !e.Good {
				mark, color = "!!", red
			}
			t.printf("  %s  %s  %s\n", t.paint(color, mark), pad(clean(e.Source), width), clean(e.Text))
		}
	}
	if len(s.Steps) > 0 {
		t.printf("\nsteps\n")
		for _, step := range s.Steps {
			took := "under way for " + span(s.Now.Sub(step.Began))
			if !step.Ended.IsZero() {
				took = step.Ended.Sub(step.Began).Round(time.Millisecond).String()
			}
			t.printf("  %s  %s%s\n", clock(step.Began, s.Now), pad(step.Name, 8), took)
		}
	}
}
