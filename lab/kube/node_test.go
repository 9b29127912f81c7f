//go:build node

package kube

import (
	"bytes"
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
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/images"
)

const signingDuration = 24 * time.Hour

func binDir(t *testing.T) string {
	t.Helper()
	cache, err := images.CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(cache, "components", "bin")
}

// vpc stands for the VPC: every address in it is one fake kubelet.
type vpc struct {
	kubelet atomic.Pointer[httptest.Server]
	dialled atomic.Pointer[string]
}

func (v *vpc) dial(ctx context.Context, network, address string) (net.Conn, error) {
	v.dialled.Store(&address)
	kubelet := v.kubelet.Load()
	if kubelet == nil {
		return nil, errors.New("no route to " + address)
	}
	return (&net.Dialer{}).DialContext(ctx, network, kubelet.Listener.Addr().String())
}

func TestNodeControlPlane(t *testing.T) {
	dir := filepath.Join(shortDir(t), "kube")
	v := &vpc{}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	began := time.Now()
	c, err := Start(ctx, Options{
		Dir: dir, Bin: binDir(t),
		Address:         netip.MustParseAddrPort("10.0.0.10:6443"),
		ServiceCIDR:     netip.MustParsePrefix("172.16.0.0/20"),
		SigningDuration: signingDuration,
		Dial:            v.dial,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("started in %v", time.Since(began).Round(time.Millisecond))
	stopped := false
	defer func() {
		if !stopped {
			c.Stop()
		}
	}()

	t.Run("join", func(t *testing.T) { testJoin(ctx, t, c) })
	t.Run("tokens that are refused", func(t *testing.T) { testRefusedTokens(ctx, t, c) })
	t.Run("kubelet through the VPC", func(t *testing.T) { testKubelet(ctx, t, c, v) })
	t.Run("address told to pods", func(t *testing.T) { testEndpoints(ctx, t, c) })
	t.Run("failure", func(t *testing.T) { testFailure(t, c, dir) })

	if err := c.Stop(); err != nil {
		t.Error(err)
	}
	stopped = true
	if left := processesOf(t, dir); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}

// as returns a client of the API server that trusts the cluster's authority and
// is whoever config and token say.
func as(t *testing.T, c *Cluster, token string, certs ...tls.Certificate) *Cluster {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(c.CACert()) {
		t.Fatal("no certificate in CACert")
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: certs}}
	t.Cleanup(transport.CloseIdleConnections)
	return &Cluster{address: c.address, client: &http.Client{Transport: bearer{token, transport}}}
}

type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	if b.token != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+b.token)
	}
	return b.next.RoundTrip(r)
}

const csrs = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

func newCSR(t *testing.T, nodeName string) (*ecdsa.PrivateKey, map[string]any) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "system:node:" + nodeName, Organization: []string{"system:nodes"}},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, map[string]any{
		"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
		"metadata": map[string]any{"generateName": "node-csr-"},
		"spec": map[string]any{
			"request":    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
			"signerName": "kubernetes.io/kube-apiserver-client-kubelet",
			"usages":     []string{"digital signature", "client auth"},
		},
	}
}

