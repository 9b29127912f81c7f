package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/tkenode/tkenode/lab"
)

// demo is what a newcomer runs first.
func demo(ctx context.Context, _ []string) error {
	p := newProgress(os.Stdout)
	defer p.Close()
	image, err := buildWith(ctx, p)
	if err != nil {
		return err
	}
	b, err := startBackground(ctx, image, p)
	if err != nil {
		return err
	}
	keep := false
	defer func() {
		if !keep {
			b.stop(p)
		}
	}()
	n, err := launchWith(ctx, p, nil)
	if err != nil {
		return err
	}
	const step = "pod Running, reached from another address of the VPC"
	p.Begin(step)
	var pod lab.Web
	err = ask(ctx, http.MethodPost, "/v1/pod", url.Values{"name": {"web"}, "node": {n.node}}, &pod)
	p.End(step, err)
	if err != nil {
		return err
	}
	i, err := labInfo(ctx)
	if err != nil {
		return err
	}
	if err := b.detach(); err != nil {
		return fmt.Errorf("leave the lab running: %w", err)
	}
	keep = true
	p.Say("\npod %s has %s, a VPC address of %s; %s fetched its page in %s", pod.Name, pod.IP, n.id, pod.From, pod.Took.Round(time.Millisecond))
	next(p, i)
	return nil
}

// next says what to try now.
func next(p *progress, i info) {
	p.Say("\nThe lab runs on in the background. Try:")
	for _, line := range [][2]string{
		{"bin/tkelab ssh", "log in to the node"},
		{"bin/tkelab ssh tkenode status", "what an on-call engineer asks first"},
		{"bin/tkelab kubectl get pods -o wide", "the cluster (also logs, exec, port-forward)"},
		{"bin/tkelab launch", "launch one more node"},
		{"bin/tkelab console", "what the machine printed"},
		{i.Page, "the node's metrics, in a browser"},
		{"bin/tkelab down", "stop everything"},
	} {
		p.Say("  %-38s %s", line[0], line[1])
	}
}

// up starts a region and leaves it running.
func up(ctx context.Context, _ []string) error {
	p := newProgress(os.Stdout)
	defer p.Close()
	image, err := buildWith(ctx, p)
	if err != nil {
		return err
	}
	b, err := startBackground(ctx, image, p)
	if err != nil {
		return err
	}
	return b.detach()
}

// launched is an instance as launch's answer names it.
type launched struct{ id, node, console string }

// launchWith launches a CVM and shows its steps until the Node is Ready.
func launchWith(ctx context.Context, p *progress, userData io.Reader) (launched, error) {
	resp, err := call(ctx, http.MethodPost, "/v1/launch", nil, userData)
	if err != nil {
		return launched{}, fmt.Errorf("launch: %w", err)
	}
	defer resp.Body.Close()
	n := launched{resp.Header.Get("X-Instance"), resp.Header.Get("X-Node"), resp.Header.Get("X-Console")}
	const whole = "launch to Node Ready"
	p.Say("launching %s at %s", n.id, n.node)
	p.Begin(whole)
	lines := bufio.NewScanner(resp.Body)
	reached := 0
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			return n, fmt.Errorf("decode the lab's answer: %w", err)
		}
		if e.Error != "" {
			err := errors.New(e.Error)
			p.End(whole, err)
			return n, fmt.Errorf("%s did not become a node; its console is %s", n.id, n.console)
		}
		reached++
		p.Say("  %s %7s", pad(string(e.Mark.Step), 20), seconds(e.Mark.Took))
		p.Update(whole, float64(reached)/float64(len(lab.Steps)), "")
		if e.Mark.Step == lab.NodeReady {
			p.End(whole, nil)
			return n, nil
		}
	}
	if ctx.Err() != nil {
		return n, ctx.Err()
	}
	return n, fmt.Errorf("the lab went away while %s was launched; its log is %s", n.id, logFile())
}

func pad(s string, n int) string { return fmt.Sprintf("%-*s", n, s) }

func launch(ctx context.Context, args []string) error {
	if len(args) > 1 {
		return fmt.Errorf("%w: one file at most", errUsage)
	}
	var userData io.Reader
	if len(args) == 1 {
		f, err := os.Open(args[0])
		if err != nil {
			return err
		}
		defer f.Close()
		userData = f
	}
	p := newProgress(os.Stdout)
	defer p.Close()
	_, err := launchWith(ctx, p, userData)
	return err
}
