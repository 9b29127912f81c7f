// Package kube is the agent's way to the API server, as the node itself: with
// kubelet's client certificate and over plain HTTP and JSON.
//
// It watches that certificate (condition NodeJoined) and this node's Node object
// (NodeReady), and writes into it what is wrong with the machine. It knows only the fields it needs: client-go's clientset would cost
// more memory than the rest of the agent.
package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

const (
	requestTimeout = 15 * time.Second
	maxAnswer      = 8 << 20 // of one object; etcd takes 1.5 MiB
)

// Client talks to the API server of the node's cluster.
type Client struct {
	base *url.URL
	cert string // certificate and key
	http *http.Client
}

// New returns a client of the API server at endpoint, which is trusted by ca
// (PEM). The certificate and key in the file cert are read at each connection,
// since kubelet rotates them.
func New(endpoint string, ca []byte, cert string) (*Client, error) {
	base, err := url.Parse(endpoint)
	if err == nil && (base.Scheme != "https" || base.Host == "") {
		err = errors.New("it is not an https URL")
	}
	if err != nil {
		return nil, fmt.Errorf("read API server endpoint %q: %w", endpoint, err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, errors.New("read the cluster's CA: there is no PEM certificate in it")
	}
	c := &Client{base: base, cert: cert}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		TLSClientConfig: &tls.Config{
			RootCAs:    roots,
			MinVersion: tls.VersionTLS12,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				pair, err := tls.LoadX509KeyPair(cert, cert)
				return &pair, err
			},
		},
		ForceAttemptHTTP2:     true,
		ResponseHeaderTimeout: requestTimeout,
		// A watch is silent for minutes: pings tell that the server is still there.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
	}}
	return c, nil
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// StatusError is an answer of the API server other than success.
type StatusError struct {
	Request string `json:"-"` // GET /api/v1/nodes
	Code    int    `json:"code"`
	Reason  string `json:"reason"`  // Forbidden, Expired, …
	Message string `json:"message"` // the API server's
}

func (e *StatusError) Error() string {
	text := fmt.Sprintf("%s: %d %s", e.Request, e.Code, http.StatusText(e.Code))
	if e.Message != "" {
		text += ": " + e.Message
	}
	return text
}

// get sends a GET request; the caller closes the body.
func (c *Client) get(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	u := c.base.JoinPath(path)
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	return c.do(req, path)
}

// do sends a request to path; the caller closes the body of a success.
func (c *Client) do(req *http.Request, path string) (io.ReadCloser, error) {
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "tkenode")
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	// The body is a Status object if it is the API server's at all.
	status := &StatusError{}
	if b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10)); err == nil {
		_ = json.Unmarshal(b, status)
	}
	status.Request, status.Code = req.Method+" "+path, resp.StatusCode
	return nil, status
}
