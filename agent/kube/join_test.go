package kube

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// authority is a CA for tests.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{key: key}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// issue returns certificate and key in one PEM, as kubelet keeps them.
func (a *authority) issue(t *testing.T, name string, serial int64, from, to time.Time) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name, Organization: []string{"system:nodes"}},
		NotBefore: from, NotAfter: to, DNSNames: []string{"localhost"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: k})...)
}

func TestJoin(t *testing.T) {
	a := newAuthority(t)
	hour := func(n int) time.Time { return time.Now().Add(time.Duration(n) * time.Hour) }
	const name = "10.0.0.5"
	tests := map[string]struct {
		cert   []byte
		report string
		want   string // class, reason, and what the message must hold
	}{
		"good":       {cert: a.issue(t, "system:node:10.0.0.5", 2, hour(-1), hour(1))},
		"other node": {cert: a.issue(t, "system:node:10.0.0.9", 2, hour(-1), hour(1)), want: `terminal WrongIdentity "system:node:10.0.0.9", this node is "system:node:10.0.0.5"; remove it`},
		"expired":    {cert: a.issue(t, "system:node:10.0.0.5", 2, hour(-2), hour(-1)), want: "terminal CertificateExpired has expired at"},
		"too early":  {cert: a.issue(t, "system:node:10.0.0.5", 2, hour(1), hour(2)), want: "waiting ClockBehind is valid from"},
		"damaged":    {cert: []byte("-----BEGIN CERT"), want: "terminal CertificateDamaged systemctl restart tkenode-bootstrap"},
		"empty":      {cert: []byte{}, want: "terminal CertificateDamaged"},
		"nothing":    {want: "waiting NotBootstrapped bootstrap has not run in this boot"},
		"signing":    {report: `{"phase":"wait for the certificate"}`, want: "waiting Joining bootstrap is at: wait for the certificate"},
		"retrying":   {report: `{"phase":"probe","class":"transient","reason":"Unreachable","message":"dial tcp: timeout"}`, want: "waiting Unreachable dial tcp: timeout"},
		"refused":    {report: `{"phase":"probe","class":"terminal","reason":"TokenInvalid","message":"the token is expired"}`, want: "terminal TokenInvalid the token is expired"},
		"lost":       {report: `{"phase":"done","done":true}`, want: "terminal CertificateMissing bootstrap has ended and"},
		"torn":       {report: `{"phase":`, want: "transient - read bootstrap's report: unexpected end"},
	}
	for title, tt := range tests {
		t.Run(title, func(t *testing.T) {
			dir := t.TempDir()
			j := NewJoin(name)
			j.cert, j.report = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "report.json")
			if tt.cert != nil {
				write(t, j.cert, tt.cert)
			}
			if tt.report != "" {
				write(t, j.report, []byte(tt.report))
			}
			p, err := j.Plan(t.Context())
			if tt.want == "" {
				if err != nil || !p.Empty() || p.Again < 59*time.Minute || p.Again > time.Hour {
					t.Errorf("again after %s, %v", p.Again, err)
				}
				return
			}
			got := fmt.Sprintf("%s %s %v", node.ClassOf(err), node.ReasonOf(err, "-"), err)
			head, tail := split(tt.want)
			if err == nil || !strings.HasPrefix(got, head) || !strings.Contains(got, tail) {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// split cuts after the second word.
func split(s string) (head, tail string) {
	words := strings.SplitN(s, " ", 3)
	if len(words) > 2 {
		tail = words[2]
	}
	return words[0] + " " + words[1], tail
}

func write(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestWatchFiles makes a file appear where not even its directories are, then
// replaces it as kubelet does, by its link.
func TestWatchFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "lib", "kubelet", "pki", "current.pem")
	ctx, cancel := context.WithCancel(t.Context())
	woken, ended := make(chan struct{}, 100), make(chan error, 1)
	go func() {
		ended <- watchFiles(ctx, func() { woken <- struct{}{} }, path, filepath.Join(dir, "run", "report"))
	}()
	expect := func(what string) {
		t.Helper()
		select {
		case <-woken:
		case err := <-ended:
			t.Fatalf("ended before %s: %v", what, err)
		case <-time.After(time.Minute):
			t.Fatalf("not woken by %s", what)
		}
	}
	quiet := func(what string) {
		t.Helper()
		select {
		case <-woken:
			t.Fatalf("woken by %s", what)
		case <-time.After(50 * time.Millisecond):
		}
	}
	expect("the start, before which something may have changed")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(filepath.Dir(path), "1.pem"), []byte("one"))
	quiet("a directory and another file")
	if err := os.Symlink("1.pem", path); err != nil {
		t.Fatal(err)
	}
	expect("the file")
	write(t, filepath.Join(filepath.Dir(path), "2.pem"), []byte("two"))
	if err := errors.Join(os.Symlink("2.pem", path+".new"), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
	expect("the rotation")
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "run", "report"), []byte("{}"))
	expect("the other file")
	if err := os.RemoveAll(filepath.Join(dir, "lib")); err != nil {
		t.Fatal(err)
	}
	expect("the removal")
	for len(woken) > 0 {
		<-woken
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, path, []byte("three"))
	expect("the return")
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
}
