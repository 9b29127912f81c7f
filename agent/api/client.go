package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"syscall"
	"time"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/node"
)

// maxAnswer is far above what an agent answers.
const maxAnswer = 16 << 20

// dialTimeout is how long a client waits for an agent that does not accept.
const dialTimeout = 3 * time.Second

// The ways in which an agent cannot be asked.
var (
	ErrNotRunning = errors.New("the agent is not running")
	ErrDenied     = errors.New("permission denied: be root or a member of the group " + Group)
	ErrHung       = errors.New("the agent does not answer")
)

// Client asks the agent.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client of the agent that listens on path.
func NewClient(path string) *Client {
	d := net.Dialer{Timeout: dialTimeout}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		},
		MaxIdleConns: 1,
	}}}
}

// Close gives the connection up.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status asks how the node stands.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Plan has every instance planned anew.
func (c *Client) Plan(ctx context.Context) (p Plan, err error) {
	return p, c.call(ctx, http.MethodGet, "/v1/plan", nil, &p)
}

// Config asks for the sealed configuration.
func (c *Client) Config(ctx context.Context) (s node.Sealed, err error) {
	return s, c.call(ctx, http.MethodGet, "/v1/config", nil, &s)
}

// Boot asks for the ledger of this boot.
func (c *Client) Boot(ctx context.Context) (b Boot, err error) {
	return b, c.call(ctx, http.MethodGet, "/v1/boot", nil, &b)
}

// ENI asks for the ENIs, their addresses and the pods.
func (c *Client) ENI(ctx context.Context) (s eni.State, err error) {
	return s, c.call(ctx, http.MethodGet, "/v1/eni", nil, &s)
}

// Disks asks for the disks and the evidence of each.
func (c *Client) Disks(ctx context.Context) (all []disk.State, err error) {
	return all, c.call(ctx, http.MethodGet, "/v1/disks", nil, &all)
}

// Volumes asks for the disks that are attached and not of the NodeConfig.
func (c *Client) Volumes(ctx context.Context) (v Volumes, err error) {
	return v, c.call(ctx, http.MethodGet, "/v1/volumes", nil, &v)
}

// Decide tells what an operator has decided of a disk.
func (c *Client) Decide(ctx context.Context, o disk.Order) error {
	return c.call(ctx, http.MethodPost, "/v1/disks", o, nil)
}

// Explain asks for the way of packets.
func (c *Client) Explain(ctx context.Context, q eni.Question) (e eni.Explanation, err error) {
	v := url.Values{}
	if q.Pod != "" {
		v.Set("pod", q.Pod)
	}
	for name, a := range map[string]netip.Addr{"ip": q.IP, "to": q.To} {
		if a.IsValid() {
			v.Set(name, a.String())
		}
	}
	return e, c.call(ctx, http.MethodGet, "/v1/explain?"+v.Encode(), nil, &e)
}

// Wake has the named instance, or all of them, look again.
func (c *Client) Wake(ctx context.Context, instance string) error {
	return c.call(ctx, http.MethodPost, "/v1/wake", Wake{instance}, nil)
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode %s: %w", path, err)
		}
		body = bytes.NewReader(b)
	}
	// The host has no meaning on a unix socket, but HTTP wants one.
	req, err := http.NewRequestWithContext(ctx, method, "http://tkenode"+path, body)
	if err != nil {
		return fmt.Errorf("ask for %s: %w", path, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(ctx, err)
	}
	defer resp.Body.Close()
	answer := io.LimitReader(resp.Body, maxAnswer)
	if resp.StatusCode != http.StatusOK {
		var f failure
		if err := json.NewDecoder(answer).Decode(&f); err != nil || f.Error == "" {
			f.Error = resp.Status
		}
		return errors.New(f.Error)
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(answer).Decode(out); err != nil {
		return fmt.Errorf("read the answer to %s: %w", path, c.explain(ctx, err))
	}
	return nil
}

// explain names the common reasons, each of which calls for another action.
func (c *Client) explain(ctx context.Context, err error) error {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w (nothing listens on %s)", ErrNotRunning, c.path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("ask %s: %w", c.path, ErrDenied)
	case ctx.Err() == nil && errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w on %s", ErrHung, c.path)
	}
	return fmt.Errorf("ask %s: %w", c.path, err)
}
