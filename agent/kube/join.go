package kube

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	bootstrapAgain = "`systemctl restart tkenode-bootstrap` asks for a certificate again"
	userPrefix     = "system:node:" // the user name that the API server takes for a node's
)

// Join serves NodeJoined: the node's client certificate is on disk and good. It
// changes nothing; bootstrap obtains the certificate and kubelet rotates it. It
// satisfies reconcile.Module.
type Join struct {
	name   string // of the Node
	cert   string
	report string
}

// NewJoin returns the module for the Node called name.
func NewJoin(name string) *Join {
	return &Join{name: name, cert: node.ClientCertPath, report: node.ReportFile}
}

// Name returns "kube/join".
func (j *Join) Name() string { return "kube/join" }

// Condition returns NodeJoined.
func (j *Join) Condition() node.ConditionType { return node.NodeJoined }

// Needs returns what has to be so before the certificate is looked at.
func (j *Join) Needs() []node.ConditionType { return []node.ConditionType{node.ConfigSealed} }

// Watch wakes when the certificate is replaced or bootstrap has news.
func (j *Join) Watch(ctx context.Context, wake func()) error {
	return watchFiles(ctx, wake, j.cert, j.report)
}

// Plan looks at the certificate; there is never anything to apply.
func (j *Join) Plan(context.Context) (node.Plan, error) {
	b, err := os.ReadFile(j.cert)
	if errors.Is(err, fs.ErrNotExist) {
		return node.Plan{}, j.missing()
	}
	if err != nil {
		return node.Plan{}, fmt.Errorf("read client certificate: %w", err)
	}
	pair, err := tls.X509KeyPair(b, b)
	if err != nil {
		return node.Plan{}, node.Terminal("CertificateDamaged", bootstrapAgain, fmt.Errorf("read client certificate %s: %w", j.cert, err))
	}
	return judge(pair.Leaf, j.name, time.Now())
}

// Apply has nothing to do.
func (j *Join) Apply(context.Context, node.Plan) error { return nil }

// judge says whether cert makes this machine the Node called name, now.
func judge(cert *x509.Certificate, name string, now time.Time) (node.Plan, error) {
	const format = "2006-01-02 15:04:05Z"
	switch {
	case cert.Subject.CommonName != userPrefix+name:
		return node.Plan{}, node.Terminal("WrongIdentity", "remove it; "+bootstrapAgain,
			fmt.Errorf("the client certificate is for %q, this node is %q", cert.Subject.CommonName, userPrefix+name))
	case now.Before(cert.NotBefore):
		return node.Plan{Again: cert.NotBefore.Sub(now)}, node.Waiting("ClockBehind",
			"the client certificate is valid from %s and the clock says %s", cert.NotBefore.UTC().Format(format), now.UTC().Format(format))
	case !now.Before(cert.NotAfter):
		return node.Plan{}, node.Terminal("CertificateExpired", bootstrapAgain,
			fmt.Errorf("the client certificate has expired at %s and the clock says %s", cert.NotAfter.UTC().Format(format), now.UTC().Format(format)))
	}
	return node.Plan{Again: cert.NotAfter.Sub(now)}, nil
}

// missing says, in bootstrap's words if there are any, why there is no
// certificate.
func (j *Join) missing() error {
	var r node.Report
	b, err := os.ReadFile(j.report)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return node.Waiting("NotBootstrapped", "there is no client certificate and bootstrap has not run in this boot; see `systemctl status tkenode-bootstrap`")
	case err == nil:
		err = json.Unmarshal(b, &r)
	}
	switch {
	case err != nil:
		return fmt.Errorf("read bootstrap's report: %w", err)
	case r.Class == node.ClassTerminal.String():
		return node.Terminal(reason(r.Reason, "BootstrapFailed"), "", errors.New(r.Message))
	case r.Message != "":
		return node.Waiting(reason(r.Reason, "Joining"), "%s", r.Message)
	case r.Done:
		return node.Terminal("CertificateMissing", bootstrapAgain, fmt.Errorf("bootstrap has ended and %s is not there", j.cert))
	}
	return node.Waiting("Joining", "there is no client certificate yet; bootstrap is at: %s", r.Phase)
}

func reason(r, fallback string) string {
	if r == "" {
		return fallback
	}
	return r
}
