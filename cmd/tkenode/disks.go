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
	help: "the disks of the NodeConfig, how each stands, and the others that are attached",
	long: `One line for every disk: its id, why it is this one, size, state, mount point, file system, and what it rested on
that it was blank when it was formatted. Under a disk that is not mounted, is ill, or of which not all is used, is said
why, and what to do. Below are the CBS disks that are attached and not of the NodeConfig, which are watched and never
touched: CSI's with the volume that they are mounted for, and a warning if that is another one; and how many more volumes
the CSI driver may attach. As JSON, the disks of the NodeConfig alone; the others are on the socket, GET /v1/volumes.`,
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
			v, err := askVolumes(ctx)
			if err != nil {
				return err
			}
			renderVolumes(out, v)
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
				if err == nil && (s.State != disk.Mounted || len(s.Health) > 0) {
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
	long: `The disk has to hold one file system, ext3, ext4 or xfs, and nothing else. Nothing is written to it but what mounting
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

func askVolumes(ctx context.Context) (api.Volumes, error) {
	c := api.NewClient(api.Socket)
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, askDeadline)
	defer cancel()
	return c.Volumes(ctx)
}

// renderDisks prints a table, and under it what is in the way of each disk.
func renderDisks(t *terminal, all []disk.State) {
	if len(all) == 0 {
		t.printf("the NodeConfig lists no disks\n")
		return
	}
	rows := [][]string{{"DISK", "BOUND BY", "SIZE", "STATE", "MOUNT POINT", "FS", "PROOF"}}
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
		rows = append(rows, []string{name, cmp.Or(s.BoundBy, "-"), cmp.Or(sizeOf(s), "-"), s.State, clean(s.MountPoint), string(s.FileSystem), cmp.Or(clean(proof), "-")})
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
			if n > 0 && i == 3 {
				cell = t.paint(diskColor(r[3]), cell)
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
		if n > 0 {
			renderHealth(t, all[n-1])
		}
	}
}

// renderHealth prints what is wrong with a disk that is mounted.
func renderHealth(t *terminal, s disk.State) {
	for _, c := range s.Health {
		t.block("  ", fmt.Sprintf("%s since %s (%s): %s", c.Type, clock(c.Since, s.Now), span(s.Now.Sub(c.Since)), c.Message))
	}
	for _, w := range s.Warnings {
		t.block("  ", w.Reason+": "+w.Message)
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
	case disk.Planned, disk.Unknown, "Proving", "Absent", "Settling", "Busy", "Attaching", "Detaching", "DiskBusy", "Unsettled":
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
	renderHealth(t, s)
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
	line("bound", s.Binding)
	line("mount point", s.MountPoint)
	line("file system", strings.TrimSpace(string(s.FileSystem)+" "+s.UUID))
	if s.Ledger != nil {
		line("ledger", s.Ledger.State+" "+clock(s.Ledger.At, s.Now))
	}
	line("proof", s.Proof)
	if !s.Since.IsZero() {
		line("since", clock(s.Since, s.Now))
	}
	if s.Trim != nil {
		line("trim", trimText(*s.Trim, s.Now))
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

// trimText says when a disk was trimmed, and when it will be.
func trimText(tr disk.TrimState, now time.Time) string {
	next := "next " + clock(tr.Next, now)
	if !tr.Since.IsZero() {
		next = "under way for " + span(now.Sub(tr.Since))
	}
	switch {
	case tr.Never != "":
		return "never: " + tr.Never
	case tr.Last.At.IsZero():
		return "not yet; " + next
	case tr.Last.Error != "":
		return fmt.Sprintf("failed %s: %s; %s", clock(tr.Last.At, now), tr.Last.Error, next)
	}
	return fmt.Sprintf("%s in %s, %s; %s", disk.Size(tr.Last.Bytes), tr.Last.Took.Round(time.Millisecond), clock(tr.Last.At, now), next)
}

// renderVolumes prints the disks that are attached and not of the NodeConfig, and
// how many more may be.
func renderVolumes(t *terminal, v api.Volumes) {
	if len(v.Others) > 0 {
		t.printf("\n%s\n", t.paint(faint, "attached, and not of the NodeConfig"))
	}
	for _, o := range v.Others {
		what, color := "nobody has it mounted", ""
		switch {
		case o.CSI:
			what = fmt.Sprintf("CSI's, in %d pods", o.Pods)
			if o.Pods == 1 {
				what = "CSI's, in 1 pod"
			}
			if o.Volume == "" {
				what += "; of which volume is not known"
			} else if o.Mismatch == "" {
				what += "; it is the right disk"
			}
		case o.Mount != "":
			what = "mounted on " + o.Mount
		}
		if o.Mismatch != "" {
			color = red
		}
		t.printf("%s  %s  %s  %s\n", t.paint(color, clean(o.DiskID)), pad(disk.Size(o.SizeBytes), 8), o.Device, clean(what))
		if o.Mismatch != "" {
			t.block("  ", o.Mismatch)
		}
	}
	l := v.Limit
	if l.At.IsZero() {
		return
	}
	var text string
	switch {
	case l.Message == "":
		text = fmt.Sprintf("volumes: the CBS CSI driver may attach %d, and has published %d; not its own of the %d disks that the instance takes: %s",
			l.Published, l.Driver, l.Max, cmp.Or(strings.Join(l.NotCSI, ", "), "none"))
	case l.Driver > 0:
		text = fmt.Sprintf("volumes: the CBS CSI driver may attach %d: %s", l.Published, l.Message)
	default:
		text = "volumes: " + l.Message
	}
	t.printf("\n")
	t.block("", text)
}
