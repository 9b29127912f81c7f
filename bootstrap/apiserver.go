package bootstrap

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// apiServer talks to the cluster's API server, which it trusts for nothing but a
// certificate that the NodeConfig's CA has signed.
type apiServer struct {
	endpoint string
	host     string // name or address that its certificate must have
	authority
	client *http.Client
	token  node.Secret
}

// authority is the cluster's CA: one certificate, or several while it rotates.
type authority struct {
	pool *x509.CertPool
	all  []*x509.Certificate
}

// parseAuthority reads a bundle that nodeconfig has validated.
func parseAuthority(text string) authority {
	a := authority{pool: x509.NewCertPool()}
	for rest := []byte(text); ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return a
		}
		if cert, err := x509.ParseCertificate(block.Bytes); err == nil {
			a.pool.AddCert(cert)
			a.all = append(a.all, cert)
		}
	}
}

// String names the CA so that it can be told from another of the same name.
func (a authority) String() string {
	names := make([]string, len(a.all))
	for i, c := range a.all {
		names[i] = fmt.Sprintf("%q (key %s)", c.Subject, fingerprint(c))
	}
	return strings.Join(names, ", ")
}

func fingerprint(c *x509.Certificate) string {
	return fmt.Sprintf("%.4x", sha256.Sum256(c.RawSubjectPublicKeyInfo))
}