// enrol gets a certificate as a node does.
func enrol(ctx context.Context, t *testing.T, c *Cluster, token node.Secret, name string) tls.Certificate {
	t.Helper()
	joiner := as(t, c, token.Reveal())
	key, request := newCSR(t, name)
	var csr struct {
		Metadata struct{ Name string }
		Status   struct{ Certificate []byte }
	}
	if err := joiner.Do(ctx, http.MethodPost, csrs, request, &csr); err != nil {
		t.Fatal(err)
	}
	err := joiner.watch(ctx, csrs+"?"+selectName(csr.Metadata.Name), func(object json.RawMessage, _ bool) (bool, error) {
		err := json.Unmarshal(object, &csr)
		return len(csr.Status.Certificate) > 0, err
	})
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := encodeKey(key)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(csr.Status.Certificate, encoded)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

func testJoin(ctx context.Context, t *testing.T, c *Cluster) {
	token, err := c.NewBootstrapToken(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	pair := enrol(ctx, t, c, token, "10.0.0.5")
	t.Logf("certificate after %v", time.Since(began).Round(time.Millisecond))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(c.CACert())
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	if life := time.Until(pair.Leaf.NotAfter); life > signingDuration || life < signingDuration-10*time.Minute {
		t.Errorf("the certificate is valid for %v, not %v", life, signingDuration)
	}

	self := as(t, c, "", pair)
	newNode := func(name string) map[string]any {
		return map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": name}}
	}
	if err := self.Do(ctx, http.MethodPost, "/api/v1/nodes", newNode("10.0.0.5"), nil); err != nil {
		t.Errorf("a node could not register: %v", err)
	}
	wantStatus(t, self.Do(ctx, http.MethodPost, "/api/v1/nodes", newNode("10.0.0.6"), nil), http.StatusForbidden)
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := c.WaitNodeReady(short, "10.0.0.5"); err == nil || !strings.Contains(err.Error(), "Ready is Unknown") {
		t.Errorf("a node without kubelet: %v", err)
	}
}

func testRefusedTokens(ctx context.Context, t *testing.T, c *Cluster) {
	expired, err := c.NewBootstrapToken(ctx, -time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	valid, err := c.NewBootstrapToken(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, token := range map[string]string{
		"expired": expired.Reveal(), "unknown": "abcdef.0123456789abcdef", "wrong secret": valid.Reveal()[:7] + "0123456789abcdef",
	} {
		_, request := newCSR(t, "10.0.0.7")
		err := as(t, c, token).Do(ctx, http.MethodPost, csrs, request, nil)
		t.Logf("%s: %v", name, err)
		wantStatus(t, err, http.StatusUnauthorized)
	}
	// A token joins nodes, and nothing else.
	err = as(t, c, valid.Reveal()).Do(ctx, http.MethodGet, "/api/v1/nodes", nil, nil)
	wantStatus(t, err, http.StatusForbidden)
}

func wantStatus(t *testing.T, err error, code int) {
	t.Helper()
	if status, ok := errors.AsType[*StatusError](err); !ok || status.Code != code {
		t.Errorf("err = %v, want status %d", err, code)
	}
}

// testKubelet reads a pod's log from a kubelet that exists in the VPC only.
func testKubelet(ctx context.Context, t *testing.T, c *Cluster, v *vpc) {
	kubelet := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller := "nobody"
		if len(r.TLS.PeerCertificates) > 0 {
			caller = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		io.WriteString(w, r.URL.Path+" for "+caller)
	}))
	kubelet.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	kubelet.Config.ErrorLog = log.New(io.Discard, "", 0) // probes that hang up
	kubelet.StartTLS()
	defer kubelet.Close()
	v.kubelet.Store(kubelet)
	err := c.Do(ctx, http.MethodPost, "/api/v1/nodes", map[string]any{
		"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": "10.0.0.8"},
		"status": map[string]any{"addresses": []any{map[string]any{"type": "InternalIP", "address": "10.0.0.8"}}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.RunPod(ctx, Pod{Name: "hello", Image: "test", Node: "10.0.0.8"}); err != nil {
		t.Fatal(err)
	}
	got, err := c.Logs(ctx, "hello")
	if want := "/containerLogs/default/hello/main for " + kubeletClient; err != nil || got != want {
		t.Errorf("log = %q, %v; want %q", got, err, want)
	}
	if a := v.dialled.Load(); a == nil || *a != "10.0.0.8:10250" {
		t.Errorf("the API server called %v", a)
	}
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := c.WaitPodRunning(short, "hello"); err == nil || !strings.Contains(err.Error(), "it is Pending") {
		t.Errorf("a pod that no kubelet runs: %v", err)
	}
}

func testEndpoints(ctx context.Context, t *testing.T, c *Cluster) {
	var slice struct {
		Endpoints []struct{ Addresses []string }
		Ports     []struct{ Port int }
	}
	err := c.Do(ctx, http.MethodGet, "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes", nil, &slice)
	if err != nil {
		t.Fatal(err)
	}
	if len(slice.Endpoints) != 1 || slice.Endpoints[0].Addresses[0] != "10.0.0.10" || slice.Ports[0].Port != 6443 {
		t.Errorf("pods are told %+v", slice)
	}
}

func testFailure(t *testing.T, c *Cluster, dir string) {
	for _, pid := range processesOf(t, dir) {
		cmdline, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(cmdline, []byte("kube-scheduler")) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	select {
	case <-c.Failed():
	case <-time.After(10 * time.Second):
		t.Fatal("nobody noticed that the scheduler was killed")
	}
	if err := c.Err(); !strings.Contains(err.Error(), "kube-scheduler") || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("err = %v", err)
	}
}

// processesOf returns the processes that have dir in their arguments.
func processesOf(t *testing.T, dir string) (pids []int) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		cmdline, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(cmdline, []byte(dir)) {
			continue // it has ended meanwhile, or is none of ours
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}
