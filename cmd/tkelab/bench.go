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
	"path/filepath"
	"time"

	"github.com/tkenode/tkenode/lab"
	"github.com/tkenode/tkenode/lab/bench"
)

// benchmark measures one area: figures go to standard output, one JSON object a
// line, and what goes on to standard error.
func benchmark(ctx context.Context, args []string) error {
	areas := map[string]struct {
		n   int // by default
		run func(ctx context.Context, n int, p *progress) ([]bench.Figure, error)
	}{"boot": {3, benchBoot}, "eni": {200, benchENI}, "disk": {10, benchDisk}}
	if len(args) == 0 {
		return fmt.Errorf("%w: which benchmark?", errUsage)
	}
	area, ok := areas[args[0]]
	if !ok {
		return fmt.Errorf("%w: no benchmark %q", errUsage, args[0])
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	n := flags.Int("n", area.n, "")
	if err := flags.Parse(args[1:]); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	if flags.NArg() > 0 || *n < 1 {
		return fmt.Errorf("%w: at least one pair, and nothing more", errUsage)
	}
	p := newProgress(os.Stderr)
	defer p.Close()
	figures, err := area.run(ctx, *n, p)
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

// benchBoot has a lab of its own.
func benchBoot(ctx context.Context, pairs int, p *progress) ([]bench.Figure, error) {
	image, err := buildWith(ctx, p)
	if err != nil {
		return nil, err
	}
	var figures []bench.Figure
	err = withLab(ctx, image, p, func(l *lab.Lab) (err error) {
		figures, err = bench.Boot(ctx, bench.BootOptions{Lab: l, Dir: labDir(), Image: image, Pairs: pairs, Progress: p})
		return err
	})
	return figures, err
}

// benchENI needs no lab but its VPC and its cloud. The plugins are where make puts
// them: beside this binary.
func benchENI(ctx context.Context, runs int, p *progress) ([]bench.Figure, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	bin := filepath.Dir(self)
	if err := os.MkdirAll(cacheDir(), 0o755); err != nil {
		return nil, err
	}
	return bench.ENI(ctx, bench.ENIOptions{
		Dir: cacheDir(), Plugin: filepath.Join(bin, "tke-eni"), Peer: filepath.Join(bin, "peer"), Runs: runs, Progress: p,
	})
}

// benchNode is the process of one stage of benchENI.
func benchNode(ctx context.Context, args []string) error { return bench.ENIStage(ctx, args, os.Stdout) }

// benchDisk needs no lab but its cloud. The peer is where make puts it: beside this
// binary.
func benchDisk(ctx context.Context, pairs int, p *progress) ([]bench.Figure, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cacheDir(), 0o755); err != nil {
		return nil, err
	}
	figures, err := bench.Disk(ctx, bench.DiskOptions{
		Dir: cacheDir(), Peer: filepath.Join(filepath.Dir(self), "peer", "mountutils"), Helper: filepath.Join(filepath.Dir(self), "tke-disk"), Runs: pairs, Progress: p,
	})
	if err == nil {
		p.Say("%s", "\n"+bench.Table(figures))
	}
	return figures, err
}

// benchDiskNode is the process of one stage of benchDisk.
func benchDiskNode(ctx context.Context, args []string) error {
	return bench.DiskStage(ctx, args, os.Stdout)
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
