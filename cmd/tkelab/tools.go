package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tkenode/tkenode/lab"
)

func list(ctx context.Context, _ []string) error {
	i, err := labInfo(ctx)
	if err != nil {
		return err
	}
	if len(i.CVMs) == 0 {
		fmt.Println("no CVM; launch one with: tkelab launch")
		return nil
	}
	fmt.Printf("%-14s %-12s %-12s %s\n", "ID", "NODE", "REACHED", "AFTER")
	for _, c := range i.CVMs {
		last := c.Marks[len(c.Marks)-1]
		fmt.Printf("%-14s %-12s %-12s %s\n", c.ID, c.Node, last.Step, seconds(last.Took))
	}
	return nil
}

func terminate(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("%w: which CVM? tkelab list names them", errUsage)
	}
	return ask(ctx, http.MethodPost, "/v1/terminate", url.Values{"id": {args[0]}}, nil)
}

// down stops the lab.
func down(ctx context.Context, _ []string) error {
	was, err := stopLab(ctx)
	if err == nil && !was {
		fmt.Println("no lab is running")
	}
	return err
}

// pick finds the CVM that args begin with, or else the newest one, and returns
// the other arguments.
func pick(ctx context.Context, args []string) (info, cvm, []string, error) {
	i, err := labInfo(ctx)
	if err != nil {
		return i, cvm{}, nil, err
	}
	if len(args) > 0 {
		for _, c := range i.CVMs {
			if c.ID == args[0] || c.IP == args[0] {
				return i, c, args[1:], nil
			}
		}
	}
	if len(i.CVMs) == 0 {
		return i, cvm{}, nil, errors.New("there is no CVM; launch one with: tkelab launch")
	}
	return i, i.CVMs[len(i.CVMs)-1], args, nil
}

// sshTo runs ssh(1) through the lab's network.
func sshTo(ctx context.Context, args []string) error {
	i, c, rest, err := pick(ctx, args)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := waitKey(ctx, c.Console); err != nil {
		return err
	}
	return stand("ssh", os.Environ(), append([]string{
		"-i", i.Key,
		"-o", "ProxyCommand=" + proxyCommand(self),
		// The machine was made a moment ago, on a network that exists in the lab only.
		"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
		"-o", "IdentitiesOnly=yes",
		lab.LoginUser + "@" + c.IP,
	}, rest...)...)
}

// waitKey waits until cloud-init has put the login key in place, which it does
// after the node is Ready, and not for ever: a machine that has something wrong
// may be logged into all the same.
func waitKey(ctx context.Context, console string) error {
	const limit, after = 2 * time.Minute, "running 'modules:config'" // the stage behind that of the keys
	said := false
	for end := time.Now().Add(limit); time.Now().Before(end); {
		text, err := os.ReadFile(console)
		if err != nil {
			return fmt.Errorf("read console: %w", err)
		}
		if bytes.Contains(text, []byte(after)) {
			return nil
		}
		if !said {
			fmt.Fprintln(os.Stderr, "tkelab: waiting for cloud-init to put the login key in place")
			said = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
	return nil
}

// proxyCommand is what ssh hands to a shell, behind an exec of its own, after it
// has replaced what follows a percent sign.
func proxyCommand(self string) string {
	quoted := "'" + strings.ReplaceAll(self, "'", `'\''`) + "'"
	return strings.ReplaceAll(quoted, "%", "%%") + " connect %h:%p"
}

// kubectl runs the kubectl that belongs to the cluster.
func kubectl(ctx context.Context, args []string) error {
	i, err := labInfo(ctx)
	if err != nil {
		return err
	}
	return stand(filepath.Join(binDir(), "kubectl"), append(os.Environ(), "KUBECONFIG="+i.Kubeconfig), args...)
}

// stand makes this process the program: its terminal, its signals, its exit
// status, and nothing of ours that could outlive it.
func stand(program string, env []string, args ...string) error {
	path, err := exec.LookPath(program)
	if err != nil {
		return err
	}
	err = syscall.Exec(path, append([]string{program}, args...), env)
	return fmt.Errorf("run %s: %w", path, err) // it returns only where it failed
}

func console(ctx context.Context, args []string) error {
	_, c, _, err := pick(ctx, args)
	if err != nil {
		return err
	}
	f, err := os.Open(c.Console)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(os.Stdout, f)
	return err
}

// connect joins standard input and output to an address of the VPC, for ssh's
// ProxyCommand.
func connect(ctx context.Context, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("%w: which address?", errUsage)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://tkelab/v1/connect?"+url.Values{"addr": {args[0]}}.Encode(), nil)
	if err != nil {
		return err
	}
	r.Header.Set("Connection", "Upgrade")
	r.Header.Set("Upgrade", "tcp")
	resp, err := client().Do(r)
	if err != nil {
		return fmt.Errorf("ask the lab: %w", err)
	}
	defer resp.Body.Close()
	conn, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return fmt.Errorf("connect to %s: %s", args[0], text)
	}
	go func() { // ends with standard input, or with the process
		_, _ = io.Copy(conn, os.Stdin)
		if c, ok := conn.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite()
		}
	}()
	_, err = io.Copy(os.Stdout, conn)
	return err
}
