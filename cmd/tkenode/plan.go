package main

import (
	"context"
	"flag"
	"strings"

	"github.com/tkenode/tkenode/agent/api"
)

var planCommand = command{
	name: "plan",
	help: "what the agent would change now",
	long: `Every instance is planned anew, which takes as long as looking takes, and nothing is applied. An
empty plan means that the node is as it is wanted.`,
	flags: func(fs *flag.FlagSet) action {
		format := output(fs)
		return func(ctx context.Context, out *terminal, _ []string) error {
			asJSON, err := isJSON(*format)
			if err != nil {
				return err
			}
			c := api.NewClient(api.Socket)
			defer c.Close()
			p, err := c.Plan(ctx)
			if err != nil {
				return err
			}
			if asJSON {
				err = out.json(p)
			} else {
				renderPlan(out, p)
			}
			if err == nil && !p.Empty() {
				err = told{errUnmet}
			}
			return err
		}
	},
}

// renderPlan prints a section for every instance with something to say, and one
// line for all the others.
func renderPlan(t *terminal, p api.Plan) {
	var still []string
	for _, in := range p.Instances {
		if len(in.Changes) == 0 && in.Error == "" {
			still = append(still, in.Name)
			continue
		}
		t.printf("%s\n", t.paint(bold, in.Name))
		for _, c := range in.Changes {
			t.block("  ", c)
		}
		if in.Error != "" {
			t.block("  ", "cannot tell: "+in.Error)
		}
		t.printf("\n")
	}
	switch {
	case len(p.Instances) == 0:
		t.printf("nothing is planned: no configuration is sealed yet\n")
	case len(still) > 0:
		t.block("", t.paint(faint, "nothing to change: "+strings.Join(still, ", ")))
	}
}
