package bootstrap

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// Kerberos and cloud signatures give up at five minutes; certificates and leases
// suffer sooner or later.
const maxSkew = 5 * time.Minute

// checkClock compares this clock with the API server's, whose certificate is
// verified but for its dates. Time synchronisation usually is under way, so a
// wrong clock is waited for.
func (r *run) checkClock(ctx context.Context) error {
	s, err := r.newAPIServer(true)
	if err != nil {
		return err
	}
	defer s.close()
	return r.until(ctx, apiTimeout, func(ctx context.Context) error {
		header, err := s.call(ctx, http.MethodGet, "/version", nil, nil)
		if _, refused := errors.AsType[*refusal](err); err != nil && !refused {
			return err // any answer has a date
		}
		theirs, err := http.ParseTime(header.Get("Date"))
		if err != nil {
			return s.ailing(fmt.Errorf("without a date: %w", err))
		}
		now := time.Now()
		if skew := now.Sub(theirs); skew.Abs() > maxSkew {
			where := "ahead"
			if skew < 0 {
				where = "behind"
			}
			return &node.Error{Class: node.ClassWaiting, Reason: ReasonClockSkewed,
				Fix: "check time synchronisation (timedatectl timesync-status) and who may reach the NTP server",
				Err: fmt.Errorf("this node's clock says %s, API server %s's says %s: %s %s",
					stamp(now), s.endpoint, stamp(theirs), skew.Abs().Round(time.Second), where)}
		}
		return nil
	})
}

// A CertificateSigningRequest of certificates.k8s.io/v1, as far as it is used.
type certificateRequest struct {
	APIVersion string     `json:"apiVersion"`
	Kind       string     `json:"kind"`
	Metadata   objectMeta `json:"metadata"`
	Spec       struct {
		Request    []byte   `json:"request"`
		SignerName string   `json:"signerName"`
		Usages     []string `json:"usages"`
	} `json:"spec"`
	Status struct {
		Certificate []byte `json:"certificate,omitempty"`
		Conditions  []struct {
			Type    string `json:"type"`
			Reason  string `json:"reason"`
			Message string `json:"message"`
		} `json:"conditions,omitempty"`
	} `json:"status,omitzero"`
}

type objectMeta struct {
	Name string `json:"name"`
}

const requestsPath = "/apis/certificates.k8s.io/v1/certificatesigningrequests"

// join is a certificate request that the API server has taken. Its key is only
// here until there is a certificate for it: a bootstrap that dies before makes a
// new one.
type join struct {
	api     *apiServer
	key     *ecdsa.PrivateKey
	request certificateRequest
}

// request asks for kubelet's client certificate. It is also what proves the
// token and what it may do.
func (r *run) request(ctx context.Context) error {
	api, err := r.newAPIServer(false)
	if err != nil {
		return err
	}
	j := &join{api: api}
	if j.key, err = newClientKey(rand.Reader, r.facts.InstanceID); err != nil {
		return fmt.Errorf("make key: %w", err)
	}
	if err := j.fill(userName(r.config.Name(r.facts))); err != nil {
		return err
	}
	refused := refusals{api: j.api, what: "ask for a certificate"}
	err = r.until(ctx, apiTimeout, func(ctx context.Context) error { return refused.judge(j.post(ctx)) })
	if err != nil {
		j.api.close()
		return err
	}
	r.ledger.say("asked for a certificate: %s", j.request.Metadata.Name)
	r.join = j
	return nil
}

// newClientKey makes a private key out of random and of who makes it. Machines that go on
// from one snapshot of memory draw the same random numbers until their kernels take
// up new ones, which is up to a minute: with nothing of its own in it a key would be
// its twin's as well. Source: random(4), and CRNG_RESEED_INTERVAL of the kernel.
func newClientKey(random io.Reader, instanceID string) (*ecdsa.PrivateKey, error) {
	for {
		var secret [32]byte
		if _, err := io.ReadFull(random, secret[:]); err != nil {
			return nil, err
		}
		scalar, err := hkdf.Key(sha256.New, secret[:], nil, "tkenode kubelet client key of "+instanceID, len(secret))
		if err != nil {
			return nil, err
		}
		// All but one in 2³² are below the order of the curve's group.
		if key, err := ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar); err == nil {
			return key, nil
		}
	}
}

func userName(nodeName string) string { return "system:node:" + nodeName }

// fill makes the request. It is named after its key: sent twice, it is one.
func (j *join) fill(commonName string) error {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: commonName, Organization: []string{"system:nodes"}},
	}, j.key)
	if err != nil {
		return fmt.Errorf("make certificate request: %w", err)
	}
	public, err := x509.MarshalPKIXPublicKey(j.key.Public())
	if err != nil {
		return fmt.Errorf("encode public key: %w", err)
	}
	q := &j.request
	q.APIVersion, q.Kind = "certificates.k8s.io/v1", "CertificateSigningRequest"
	q.Metadata.Name = fmt.Sprintf("node-csr-%.16x", sha256.Sum256(public))
	q.Spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	q.Spec.SignerName = "kubernetes.io/kube-apiserver-client-kubelet"
	q.Spec.Usages = []string{"digital signature", "client auth"}
	return nil
}

// post sends the request; that it is there already is as good.
func (j *join) post(ctx context.Context) error {
	_, err := j.api.call(ctx, http.MethodPost, requestsPath, j.request, nil)
	if e, ok := errors.AsType[*refusal](err); ok && e.code == http.StatusConflict {
		return nil
	}
	return err
}

// refusalGrace is how long a token that is refused is tried again: an API server
// that has just started knows neither tokens nor roles until its caches are filled.
const refusalGrace = 15 * time.Second

