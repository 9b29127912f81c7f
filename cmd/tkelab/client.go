package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

var errNotUp = errors.New("no lab is running; start one with: tkelab demo")

// client asks the lab in the background.
func client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket())
		},
		DisableKeepAlives: true,
	}}
}

// call makes a request; the caller closes the body of a success.
func call(ctx context.Context, method, path string, query url.Values, body io.Reader) (*http.Response, error) {
	u := "http://tkelab" + path
	if query != nil {
		u += "?" + query.Encode()
	}
	r, err := http.NewRequestWithContext(ctx, method, u, body)
	if err != nil {
		return nil, err
	}
	resp, err := client().Do(r)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, errNotUp
	}
	if err != nil {
		return nil, fmt.Errorf("ask the lab: %w", err)
	}
	if resp.StatusCode >= 400 {
		defer resp.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		return nil, errors.New(strings.TrimSpace(string(text)))
	}
	return resp, nil
}

// ask makes a request and decodes its answer into v, if there is one to decode.
func ask(ctx context.Context, method, path string, query url.Values, v any) error {
	resp, err := call(ctx, method, path, query, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if v == nil {
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("decode the lab's answer: %w", err)
	}
	return nil
}

func labInfo(ctx context.Context) (i info, err error) {
	return i, ask(ctx, http.MethodGet, "/v1/lab", nil, &i)
}

// background is the process in the background, seen from the one that started it.
type background struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
}

// startBackground starts a lab with the node image and waits until it is up.
func startBackground(ctx context.Context, image string, p *progress) (*background, error) {
	held, err := takeLab(ctx, "tkelab "+os.Args[1], p)
	if err != nil {
		return nil, err
	}
	defer held.Close() // the lab has it, too
	if err := cleanLabDir(); err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	log, err := os.Create(logFile())
	if err != nil {
		return nil, fmt.Errorf("make log: %w", err)
	}
	defer log.Close()
	// Not CommandContext: the lab is asked to end, so that it ends in order.
	cmd := exec.Command(self, "serve")
	cmd.Env = append(os.Environ(), "TKELAB_IMAGE="+image)
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{held} // lockFD
	// A session of its own: a Ctrl-C here must not reach it before it is told.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start lab: %w", err)
	}
	b := &background{cmd, stdin}
	stop := context.AfterFunc(ctx, func() { stdin.Close() })
	defer stop()
	lines := bufio.NewScanner(stdout)
	why := "it ended without a word"
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			continue
		}
		switch {
		case e.Begin != "":
			p.Begin(e.Begin)
		case e.End != "":
			var err error
			if e.Error != "" {
				err = errors.New(e.Error)
			}
			p.End(e.End, err)
		case e.Ready:
			return b, nil
		case e.Error != "":
			why = e.Error
		}
	}
	b.stop(p)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return nil, fmt.Errorf("the lab did not start: %s; its log is %s", why, logFile())
}

// detach leaves the lab running.
func (b *background) detach() error {
	_, err := b.stdin.Write([]byte{detach})
	return err
}

// stop ends the lab and waits until it is gone.
func (b *background) stop(p *progress) {
	const step = "stop the lab"
	p.Begin(step)
	b.stdin.Close()
	_ = b.cmd.Wait() // how it ended is in its log
	p.End(step, nil)
}
