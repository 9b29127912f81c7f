// Command tkenode is the whole of tkenode on a node: the agent, the first boot,
// and what the person on call types. One file a command; the table in command.go
// is what help, the man page and the completions are made from.
//
// It is also the process that the agent sends to a disk that may hang, which is no
// command of anybody's.
//
// The operator's commands only ask the agent, over its socket; none of them
// changes the node by itself.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

//go:generate go test -run ^TestGenerated$ . -update

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, newTerminal(os.Stdout), newTerminal(os.Stderr), os.Args[1:])
	stop()
	os.Exit(code)
}
