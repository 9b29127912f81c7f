package main

import (
	"context"
	"errors"
	"flag"
	"time"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/node"
)

var statusCommand = command{
	name: "status",
	help: "how the node stands, and what to look at first",
	long: `The first line is the verdict: whether the node is Ready, and if it is not, the first
condition in the order of a launch that is not True, and since when. Then comes the evidence, where to
look, and a table of all conditions and instances.

With --watch the picture is drawn anew every second until it is interrupted; where the output is not a
terminal, only a verdict that differs from the last is printed.`,
	flags: func(fs *flag.FlagSet) action {
		format := output(fs)
		watch := fs.Bool("watch", false, "draw it anew every second")
		return func(ctx context.Context, out *terminal, _ []string) error {
			asJSON, err := isJSON(*format)
			if err != nil {
				return err
			}
			if *watch && asJSON {
				return usagef("status: --watch draws a picture and does not go with -o json")
			}
			c := api.NewClient(api.Socket)
			defer c.Close()
			if *watch {
				return watchStatus(ctx, out, c)
			}
			st, err := askStatus(ctx, c)
			if err != nil && asJSON {
				return err // for a script: the reason on standard error, and the exit code
			}
			if err != nil {
				return explainUnreachable(out, err, node.ReportFile, time.Now())
			}
			if asJSON {
				err = out.json(st)
			} else {
				renderStatus(out, st)
			}
			if err == nil && st.Unmet != nil {
				err = told{errUnmet}
			}
			return err
		}
	},
}

// askDeadline is how long an agent may take to tell what it has in memory.
const askDeadline = 10 * time.Second

func askStatus(ctx context.Context, c *api.Client) (api.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, askDeadline)
	defer cancel()
	return c.Status(ctx)
}

// watchStatus draws until ctx ends, which is how watching ends well.
func watchStatus(ctx context.Context, out *terminal, c *api.Client) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	said := ""
	for {
		st, err := askStatus(ctx, c)
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, api.ErrDenied) {
			return err
		}
		switch {
		case out.tty:
			out.printf("\x1b[H\x1b[2J") // home, clear
			if err == nil {
				renderStatus(out, st)
			} else if err = explainUnreachable(out, err, node.ReportFile, time.Now()); exitCode(err) != exitNoAgent {
				return err
			}
		default:
			line := "" // without the age, which always differs
			if err != nil {
				line = err.Error()
			} else {
				line = verdict(st, false)
			}
			if line != said {
				out.printf("%s %s\n", time.Now().UTC().Format(time.RFC3339), line)
				said = line
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
