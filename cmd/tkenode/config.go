package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/node"
)

// current is the link to the sealed configuration that the agent reads.
const current = "/var/lib/tkenode/config/current"

var configShowCommand = command{
	name: "config show",
	help: "the sealed configuration, and the facts sealed with it",
	long: `It is asked of the agent; while that does not run, root is shown the file instead.`,
	flags: func(*flag.FlagSet) action {
		return func(ctx context.Context, out *terminal, _ []string) error {
			c := api.NewClient(api.Socket)
			defer c.Close()
			s, err := c.Config(ctx)
			if errors.Is(err, api.ErrNotRunning) || errors.Is(err, api.ErrHung) {
				s, err = readSealed(current, err)
			}
			if err != nil {
				return err
			}
			return out.json(s)
		}
	},
}

// readSealed reads the file itself, when asking has ended in unreachable.
func readSealed(path string, unreachable error) (node.Sealed, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return node.Sealed{}, errors.New("no configuration is sealed yet")
	}
	if err != nil {
		return node.Sealed{}, fmt.Errorf("%w, and the file cannot be read: %w", unreachable, err)
	}
	return node.DecodeSealed(b)
}
