package main

import (
	"context"
	"flag"
	"log/slog"
	"os"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/bootstrap"
)

var bootstrapCommand = command{
	name: "bootstrap",
	help: "join this CVM to its cluster (systemd runs it at every boot)",
	long: `It finds the NodeConfig in the user-data, refuses it or accepts it whole, asks the cluster for a
certificate and seals the configuration. What something else will bring is waited for without limit; what only a human can
mend ends it with exit status 1, anything else with 2. On a node that is sealed it confirms that and ends.`,
	flags: func(fs *flag.FlagSet) action {
		file := fs.String("user-data", "", "read user-data from `file` instead of the metadata service")
		return func(ctx context.Context, out *terminal, _ []string) error {
			metadata := tencent.NewMetadata("")
			err := bootstrap.Run(ctx, bootstrap.Options{
				Metadata:     metadata,
				UserDataFile: *file,
				ZoneID: func(ctx context.Context, c node.Config, f node.Facts) (int, error) {
					cloud, err := tencent.NewClient(c.Cloud, f.Region, metadata)
					if err != nil {
						return 0, err
					}
					return cloud.ZoneID(ctx, f.Zone)
				},
				Log:     newLog(),
				Console: out.w,
			})
			if err != nil {
				return told{exitStatus{err, bootstrap.ExitCode(err)}} // Run has told it
			}
			return nil
		}
	},
}

// newLog returns the log of what systemd starts. The journal has the time.
func newLog() *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}
