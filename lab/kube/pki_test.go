package kube

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func testPKI(t *testing.T) pki {
	t.Helper()
	p, err := newPKI(filepath.Join(t.TempDir(), "pki"), []string{"kubernetes.default"}, []net.IP{net.IPv4(10, 0, 0, 10)})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func leaf(t *testing.T, p pki, name string) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(p.cert(name), p.key(name))
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf
}

func TestPKI(t *testing.T) {
	p := testPKI(t)
	for _, c := range []struct {
		name, ca, user string
		groups         []string
		usage          x509.ExtKeyUsage
		host           string
	}{
		{"apiserver", "ca", "kube-apiserver", nil, x509.ExtKeyUsageServerAuth, "10.0.0.10"},
		{"apiserver", "ca", "kube-apiserver", nil, x509.ExtKeyUsageServerAuth, "kubernetes.default"},
		{"admin", "ca", "lab-admin", []string{"system:masters"}, x509.ExtKeyUsageClientAuth, ""},
		{"manager", "ca", "system:kube-controller-manager", nil, x509.ExtKeyUsageClientAuth, ""},
		{"scheduler", "ca", "system:kube-scheduler", nil, x509.ExtKeyUsageClientAuth, ""},
		{"kubelet", "ca", kubeletClient, nil, x509.ExtKeyUsageClientAuth, ""},
		{"front-proxy", "front-proxy-ca", frontProxyClient, nil, x509.ExtKeyUsageClientAuth, ""},
	} {
		cert := leaf(t, p, c.name)
		roots := x509.NewCertPool()
		roots.AddCert(leaf(t, p, c.ca))
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: c.host, KeyUsages: []x509.ExtKeyUsage{c.usage}}); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if cert.Subject.CommonName != c.user || len(cert.Subject.Organization) != len(c.groups) ||
			len(c.groups) == 1 && cert.Subject.Organization[0] != c.groups[0] {
			t.Errorf("%s is %v", c.name, cert.Subject)
		}
		if cert.IsCA || cert.NotAfter.Before(time.Now().Add(certLife-time.Hour)) {
			t.Errorf("%s: CA %v, until %v", c.name, cert.IsCA, cert.NotAfter)
		}
	}
}

func TestIssueNode(t *testing.T) {
	p := testPKI(t)
	both, err := p.issueNode("10.0.0.200")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(both, both)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.ca)
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if s := pair.Leaf.Subject; s.CommonName != "system:node:10.0.0.200" || len(s.Organization) != 1 || s.Organization[0] != "system:nodes" {
		t.Errorf("it is %v", s)
	}
}

// A front proxy may say who the user is, so its authority must not be the
// cluster's.
func TestAuthoritiesAreApart(t *testing.T) {
	p := testPKI(t)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.ca)
	_, err := leaf(t, p, "front-proxy").Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err == nil {
		t.Error("the cluster's authority vouches for the front proxy")
	}
}

func TestKeysArePrivate(t *testing.T) {
	p := testPKI(t)
	keys, err := filepath.Glob(filepath.Join(p.dir, "*.key"))
	if err != nil || len(keys) != 9 {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	for _, path := range keys {
		fi, err := os.Stat(path)
		if err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, fi.Mode(), err)
		}
	}
}
