package kube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

const (
	certLife = 10 * 365 * 24 * time.Hour
	// backdate lets nodes in whose clock is a little behind, as the signer of a
	// cluster that has been there for a while would.
	backdate = time.Hour
)

// authority is a certificate authority that lives as long as its cluster.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(name string) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certTemplate(pkix.Name{CommonName: name})
	template.IsCA = true
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key}, err
}

// certTemplate leaves the serial number to CreateCertificate.
func certTemplate(subject pkix.Name) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{Subject: subject, NotBefore: now.Add(-backdate), NotAfter: now.Add(certLife)}
}

// issue signs a certificate for a new key and returns both as PEM.
func (a *authority) issue(template *x509.Certificate) (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, k.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	key, err = encodeKey(k)
	return encodeCert(der), key, err
}

// client returns a certificate for the user and groups that the API server
// takes from a subject.
func client(user string, groups ...string) *x509.Certificate {
	t := certTemplate(pkix.Name{CommonName: user, Organization: groups})
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return t
}

func server(name string, dns []string, ips []net.IP) *x509.Certificate {
	t := certTemplate(pkix.Name{CommonName: name})
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	t.DNSNames, t.IPAddresses = dns, ips
	return t
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// encodeKey writes the form out of which the API server can also read the public
// half.
func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

// pki is every key and certificate of a control plane, written below dir as
// <name>.crt and <name>.key.
type pki struct {
	dir string
	ca  []byte // certificate of the cluster's authority, PEM
}

func (p pki) cert(name string) string { return filepath.Join(p.dir, name+".crt") }
func (p pki) key(name string) string  { return filepath.Join(p.dir, name+".key") }

func (p pki) write(name string, cert, key []byte) error {
	if err := os.WriteFile(p.cert(name), cert, 0o644); err != nil {
		return err
	}
	return os.WriteFile(p.key(name), key, 0o600)
}

// newPKI makes the authorities and signs what the control plane needs. names
// and ips are those by which the API server is reached.
func newPKI(dir string, dns []string, ips []net.IP) (pki, error) {
	p := pki{dir: dir}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return p, err
	}
	for _, a := range []struct {
		name, subject string
		certs         map[string]*x509.Certificate
	}{
		{"ca", "kubernetes", map[string]*x509.Certificate{
			"apiserver": server("kube-apiserver", dns, ips),
			"kubelet":   client(kubeletClient),
			"admin":     client("lab-admin", "system:masters"),
			"manager":   client("system:kube-controller-manager"),
			"scheduler": client("system:kube-scheduler"),
		}},
		{"front-proxy-ca", "front-proxy", map[string]*x509.Certificate{
			"front-proxy": client(frontProxyClient),
		}},
	} {
		ca, err := p.writeAuthority(a.name, a.subject, a.certs)
		if err != nil {
			return p, fmt.Errorf("make the certificates of %s: %w", a.name, err)
		}
		if a.name == "ca" {
			p.ca = ca
		}
	}
	return p, p.writeTokenKey()
}

func (p pki) writeAuthority(name, subject string, certs map[string]*x509.Certificate) ([]byte, error) {
	a, err := newAuthority(subject)
	if err != nil {
		return nil, err
	}
	key, err := encodeKey(a.key)
	if err != nil {
		return nil, err
	}
	ca := encodeCert(a.cert.Raw)
	if err := p.write(name, ca, key); err != nil {
		return nil, err
	}
	for name, template := range certs {
		cert, key, err := a.issue(template)
		if err != nil {
			return nil, err
		}
		if err := p.write(name, cert, key); err != nil {
			return nil, err
		}
	}
	return ca, nil
}

// issueNode signs a client certificate of a node and returns it with its key, as
// kubelet keeps them: one PEM file.
func (p pki) issueNode(name string) ([]byte, error) {
	pair, err := tls.LoadX509KeyPair(p.cert("ca"), p.key("ca"))
	if err != nil {
		return nil, err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("the authority's key is a %T", pair.PrivateKey)
	}
	ca := &authority{pair.Leaf, key}
	certPEM, keyPEM, err := ca.issue(client("system:node:"+name, "system:nodes"))
	return append(certPEM, keyPEM...), err
}

// tokenKey is the key that signs the tokens of service accounts.
const tokenKey = "service-account"

func (p pki) writeTokenKey() error {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	key, err := encodeKey(k)
	if err != nil {
		return err
	}
	return os.WriteFile(p.key(tokenKey), key, 0o600)
}
