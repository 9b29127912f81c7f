package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/tkenode/tkenode/lab"
	"github.com/tkenode/tkenode/lab/bench"
)

// benchmark measures one area in a lab of its own: figures go to standard output,
// one JSON object a line, and what goes on to standard error.
func benchmark(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	pairs := flags.Int("n", 3, "")
	if len(args) == 0 || args[0] != "boot" {
		return fmt.Errorf("%w: which benchmark?", errUsage)
	}
	if err := flags.Parse(args[1:]); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	if flags.NArg() > 0 || *pairs < 1 {
		return fmt.Errorf("%w: at least one pair, and nothing more", errUsage)
	}
	p := newProgress(os.Stderr)
	defer p.Close()
	image, err := buildWith(ctx, p)
	if err != nil {
		return err
	}
	var figures []bench.Figure
	err = withLab(ctx, image, p, func(l *lab.Lab) (err error) {
		figures, err = bench.Boot(ctx, bench.BootOptions{Lab: l, Dir: labDir(), Image: image, Pairs: *pairs, Progress: p})
		return err
	})
	if err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	for _, f := range figures {
		if err := out.Encode(f); err != nil {
			return err
		}
	}
	return nil
}

// withLab runs f with a lab in this process, and nothing else in the lab's
// directory.
func withLab(ctx context.Context, image string, p *progress, f func(*lab.Lab) error) (err error) {
	held, err := takeLab(ctx, "tkelab bench", p)
	if err != nil {
		return err
	}
	defer held.Close()
	if err := cleanLabDir(); err != nil {
		return err
	}
	logTo, err := os.Create(logFile())
	if err != nil {
		return fmt.Errorf("make log: %w", err)
	}
	defer logTo.Close()
	l, err := lab.Start(ctx, lab.Options{
		Dir: labDir(), Cache: cacheDir(), Bin: binDir(), Image: image, Log: slog.New(slog.NewTextHandler(logTo, nil)),
		Begin: p.Begin, End: p.End,
	})
	if err != nil {
		return err
	}
	defer func() {
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, l.Stop(sctx))
	}()
	return f(l)
}
