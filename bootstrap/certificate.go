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
	if err := r.sweep(); err != nil {
		return err
	}
	file := now.Format("kubelet-client-2006-01-02-15-04-05.pem")
	if err := writeFile(filepath.Join(r.path(node.KubeletPKI), file), pair, 0o600); err != nil {
		return err
	}
	return replaceLink(file, r.path(node.ClientCertPath))
}

// sweep removes keys that were never in force: who writes one, kubelet as well,
// makes the link to it next, so that one newer than the link's has lost its writer.
func (r *run) sweep() error {
	current, err := os.Readlink(r.path(node.ClientCertPath))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	files, err := filepath.Glob(filepath.Join(r.path(node.KubeletPKI), "kubelet-client-[0-9]*.pem"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if filepath.Base(f) > filepath.Base(current) {
			if err := os.Remove(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkCertificate says why the node's certificate is not one to go on with.
func (r *run) checkCertificate() error {
	b, err := os.ReadFile(r.path(node.ClientCertPath))
	if err != nil {
		return err
	}
	return checkPair(b, userName(r.config.Name(r.facts)), parseAuthority(r.config.Cluster.CertificateAuthority), time.Now())
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
