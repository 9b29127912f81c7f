package bootstrap

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// authorityPair is a CA that signs.
type authorityPair struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newCA(t *testing.T, name string) *authorityPair {
	t.Helper()
	key := newKey(t)
	a := &authorityPair{key: key}
	a.cert = a.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
	}, key.Public())
	a.pem = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
	return a
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var serial = big.NewInt(1)

// sign issues a certificate; a CA without one signs itself.
func (a *authorityPair) sign(t *testing.T, template *x509.Certificate, public any) *x509.Certificate {
	t.Helper()
	template.SerialNumber = serial
	parent := a.cert
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// fakeCluster is an API server with what bootstrap asks of it: real TLS, tokens,
// and certificate requests that are approved and signed by rules that a test sets.
type fakeCluster struct {
	t  *testing.T
	ca *authorityPair

	// What a test may set before the first Run, or change under mu.
	mu          sync.Mutex
	serverCA    *authorityPair // issues the serving certificate; nil: ca
	serverName  string         // of the serving certificate; default: the endpoint's address
	serverFrom  time.Time      // its NotBefore
	clientCA    *authorityPair // signs client certificates; nil: ca
	lifetime    time.Duration  // of client certificates
	refuseDial  func() error
	clockSkew   func() time.Duration
	token       string
	warm        time.Time         // before it, every token is refused
	answer      func() (int, any) // instead of taking a request; 0: take it
	delay       time.Duration     // before each answer
	approveIn   time.Duration
	commonName  string // that is signed instead of the one asked for
	condition   string // Denied, Failed: instead of a certificate
	neverSigned bool
	loseAnswers int // this many POSTs are carried out and their answers lost

	requests map[string]*fakeRequest
	log      []string // method, path
}

type fakeRequest struct {
	certificateRequest
	posted time.Time
}

func newFakeCluster(t *testing.T) *fakeCluster {
	return &fakeCluster{t: t, ca: newCA(t, "kubernetes"), token: "abcdef.0123456789abcdef", lifetime: 365 * 24 * time.Hour, requests: map[string]*fakeRequest{}}
}

// serve runs the API server until the test ends, and returns the way to it.
func (c *fakeCluster) serve() func(context.Context, string, string) (net.Conn, error) {
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	srv := &http.Server{Handler: c, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(tls.NewListener(l, &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return c.servingCertificate(), nil }}))
	}()
	c.t.Cleanup(func() { srv.Close(); <-done })
	return func(ctx context.Context, _, address string) (net.Conn, error) {
		if address != "10.0.0.10:6443" {
			c.t.Errorf("dials %s", address)
		}
		if c.refuseDial != nil {
			if err := c.refuseDial(); err != nil {
				return nil, &net.OpError{Op: "dial", Net: "tcp", Err: err}
			}
		}
		client, server := net.Pipe()
		select {
		case l.conns <- buffered(server):
			return client, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// bufferedConn lets its owner write without being read, as TCP does: two ends of
// a TLS handshake that fails would else wait for each other.
type bufferedConn struct {
	net.Conn
	queue  chan []byte
	closed chan struct{}
	once   sync.Once
}

func buffered(c net.Conn) net.Conn {
	b := &bufferedConn{Conn: c, queue: make(chan []byte, 64), closed: make(chan struct{})}
	go func() {
		for {
			select {
			case p := <-b.queue:
				if _, err := c.Write(p); err != nil {
					return
				}
			case <-b.closed:
				return
			}
		}
	}()
	return b
}

func (b *bufferedConn) Write(p []byte) (int, error) {
	select {
	case b.queue <- slices.Clone(p):
		return len(p), nil
	case <-b.closed:
		return 0, net.ErrClosed
	}
}

func (b *bufferedConn) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Conn.Close()
}

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }

func (c *fakeCluster) servingCertificate() *tls.Certificate {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := newKey(c.t)
	template := &x509.Certificate{
		Subject:   pkix.Name{CommonName: "kube-apiserver"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(10, 0, 0, 10)},
	}
	if c.serverName != "" {
		template.IPAddresses, template.DNSNames = nil, []string{c.serverName}
	}
	if !c.serverFrom.IsZero() {
		template.NotBefore = c.serverFrom
		template.NotAfter = c.serverFrom.Add(time.Hour)
	}
	issuer := c.ca
	if c.serverCA != nil {
		issuer = c.serverCA
	}
	return &tls.Certificate{Certificate: [][]byte{issuer.sign(c.t, template, key.Public()).Raw}, PrivateKey: key}
}

