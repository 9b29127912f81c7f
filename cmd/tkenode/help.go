package main

import (
	"context"
	"flag"
	"io"
	"strings"
)

// helpCommand is a function because it is in the table that it prints.
func helpCommand() command {
	return command{
		name: "help",
		args: "[COMMAND]",
		help: "what there is, or what a command does",
		flags: func(*flag.FlagSet) action {
			return func(_ context.Context, out *terminal, args []string) error {
				if len(args) == 0 {
					writeOverview(out)
					return nil
				}
				c, _, err := find(args)
				if err != nil {
					return err
				}
				writeHelp(out, c)
				return nil
			}
		},
	}
}

func writeOverview(t *terminal) {
	t.printf("tkenode makes a CVM a TKE node and keeps it one.\n\n")
	for _, c := range commands() {
		t.printf("  tkenode %s %s\n", t.paint(bold, pad(strings.TrimSpace(c.name+" "+c.args), 20)), c.help)
	}
	t.printf("\nexit status:\n")
	for _, e := range exitCodes {
		t.printf("  %d  %s\n", e.code, e.help)
	}
	t.printf("\nMore: tkenode help COMMAND, man tkenode.\n")
}

func writeHelp(t *terminal, c command) {
	fs := flags(c)
	t.printf("usage: %s\n\n%s\n", synopsis(c), strings.ToUpper(c.help[:1])+c.help[1:]+".")
	if c.long != "" {
		for p := range strings.SplitSeq(c.long, "\n\n") {
			t.printf("\n")
			for _, l := range wrap(p, t.width) {
				t.printf("%s\n", l)
			}
		}
	}
	first := true
	fs.VisitAll(func(f *flag.Flag) {
		if first {
			t.printf("\n")
			first = false
		}
		arg, usage := flag.UnquoteUsage(f)
		t.printf("  %s %s\n", pad(strings.TrimSpace(dashes(f)+" "+arg), 14), usage)
	})
}

// flags returns the flags of a command.
func flags(c command) *flag.FlagSet {
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	c.flags(fs)
	return fs
}

// synopsis is the command line of a command.
func synopsis(c command) string {
	parts := []string{"tkenode", c.name}
	flags(c).VisitAll(func(f *flag.Flag) {
		arg, _ := flag.UnquoteUsage(f)
		parts = append(parts, "["+strings.TrimSpace(dashes(f)+" "+arg)+"]")
	})
	if c.args != "" {
		parts = append(parts, c.args)
	}
	return strings.Join(parts, " ")
}

// dashes writes a flag as the manual does: one dash before a letter, two before a word.
func dashes(f *flag.Flag) string {
	if len(f.Name) == 1 {
		return "-" + f.Name
	}
	return "--" + f.Name
}
