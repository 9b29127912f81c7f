package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/bootstrap/nodeconfig"
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

// maxUserData bounds what config check reads. The cloud takes 16 KiB; a script
// that is longer by mistake shall be told so by what it contains.
const maxUserData = 1 << 20

var configCheckCommand = command{
	name: "config check",
	args: "FILE",
	help: "what bootstrap would say of a NodeConfig, or of user-data",
	long: `FILE is what would be given to a CVM as user-data: a NodeConfig alone, or a MIME multipart with one in
it; - is standard input. Everything that is wrong is told, each with its line. It works on any machine. What only the node
or its cluster can tell is not checked: whether the token is valid, or the disk blank.`,
	flags: func(fs *flag.FlagSet) action {
		format := output(fs)
		return func(_ context.Context, out *terminal, args []string) error {
			asJSON, err := isJSON(*format)
			if err != nil {
				return err
			}
			if len(args) != 1 {
				return usagef("config check takes one file, or - for standard input")
			}
			data, err := readUserData(args[0])
			if err != nil {
				return err
			}
			c, err := nodeconfig.FromUserData(data)
			switch {
			case asJSON:
				return checked(out, err)
			case err != nil:
				return err
			}
			out.printf("a valid NodeConfig for cluster %s\n", c.Cluster.ID)
			return nil
		}
	},
}

// checked prints what is wrong as JSON: an empty list for a valid NodeConfig.
func checked(out *terminal, err error) error {
	problems, ok := errors.AsType[nodeconfig.Problems](err)
	switch {
	case err == nil:
		problems = nodeconfig.Problems{}
	case !ok: // of user-data as a whole
		problems = nodeconfig.Problems{{Text: err.Error()}}
	}
	if printErr := out.json(map[string]nodeconfig.Problems{"problems": problems}); printErr != nil || err == nil {
		return printErr
	}
	return told{err}
}

func readUserData(path string) ([]byte, error) {
	f := os.Stdin
	if path != "-" {
		var err error
		if f, err = os.Open(path); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	data, err := io.ReadAll(io.LimitReader(f, maxUserData+1))
	if err == nil && len(data) > maxUserData {
		err = fmt.Errorf("%s is larger than %d bytes, which no cloud takes as user-data", path, maxUserData)
	}
	return data, err
}
