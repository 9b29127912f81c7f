package tencent

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tkenode/tkenode/agent/node"
)

// answers is an API that gives the same answer to everything.
type answers struct {
	code   int
	header http.Header
	body   string
	calls  int
}

func (a *answers) RoundTrip(r *http.Request) (*http.Response, error) {
	a.calls++
	return &http.Response{StatusCode: a.code, Header: a.header, Body: io.NopCloser(strings.NewReader(a.body)), Request: r}, nil
}

func clientOf(t *testing.T, a *answers) *Client {
	t.Helper()
	m := NewMetadata("")
	m.creds.last = &Credentials{SecretID: "AKID", SecretKey: node.NewSecret("k"), Token: node.NewSecret("t"), Expires: time.Now().Add(time.Hour)}
	m.creds.again = m.creds.last.Expires
	c, err := NewClient(node.CloudConfig{APIDomain: "internal.example"}, "ap-guangzhou", m)
	if err != nil {
		t.Fatal(err)
	}
	c.HTTP.Transport = a
	return c
}

func TestRedirectIsNotFollowed(t *testing.T) {
	a := &answers{code: http.StatusTemporaryRedirect, header: http.Header{"Location": {"https://elsewhere.example/"}}}
	err := clientOf(t, a).call(t.Context(), "vpc", "DescribeNetworkInterfaces", struct{}{}, &struct{}{})
	if err == nil || !strings.Contains(err.Error(), "HTTP 307") || a.calls != 1 {
		t.Errorf("%d calls, %v", a.calls, err)
	}
}

func TestRefusalIsClipped(t *testing.T) {
	a := &answers{code: http.StatusOK, body: `{"Response":{"Error":{"Code":"` + strings.Repeat("C", 9000) + `","Message":"` + strings.Repeat("é", 9000) + `"},"RequestId":"r"}}`}
	err := clientOf(t, a).call(t.Context(), "vpc", "DescribeNetworkInterfaces", struct{}{}, &struct{}{})
	if e, ok := errors.AsType[*APIError](err); !ok || len(err.Error()) > 1500 || !utf8.ValidString(e.Message) {
		t.Errorf("%d bytes: %.100v", len(err.Error()), err)
	}
}

func TestForgetCredentialsEndsWithItsContext(t *testing.T) {
	m := NewMetadata("")
	m.creds.lock <- struct{}{} // somebody asks a service that does not answer
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	m.forgetCredentials(ctx, "AKID")
}
