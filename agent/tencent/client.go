package tencent

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
	"strconv"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	apiVersion       = "2017-03-12" // of vpc, cbs and cvm alike
	apiTimeout       = 15 * time.Second
	maxResponseBytes = 4 << 20 // 100 ENIs with 50 addresses each take 1 MiB
)

// Client calls actions of the cloud API, signed with the credentials of the
// instance's CAM role. Every call has a deadline of 15 s and is made once.
type Client struct {
	// HTTP may be replaced before the first use.
	HTTP *http.Client

	region, domain string
	metadata       *Metadata
}

// NewClient returns a client of the API in region.
func NewClient(cloud node.CloudConfig, region string, m *Metadata) (*Client, error) {
	t := &http.Transport{IdleConnTimeout: 30 * time.Second, MaxIdleConnsPerHost: 2}
	if pem := cloud.CertificateAuthority; pem != "" {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM([]byte(pem)) {
			return nil, node.Terminal("InvalidConfig", "write one or more PEM certificates",
				errors.New("cloud.certificateAuthority holds no certificate"))
		}
		t.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	// A redirect is no answer of the API, and would carry the role's token away.
	stay := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Client{HTTP: &http.Client{Transport: t, CheckRedirect: stay}, region: region, domain: cloud.APIDomain, metadata: m}, nil
}

// call makes one call of an action, and decodes its answer into out.
func (c *Client) call(ctx context.Context, service, action string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	creds, err := c.metadata.Credentials(ctx)
	if err != nil {
		return fmt.Errorf("%s %s: %w", service, action, err)
	}
	req, err := c.request(ctx, creds, service, action, in)
	if err != nil {
		return fmt.Errorf("%s %s: %w", service, action, err)
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return fmt.Errorf("%s %s: %w", service, action, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxResponseBytes+1))
	switch {
	case err != nil:
		return fmt.Errorf("%s %s: read answer: %w", service, action, err)
	case resp.StatusCode != http.StatusOK: // refusals come with 200
		return fmt.Errorf("%s %s: HTTP %d", service, action, resp.StatusCode)
	case len(body) > maxResponseBytes:
		return fmt.Errorf("%s %s: answer is longer than %d bytes", service, action, maxResponseBytes)
	}
	apiErr, err := decodeAnswer(body, out)
	if err != nil {
		return fmt.Errorf("%s %s: decode answer: %w", service, action, err)
	}
	if apiErr == nil {
		return nil
	}
	apiErr.Service, apiErr.Action = service, action
	if apiErr.verdict().reason == "CredentialsExpired" {
		c.metadata.forgetCredentials(ctx, creds.SecretID)
	}
	return apiErr.classed()
}

// request builds the signed request.
// Source: https://cloud.tencent.com/document/api/213/30654
func (c *Client) request(ctx context.Context, creds Credentials, service, action string, in any) (*http.Request, error) {
	payload, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("encode request: %w", err)
	}
	host, now := service+"."+c.domain, time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+host+"/", bytes.NewReader(payload))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", contentType)
	req.Header.Set("X-TC-Action", action)
	req.Header.Set("X-TC-Version", apiVersion)
	req.Header.Set("X-TC-Region", c.region)
	req.Header.Set("X-TC-Timestamp", strconv.FormatInt(now.Unix(), 10))
	req.Header.Set("X-TC-Token", creds.Token.Reveal())
	req.Header.Set("X-TC-Language", "en-US")
	req.Header.Set("User-Agent", "tkenode")
	req.Header.Set("Authorization", authorization(creds, service, host, action, payload, now))
	return req, nil
}

// decodeAnswer opens the envelope that every answer comes in, and decodes what
// is in it into out, or returns the refusal.
func decodeAnswer(body []byte, out any) (*APIError, error) {
	var envelope struct{ Response json.RawMessage }
	if err := json.Unmarshal(body, &envelope); err != nil {
		return nil, jsonError(err)
	}
	if len(envelope.Response) == 0 {
		return nil, errors.New("no Response in it")
	}
	var head struct {
		Error     *struct{ Code, Message string }
		RequestId string
	}
	if err := json.Unmarshal(envelope.Response, &head); err != nil {
		return nil, jsonError(err)
	}
	if head.Error != nil && head.Error.Code != "" {
		return &APIError{Code: clip(head.Error.Code, 128), Message: clip(head.Error.Message, 1<<10), RequestID: clip(head.RequestId, 64)}, nil
	}
	if err := json.Unmarshal(envelope.Response, out); err != nil {
		return nil, jsonError(err)
	}
	return nil, nil
}

// clip shortens what another machine wrote to n bytes or little more: it ends up
// in conditions, logs and on the console.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return strings.ToValidUTF8(s[:n], "") + "…"
}