// newAPIServer returns a client. With anyDate, certificates out of date are
// accepted: it is for asking the time, and carries no token.
func (r *run) newAPIServer(anyDate bool) (*apiServer, error) {
	u, err := url.Parse(r.config.Cluster.Endpoint)
	if err != nil {
		return nil, err
	}
	s := &apiServer{endpoint: "https://" + u.Host, host: u.Hostname(), authority: parseAuthority(r.config.Cluster.CertificateAuthority)}
	if !anyDate {
		s.token = r.config.Cluster.BootstrapToken
	}
	s.client = &http.Client{
		Transport: &http.Transport{
			// No proxy: the API server is in the VPC, and a token is under way.
			DialContext: r.Dial,
			TLSClientConfig: &tls.Config{
				MinVersion: tls.VersionTLS12,
				// Verified in VerifyConnection, as strictly, with better words.
				InsecureSkipVerify: true,
				VerifyConnection:   func(cs tls.ConnectionState) error { return s.verify(cs, anyDate) },
			},
			IdleConnTimeout: 30 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return s, nil
}

func (s *apiServer) close() { s.client.CloseIdleConnections() }

// verify checks the API server's certificate.
func (s *apiServer) verify(cs tls.ConnectionState, anyDate bool) error {
	leaf := cs.PeerCertificates[0]
	// Not cs.ServerName, which is empty when the host is an address.
	opts := x509.VerifyOptions{Roots: s.pool, Intermediates: x509.NewCertPool(), DNSName: s.host, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, c := range cs.PeerCertificates[1:] {
		opts.Intermediates.AddCert(c)
	}
	_, err := leaf.Verify(opts)
	if anyDate {
		// Chains begin to be in date when one of their certificates does.
		for _, c := range append([]*x509.Certificate{leaf}, s.all...) {
			if outOfDate(err) {
				opts.CurrentTime = c.NotBefore
				_, err = leaf.Verify(opts)
			}
		}
	}
	return s.distrust(leaf, err, !anyDate)
}

func outOfDate(err error) bool {
	e, ok := errors.AsType[x509.CertificateInvalidError](err)
	return ok && e.Reason == x509.Expired
}

// distrust says why a certificate is not trusted, and what to do about it. That
// the clock is right is proven or not.
func (s *apiServer) distrust(leaf *x509.Certificate, err error, clock bool) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok && clock && outOfDate(err) && slices.ContainsFunc(s.all, e.Cert.Equal) {
		return node.Terminal(ReasonUntrusted, "write the CA certificate that the cluster has now",
			fmt.Errorf("API server %s: its certificate is issued by cluster.certificateAuthority %q (key %s), which is valid %s: it is %s here",
				s.endpoint, e.Cert.Subject, fingerprint(e.Cert), validity(e.Cert), stamp(time.Now())))
	}
	if outOfDate(err) {
		return &node.Error{Class: node.ClassWaiting, Reason: ReasonUntrusted, Fix: "renew the certificate that is out of date",
			Err: fmt.Errorf("API server %s: its certificate, valid %s, or its CA's is not in date: it is %s here",
				s.endpoint, validity(leaf), stamp(time.Now()))}
	}
	if _, ok := errors.AsType[x509.HostnameError](err); ok {
		return node.Terminal(ReasonUntrusted, "use one of those names in cluster.endpoint",
			fmt.Errorf("API server %s: its certificate is for %s, not for %s", s.endpoint, namesOf(leaf), s.host))
	}
	why := ""
	if slices.ContainsFunc(s.all, func(c *x509.Certificate) bool { return bytes.Equal(c.RawSubject, leaf.RawIssuer) }) {
		why = ": the same name, another key"
	}
	return node.Terminal(ReasonUntrusted, "cluster.certificateAuthority must be the CA of the cluster that cluster.endpoint belongs to",
		fmt.Errorf("API server %s: its certificate is issued by %q, not by cluster.certificateAuthority %s%s", s.endpoint, leaf.Issuer, s.authority, why))
}

func validity(c *x509.Certificate) string { return stamp(c.NotBefore) + " to " + stamp(c.NotAfter) }

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func namesOf(c *x509.Certificate) string {
	names := c.DNSNames
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}

// maxAnswer bounds what is read of an answer; a CertificateSigningRequest has
// some kilobytes.
const maxAnswer = 1 << 20

// call sends in, if it is not nil, and decodes a 2xx answer into out. The error
// of another answer is a *refusal.
func (s *apiServer) call(ctx context.Context, method, path string, in, out any) (http.Header, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.endpoint+path, body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if !s.token.IsZero() {
		req.Header.Set("Authorization", "Bearer "+s.token.Reveal())
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, s.unreachable(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, s.unreachable(err)
	}
	if resp.StatusCode/100 != 2 {
		return resp.Header, newRefusal(resp.StatusCode, b)
	}
	if out != nil {
		if err := json.Unmarshal(b, out); err != nil {
			return nil, s.ailing(fmt.Errorf("what is not JSON: %w", err))
		}
	}
	return resp.Header, nil
}

// ailing is for an answer that only a fault explains, its own or a load balancer's.
func (s *apiServer) ailing(err error) error {
	return &node.Error{Class: node.ClassWaiting, Reason: ReasonUnreachable,
		Fix: "check the API server and the load balancer in front of it", Err: fmt.Errorf("API server %s answers %w", s.endpoint, err)}
}

// unreachable gives an error of the connection its class, unless verify did.
func (s *apiServer) unreachable(err error) error {
	if e, ok := errors.AsType[*node.Error](err); ok {
		return e
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err // without method and URL, which nobody asked about
	}
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("nothing came within %s", apiTimeout)
	}
	return &node.Error{Class: node.ClassWaiting, Reason: ReasonUnreachable,
		Fix: "check the route, the security groups and the load balancer between this node and it",
		Err: fmt.Errorf("API server %s does not answer: %w", s.endpoint, err)}
}

// refusal is an answer of the API server that is not a success.
type refusal struct {
	code    int
	message string
}

func (e *refusal) Error() string {
	if e.message == "" || e.message == http.StatusText(e.code) {
		return fmt.Sprintf("%d %s", e.code, http.StatusText(e.code))
	}
	return fmt.Sprintf("%d %s: %s", e.code, http.StatusText(e.code), e.message)
}

// newRefusal takes the message out of a metav1.Status, or the beginning of
// whatever else it is.
func newRefusal(code int, body []byte) *refusal {
	var status struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &status) != nil {
		status.Message = string(body)
	}
	message := strings.Join(strings.Fields(strings.ToValidUTF8(status.Message, "")), " ")
	if len(message) > 300 {
		message = message[:300] + "…"
	}
	return &refusal{code: code, message: message}
}
