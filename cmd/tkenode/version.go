package main

import (
	"context"
	"flag"
	"runtime"
	"runtime/debug"
)

var versionCommand = command{
	name: "version",
	help: "the version of this program",
	flags: func(*flag.FlagSet) action {
		return func(_ context.Context, out *terminal, _ []string) error {
			out.printf("tkenode %s (%s, %s/%s)\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return nil
		}
	},
}

// version is what the toolchain recorded of the source: a tag, or a commit.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(unknown)"
	}
	return info.Main.Version
}
