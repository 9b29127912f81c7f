package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"

	"github.com/tkenode/tkenode/agent"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/bootstrap"
)

var agentCommand = command{
	name: "agent",
	help: "keep this CVM a working node; systemd runs it",
	long: `The daemon, run by tkenode-agent.service. It needs the socket that tkenode-cni.socket holds for it. Stopping it
takes nothing down.`,
	flags: func(*flag.FlagSet) action {
		return func(ctx context.Context, _ *terminal, args []string) error {
			if len(args) > 0 {
				return usagef("agent takes no arguments")
			}
			machine, err := bootstrap.ThisMachine()
			if err != nil {
				return err
			}
			return agent.Run(ctx, agent.Options{
				Version: version(),
				Log:     journal(),
				Console: os.Stdout, // the unit gives it to the console, too
				Files: func(c node.Config, f node.Facts) ([]node.File, error) {
					return bootstrap.Render(c, f, machine)
				},
			})
		}
	},
}

var bootstrapCommand = command{
	name: "bootstrap",
	help: "join the cluster that the user-data names; systemd runs it at every boot",
	long: `The first boot, run by tkenode-bootstrap.service, exact or nothing: it seals the NodeConfig of the user-data and gets the
node its certificate, or says on the console, in the journal and in "tkenode status" why not. On later boots it confirms what is
sealed. It exits with 0 when it is done, with 1 when a human must act, and with 2 when it is worth trying again.`,
	flags: func(fs *flag.FlagSet) action {
		file := fs.String("user-data", "", "read the user-data from `FILE` instead of the metadata service")
		return func(ctx context.Context, _ *terminal, args []string) error {
			if len(args) > 0 {
				return usagef("bootstrap takes no arguments")
			}
			metadata := tencent.NewMetadata("")
			err := bootstrap.Run(ctx, bootstrap.Options{
				Metadata: metadata,
				CloudFacts: func(ctx context.Context, c node.Config, f node.Facts) (node.Facts, error) {
					// Go that finds none takes defaults, and looks for it again 5 s later.
					if _, err := os.Stat(resolvConf); errors.Is(err, os.ErrNotExist) {
						return f, node.Waiting("ResolverStarting", "%s is not there yet; see systemctl status systemd-resolved", resolvConf)
					}
					api, err := tencent.NewClient(c.Cloud, f.Region, metadata)
					if err != nil {
						return f, fmt.Errorf("reach cloud API: %w", err)
					}
					return api.Facts(ctx, f)
				},
				UserDataFile: *file,
				Log:          journal(),
				Console:      os.Stdout, // the unit gives it to the console, too
			})
			if code := bootstrap.ExitCode(err); code != bootstrap.ExitDone {
				return exitWith{code, told{err}}
			}
			return nil
		}
	},
}

// resolvConf is what Go's resolver reads.
const resolvConf = "/etc/resolv.conf"

// journal logs to standard error, which systemd gives to the journal with the
// time: ours would stand beside it.
func journal() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}
