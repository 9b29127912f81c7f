package kube

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// maxAnswer bounds what is read of an answer.
const maxAnswer = 16 << 20

// rewatch is the pause between a watch that has ended and the next one.
const rewatch = 100 * time.Millisecond

// StatusError is a refusal by the API server.
type StatusError struct {
	Code    int    `json:"code"`
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

func (e *StatusError) Error() string { return fmt.Sprintf("%d %s: %s", e.Code, e.Reason, e.Message) }

// NotFound reports whether err says that there is no such object.
func NotFound(err error) bool {
	status, ok := errors.AsType[*StatusError](err)
	return ok && status.Code == http.StatusNotFound
}

func newClient(p pki, name string) (*http.Client, error) {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.ca)
	cert, err := tls.LoadX509KeyPair(p.cert(name), p.key(name))
	if err != nil {
		return nil, err
	}
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}},
		ForceAttemptHTTP2:   true,
		TLSHandshakeTimeout: 10 * time.Second,
	}}, nil
}

// Do sends body as JSON, and decodes the answer into result: JSON, or text into
// a *string. Either may be nil. It acts as the cluster's administrator.
func (c *Cluster) Do(ctx context.Context, method, path string, body, result any) error {
	return c.send(ctx, method, path, "application/json", body, result)
}

// Apply creates the object at path or changes it to what object says, by
// server-side apply.
func (c *Cluster) Apply(ctx context.Context, path string, object any) error {
	return c.send(ctx, http.MethodPatch, path+"?fieldManager=lab&force=true", "application/apply-patch+yaml", object, nil)
}

func (c *Cluster) send(ctx context.Context, method, path, contentType string, body, result any) error {
	resp, err := c.request(ctx, method, path, contentType, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	switch result := result.(type) {
	case nil:
		return nil
	case *string:
		*result = string(answer)
		return nil
	}
	if err := json.Unmarshal(answer, result); err != nil {
		return fmt.Errorf("%s %s: decode answer: %w", method, path, err)
	}
	return nil
}

func (c *Cluster) request(ctx context.Context, method, path, contentType string, body any) (*http.Response, error) {
	var content io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("%s %s: %w", method, path, err)
		}
		content = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.Endpoint()+path, content)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err // says the method and the URL
	}
	if resp.StatusCode/100 != 2 {
		defer resp.Body.Close()
		return nil, fmt.Errorf("%s %s: %w", method, path, statusError(resp))
	}
	return resp, nil
}

func statusError(resp *http.Response) *StatusError {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10)) // without a body, the code still says something
	status := &StatusError{}
	if json.Unmarshal(text, status) != nil || status.Message == "" {
		status = &StatusError{Message: strings.TrimSpace(string(text))}
	}
	status.Code = resp.StatusCode
	if status.Reason == "" {
		status.Reason = http.StatusText(resp.StatusCode)
	}
	return status
}

// watch calls seen with the object at path, which names a collection and selects
// from it, as it is and as it changes, until seen reports that it is done. A
// deleted object is passed with gone set.
func (c *Cluster) watch(ctx context.Context, path string, seen func(object json.RawMessage, gone bool) (done bool, err error)) error {
	for {
		done, err := c.watchOnce(ctx, path, seen)
		if done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rewatch):
		}
	}
}

func (c *Cluster) watchOnce(ctx context.Context, path string, seen func(json.RawMessage, bool) (bool, error)) (bool, error) {
	resp, err := c.request(ctx, http.MethodGet, path+"&watch=1", "application/json", nil)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	for events := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)); ; {
		var e struct {
			Type   string
			Object json.RawMessage
		}
		if events.Decode(&e) != nil {
			return false, nil // the API server ends every watch some time
		}
		if e.Type == "ERROR" {
			return false, fmt.Errorf("watch %s: %s", path, e.Object)
		}
		if done, err := seen(e.Object, e.Type == "DELETED"); done || err != nil {
			return done, err
		}
	}
}
