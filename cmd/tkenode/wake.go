package main

import (
	"context"
	"flag"

	"github.com/tkenode/tkenode/agent/api"
)

var wakeCommand = command{
	name: "wake",
	args: "[INSTANCE]",
	help: "have one instance, or all of them, look again now",
	long: `An instance that waits for a human looks again only every few minutes; this spares the wait after
something was put right. Only root may.`,
	flags: func(*flag.FlagSet) action {
		return func(ctx context.Context, _ *terminal, args []string) error {
			if len(args) > 1 {
				return usagef("wake takes one instance, or none for all of them")
			}
			c := api.NewClient(api.Socket)
			defer c.Close()
			return c.Wake(ctx, append(args, "")[0])
		}
	},
}