func (c *fakeCluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	delay := c.delay
	c.mu.Unlock()
	// Without the lock: a bubble's time stands still while somebody waits for one.
	select {
	case <-time.After(delay):
	case <-r.Context().Done():
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log = append(c.log, r.Method+" "+r.URL.Path)
	if c.clockSkew != nil {
		w.Header().Set("Date", time.Now().Add(c.clockSkew()).UTC().Format(http.TimeFormat))
	}
	if r.URL.Path == "/version" {
		if r.Header.Get("Authorization") != "" {
			c.t.Error("the token is sent to a server whose dates are not verified")
		}
		c.status(w, http.StatusForbidden, "forbidden: User \"system:anonymous\" cannot get path \"/version\"")
		return
	}
	if r.Header.Get("Authorization") != "Bearer "+c.token || time.Now().Before(c.warm) {
		c.status(w, http.StatusUnauthorized, "Unauthorized")
		return
	}
	if c.answer != nil {
		if code, body := c.answer(); code != 0 {
			c.json(w, code, body)
			return
		}
	}
	switch name := strings.TrimPrefix(r.URL.Path, requestsPath+"/"); {
	case r.Method == http.MethodPost && r.URL.Path == requestsPath:
		c.create(w, r)
	case r.Method == http.MethodGet && c.requests[name] != nil:
		c.json(w, http.StatusOK, c.advance(c.requests[name]))
	default:
		c.status(w, http.StatusNotFound, "not found")
	}
}

func (c *fakeCluster) create(w http.ResponseWriter, r *http.Request) {
	var q fakeRequest
	if err := json.NewDecoder(r.Body).Decode(&q.certificateRequest); err != nil {
		c.status(w, http.StatusBadRequest, err.Error())
		return
	}
	if problem := c.invalid(q.certificateRequest); problem != "" {
		c.status(w, http.StatusUnprocessableEntity, problem)
		return
	}
	if c.requests[q.Metadata.Name] != nil {
		c.status(w, http.StatusConflict, "already exists")
		return
	}
	q.posted = time.Now()
	c.requests[q.Metadata.Name] = &q
	if c.loseAnswers > 0 {
		c.loseAnswers--
		panic(http.ErrAbortHandler)
	}
	c.json(w, http.StatusCreated, q.certificateRequest)
}

// invalid checks what the API server, and the approver of node client
// certificates, check.
// Source: k8s.io/kubernetes/pkg/apis/certificates/helpers.go, ValidateKubeletClientCSR
func (c *fakeCluster) invalid(q certificateRequest) string {
	block, rest := pem.Decode(q.Spec.Request)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
		return "spec.request is not one PEM block"
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	switch {
	case err != nil:
		return err.Error()
	case csr.CheckSignature() != nil:
		return "signature"
	case !slices.Equal(csr.Subject.Organization, []string{"system:nodes"}) || !strings.HasPrefix(csr.Subject.CommonName, "system:node:"):
		return "subject " + csr.Subject.String()
	case len(csr.DNSNames)+len(csr.IPAddresses)+len(csr.EmailAddresses)+len(csr.URIs) > 0:
		return "alternative names"
	case q.Spec.SignerName != "kubernetes.io/kube-apiserver-client-kubelet" || q.APIVersion != "certificates.k8s.io/v1" || q.Kind != "CertificateSigningRequest":
		return "signer or kind"
	case !slices.Equal(q.Spec.Usages, []string{"digital signature", "client auth"}):
		return "usages"
	}
	return ""
}

// advance approves and signs a request whose time has come.
func (c *fakeCluster) advance(q *fakeRequest) certificateRequest {
	out := q.certificateRequest
	if time.Since(q.posted) < c.approveIn {
		return out
	}
	condition := "Approved"
	if c.condition != "" {
		condition = c.condition
	}
	out.Status.Conditions = append(out.Status.Conditions, struct {
		Type    string `json:"type"`
		Reason  string `json:"reason"`
		Message string `json:"message"`
	}{condition, "ByTest", "because the test says so"})
	if c.condition != "" || c.neverSigned {
		return out
	}
	block, _ := pem.Decode(q.Spec.Request)
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		c.t.Error(err)
		return out
	}
	signer := c.ca
	if c.clientCA != nil {
		signer = c.clientCA
	}
	subject := csr.Subject
	if c.commonName != "" {
		subject.CommonName = c.commonName
	}
	cert := signer.sign(c.t, &x509.Certificate{
		Subject: subject, NotBefore: time.Now().Add(-5 * time.Minute), NotAfter: time.Now().Add(c.lifetime),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, csr.PublicKey)
	out.Status.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})
	return out
}

func (c *fakeCluster) status(w http.ResponseWriter, code int, message string) {
	c.json(w, code, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code})
}

func (c *fakeCluster) json(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	if err := json.NewEncoder(w).Encode(body); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		c.t.Logf("answer: %v", err)
	}
}
