package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// serve answers HTTP, or HTTPS where there is a certificate, at an address of the
// VPC until the lab stops.
func (l *Lab) serve(name string, at netip.AddrPort, certificate *tls.Certificate, h http.Handler) error {
	listener, err := l.Net.Listen(at)
	if err != nil {
		return fmt.Errorf("listen for %s: %w", name, err)
	}
	if certificate != nil {
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{*certificate}})
	}
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(l.log.With("part", name).Handler(), slog.LevelDebug),
	}
	l.servers.Go(func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			l.log.Error("server ended", "part", name, "err", err)
		}
	})
	l.onStop(func(context.Context) error { return server.Close() })
	return nil
}

// forward passes connections to an address of the VPC on to a process of the lab
// on the loopback interface, until stop is called or the lab stops.
func (l *Lab) forward(at netip.AddrPort, to string) (stop func() error, err error) {
	listener, err := l.Net.Listen(at)
	if err != nil {
		return nil, fmt.Errorf("listen for %s: %w", to, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	l.servers.Go(func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			l.servers.Go(func() {
				if err := splice(ctx, in, to); err != nil {
					l.log.Debug("connection ended", "at", at, "err", err)
				}
			})
		}
	})
	stop = sync.OnceValue(func() error { cancel(); return listener.Close() })
	l.onStop(func(context.Context) error { return stop() })
	return stop, nil
}

// splice copies both ways between in and a new connection to the address, until
// both directions have ended or ctx does.
func splice(ctx context.Context, in net.Conn, to string) error {
	defer in.Close()
	out, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", to)
	if err != nil {
		return err
	}
	defer out.Close()
	return Splice(ctx, in, out)
}

// Splice copies both ways between two connections until both directions have
// ended or ctx does. It closes neither, but passes an end of file on.
func Splice(ctx context.Context, a, b net.Conn) error {
	stop := context.AfterFunc(ctx, func() { a.Close(); b.Close() })
	defer stop()
	var wg sync.WaitGroup
	pass := func(dst, src net.Conn) {
		_, _ = io.Copy(dst, src) // its error is that one side is gone, which is how connections end
		if c, ok := dst.(interface{ CloseWrite() error }); ok {
			_ = c.CloseWrite()
			return
		}
		dst.Close()
	}
	wg.Go(func() { pass(a, b) })
	wg.Go(func() { pass(b, a) })
	wg.Wait()
	return context.Cause(ctx)
}

// authority signs the certificate of the lab's cloud API.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pem  string
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make CA key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "tkelab cloud API CA"},
		NotBefore:             now.Add(-24 * time.Hour), // guests' clocks may be behind
		NotAfter:              now.AddDate(1, 0, 0),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make CA certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse CA certificate: %w", err)
	}
	return &authority{key, cert, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}, nil
}

// issue returns a server certificate for the name.
func (a *authority) issue(name string) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make key of %s: %w", name, err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name},
		NotBefore:    a.cert.NotBefore,
		NotAfter:     a.cert.NotAfter,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", name, err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}
