package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/api"
)

// command is one row of the table of commands.
type command struct {
	name string // "config show"
	args string // what follows the flags, as the manual writes it
	help string // one line
	long string // the manual's paragraphs, where one line is not enough
	// flags declares the command's flags and returns what runs it.
	flags func(*flag.FlagSet) action
}

// action runs a command with what follows its flags.
type action func(ctx context.Context, out *terminal, args []string) error

// commands is every command, in the order in which help lists them.
func commands() []command {
	return []command{
		statusCommand, planCommand, bootCommand, wakeCommand,
		eniCommand, podsCommand, explainPodCommand, explainIPCommand,
		disksCommand, explainDiskCommand, diskAdoptCommand, diskFormatCommand,
		configShowCommand, configCheckCommand,
		agentCommand, bootstrapCommand,
		versionCommand, helpCommand(),
	}
}

// The exit codes of every command, as the manual lists them.
const (
	exitOK      = 0
	exitError   = 1
	exitUsage   = 2
	exitUnmet   = 3
	exitNoAgent = 4
)

var exitCodes = []struct {
	code int
	help string
}{
	{exitOK, "done, and the node is as it should be"},
	{exitError, "an error, told on standard error"},
	{exitUsage, "the command line is wrong"},
	{exitUnmet, "the node is not as it should be: a condition is not True, a plan is not empty, or an explanation found a disagreement"},
	{exitNoAgent, "the agent cannot be asked: it is not running, does not answer, or you may not ask it"},
}

// errUnmet is the reason for exitUnmet.
var errUnmet = errors.New("the node is not as it should be")

// told is an error that the command's output has told already.
type told struct{ error }

func (t told) Unwrap() error { return t.error }

// exitWith is an error with an exit code of its own.
type exitWith struct {
	code int
	error
}

func (e exitWith) Unwrap() error { return e.error }

// usageError is a wrong command line.
type usageError struct{ error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// run runs one command line and returns its exit code.
func run(ctx context.Context, stdout, stderr *terminal, args []string) int {
	err := dispatch(ctx, stdout, args)
	if _, ok := errors.AsType[told](err); !ok && err != nil {
		stderr.printf("tkenode: %v\n", err)
	}
	return exitCode(err)
}

func exitCode(err error) int {
	_, usage := errors.AsType[usageError](err)
	own, has := errors.AsType[exitWith](err)
	switch {
	case err == nil:
		return exitOK
	case has:
		return own.code
	case usage:
		return exitUsage
	case errors.Is(err, errUnmet):
		return exitUnmet
	case errors.Is(err, api.ErrNotRunning), errors.Is(err, api.ErrDenied), errors.Is(err, api.ErrHung):
		return exitNoAgent
	}
	return exitError
}

func dispatch(ctx context.Context, out *terminal, args []string) error {
	if len(args) == 0 {
		return usagef("which command? Try: tkenode status, or tkenode help")
	}
	switch args[0] {
	case "-h", "-help", "--help":
		args[0] = "help"
	case "-version", "--version":
		args[0] = "version"
	}
	c, rest, err := find(args)
	if err != nil {
		return err
	}
	fs := flag.NewFlagSet(c.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	act := c.flags(fs)
	// A flag may follow an argument: it is what people add to the line they see.
	var plain []string
	for {
		if err := fs.Parse(rest); errors.Is(err, flag.ErrHelp) {
			writeHelp(out, c)
			return nil
		} else if err != nil {
			return usagef("%s: %v; see: tkenode help %s", c.name, err, c.name)
		}
		if fs.NArg() == 0 {
			break
		}
		plain, rest = append(plain, fs.Arg(0)), fs.Args()[1:]
	}
	if c.args == "" && len(plain) > 0 {
		return usagef("%s takes no argument, found %q", c.name, plain[0])
	}
	return act(ctx, out, plain)
}

// find returns the command that args begin with, and the rest of args.
func find(args []string) (command, []string, error) {
	all := commands()
	for _, words := range []int{2, 1} {
		if len(args) < words {
			continue
		}
		name := strings.Join(args[:words], " ")
		if i := slices.IndexFunc(all, func(c command) bool { return c.name == name }); i >= 0 {
			return all[i], args[words:], nil
		}
	}
	var group []string
	for _, c := range all {
		if strings.HasPrefix(c.name, args[0]+" ") {
			group = append(group, "tkenode "+c.name)
		}
	}
	if len(group) > 0 {
		return command{}, nil, usagef("%s what? Try: %s", args[0], strings.Join(group, ", "))
	}
	return command{}, nil, usagef("there is no command %q; tkenode help lists them", args[0])
}

// output is the flag -o of the commands that print what a script may want.
func output(fs *flag.FlagSet) *string { return fs.String("o", "text", "output `format`: text or json") }

// isJSON reports whether -o asks for JSON.
func isJSON(format string) (bool, error) {
	switch format {
	case "text":
		return false, nil
	case "json":
		return true, nil
	}
	return false, usagef("-o is text or json, not %q", format)
}