// refusals judges the answers to one request over time.
type refusals struct {
	api   *apiServer
	what  string    // the token is used for
	since time.Time // of the first of those that may pass
}

func (s *refusals) judge(err error) error {
	e, ok := errors.AsType[*refusal](err)
	if !ok {
		return err
	}
	id, _, _ := strings.Cut(s.api.token.Reveal(), ".")
	switch {
	case e.code == http.StatusUnauthorized:
		return s.final(ReasonTokenRefused, "it is wrong or has expired: make one with kubeadm token create, and launch with it",
			fmt.Errorf("API server %s does not accept bootstrap token %s.…: %w", s.api.endpoint, id, e))
	case e.code == http.StatusForbidden:
		return s.final(ReasonForbidden, "kubectl create clusterrolebinding tkenode-bootstrap --clusterrole=system:node-bootstrapper --group=system:bootstrappers",
			fmt.Errorf("API server %s does not let bootstrap token %s.… %s: %w", s.api.endpoint, id, s.what, e))
	case e.code == http.StatusTooManyRequests, e.code == http.StatusNotFound, e.code >= 500:
		return s.api.ailing(e)
	}
	return node.Terminal(ReasonRefused, "", fmt.Errorf("API server %s refuses the certificate request: %w", s.api.endpoint, e))
}

// final is terminal once the grace is over.
func (s *refusals) final(reason, fix string, err error) error {
	if s.since.IsZero() {
		s.since = time.Now()
	}
	class := node.ClassTerminal
	if time.Since(s.since) < refusalGrace {
		class = node.ClassWaiting
	}
	return &node.Error{Class: class, Reason: reason, Fix: fix, Err: err}
}

// collect waits for the certificate and stores it where kubelet looks.
func (r *run) collect(ctx context.Context) error {
	j := r.join
	defer j.api.close()
	var chain []byte
	refused := refusals{api: j.api, what: "read certificate request " + j.request.Metadata.Name}
	err := r.until(ctx, apiTimeout, func(ctx context.Context) (err error) {
		chain, err = j.fetch(ctx)
		return refused.judge(err)
	})
	if err != nil {
		return err
	}
	leaf, err := j.check(chain, userName(r.config.Name(r.facts)))
	if err != nil {
		return err
	}
	if err := r.writeCertificate(chain, j.key, time.Now()); err != nil {
		return unusable(err)
	}
	r.ledger.say("certificate of %s, valid %s", leaf.Subject.CommonName, validity(leaf))
	return nil
}

// fetch returns the certificate, or why there is none yet.
func (j *join) fetch(ctx context.Context) ([]byte, error) {
	name := j.request.Metadata.Name
	var q certificateRequest
	_, err := j.api.call(ctx, http.MethodGet, requestsPath+"/"+name, nil, &q)
	if e, ok := errors.AsType[*refusal](err); ok && e.code == http.StatusNotFound {
		err = j.post(ctx) // requests that nobody approves are deleted after a day
	}
	if err != nil {
		return nil, err
	}
	approved := false
	for _, c := range q.Status.Conditions {
		switch c.Type {
		case "Approved":
			approved = true
		case "Denied":
			return nil, node.Terminal(ReasonDenied, "ask who denied it, then: systemctl restart tkenode-bootstrap",
				fmt.Errorf("certificate request %s is denied: %s: %s", name, c.Reason, c.Message))
		case "Failed":
			return nil, node.Terminal(ReasonDenied, "look into the log of kube-controller-manager, then: systemctl restart tkenode-bootstrap",
				fmt.Errorf("certificate request %s cannot be signed: %s: %s", name, c.Reason, c.Message))
		}
	}
	switch {
	case len(q.Status.Certificate) > 0:
		return q.Status.Certificate, nil
	case approved:
		return nil, &node.Error{Class: node.ClassWaiting, Reason: ReasonPending,
			Fix: "check that kube-controller-manager runs, and its signer with it",
			Err: fmt.Errorf("certificate request %s is approved and not signed yet", name)}
	}
	return nil, &node.Error{Class: node.ClassWaiting, Reason: ReasonPending,
		Fix: "it needs an approver, or by hand: kubectl certificate approve " + name,
		Err: fmt.Errorf("certificate request %s is not approved yet", name)}
}

// check makes sure that what was signed is what was asked for, by whom kubelet
// will be believed.
func (j *join) check(chain []byte, commonName string) (*x509.Certificate, error) {
	leaf, err := verifyClient(chain, j.key.Public(), commonName, j.api.authority, time.Now())
	if err != nil {
		return nil, node.Terminal(ReasonForeign, "see what signs for kubernetes.io/kube-apiserver-client-kubelet; its CA must be in cluster.certificateAuthority, too",
			fmt.Errorf("the certificate signed for %s cannot be used: %w", j.request.Metadata.Name, err))
	}
	return leaf, nil
}

// verifyClient reads a client certificate in PEM and checks its key, its name,
// its issuer and its dates.
func verifyClient(chain []byte, key crypto.PublicKey, commonName string, ca authority, now time.Time) (*x509.Certificate, error) {
	block, rest := pem.Decode(chain)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("it is not PEM")
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if public, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key) {
		return nil, errors.New("it is for another key")
	}
	if leaf.Subject.CommonName != commonName {
		return nil, fmt.Errorf("it is for %q, not for %q", leaf.Subject.CommonName, commonName)
	}
	opts := x509.VerifyOptions{Roots: ca.pool, Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	opts.Intermediates.AppendCertsFromPEM(rest)
	if _, err := leaf.Verify(opts); err != nil {
		return nil, fmt.Errorf("valid %s, issued by %q, CA %s: %w", validity(leaf), leaf.Issuer, ca, err)
	}
	return leaf, nil
}
