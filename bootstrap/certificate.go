package bootstrap

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// writeCertificate stores certificate and key as kubelet itself does when it
// rotates them: both in one dated file, with a link to the current one.
// Source: k8s.io/client-go/util/certificate/certificate_store.go
func (r *run) writeCertificate(chain []byte, key *ecdsa.PrivateKey, now time.Time) error {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return fmt.Errorf("encode key: %w", err)
	}
	pair := append(bytes.TrimRight(chain, "\n"), '\n')
	pair = append(pair, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})...)
	if err := os.MkdirAll(r.path(node.KubeletPKI), 0o755); err != nil {
		return err
	}
	file := now.Format("kubelet-client-2006-01-02-15-04-05.pem")
	if err := writeFile(filepath.Join(r.path(node.KubeletPKI), file), pair, 0o600); err != nil {
		return err
	}
	return replaceLink(file, r.path(node.ClientCertPath))
}

// certificateGood reports whether the node has a certificate to go on with. When
// it has not, another is asked for, and whether that works is for the token to say.
func (r *run) certificateGood(s node.Sealed) bool {
	b, err := os.ReadFile(r.path(node.ClientCertPath))
	if err == nil {
		err = checkPair(b, userName(s.Config.Name(s.Facts)), parseAuthority(s.Config.Cluster.CertificateAuthority), time.Now())
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		r.ledger.say("sealed already, and without a certificate: asking for one")
	case err != nil:
		r.ledger.say("kubelet's certificate cannot be used, asking for another: %v", err)
	}
	return err == nil
}

// checkPair checks what kubelet's current file holds.
func checkPair(b []byte, commonName string, ca authority, now time.Time) error {
	pair, err := tls.X509KeyPair(b, b)
	if err != nil {
		return err
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return fmt.Errorf("its key is a %T", pair.PrivateKey)
	}
	_, err = verifyClient(b, key.Public(), commonName, ca, now)
	return err
}
