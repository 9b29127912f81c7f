// Package bootstrap is the first boot of a node, exact or nothing: it finds the
// NodeConfig in user-data, refuses it or accepts it whole, asks the cluster for a
// client certificate, seals the configuration for the agent, and waits for the
// certificate. On every later boot it only confirms that what is sealed is this
// instance's own, which takes milliseconds.
//
// What something else will bring (the metadata service, the API server, the right
// time, an approval) is waited for without limit, and the reason stands on the
// console, in the journal and in the report meanwhile. What only a human can mend
// ends it, with a message that says how. Before the configuration is sealed
// nothing is written but the report; the bootstrap token never is.
//
// It formats, mounts, starts and configures nothing: that is the agent's, which
// reads what is sealed. Render, here, says what containerd and kubelet are to be
// started with.
package bootstrap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/bootstrap/nodeconfig"
)

// The reasons of this package's errors, beside those of nodeconfig.
const (
	ReasonMetadataSilent = "MetadataSilent"       // the metadata service does not answer as it should
	ReasonBadName        = "NodeNameInvalid"      // the Node would have no valid name
	ReasonUnnamed        = "HostnameUnset"        // the host name is still the image's
	ReasonClockSkewed    = "ClockSkewed"          // this clock and the API server's differ
	ReasonCloudUnknown   = "CloudFactsUnknown"    // the cloud API does not tell the zone's number or the quota
	ReasonUnreachable    = "APIServerUnreachable" // no answer, or one that only a fault explains
	ReasonUntrusted      = "APIServerUntrusted"   // its certificate is not of the cluster's CA
	ReasonTokenRefused   = "TokenRefused"         // wrong or expired
	ReasonForbidden      = "RequestForbidden"     // the token may not ask for a certificate
	ReasonRefused        = "RequestRefused"       // the API server does not take the request
	ReasonPending        = "CertificatePending"   // nobody has approved or signed it yet
	ReasonDenied         = "CertificateDenied"    // somebody has denied it
	ReasonForeign        = "CertificateForeign"   // what came is not what was asked for
	ReasonState          = "StateUnusable"        // what is on disk cannot be read or written
)

// Metadata is what bootstrap needs of the metadata service. Both may take as long
// as their context lets them, and are asked again when they fail.
type Metadata interface {
	// UserData fails with an error that is fs.ErrNotExist when there is none.
	UserData(ctx context.Context) ([]byte, error)
	// Facts may leave out ZoneID and the quota, which the service does not know.
	Facts(ctx context.Context) (node.Facts, error)
}

// Options is what Run works with.
type Options struct {
	Metadata Metadata
	// CloudFacts asks the cloud API for what the metadata service does not know, and
	// returns f with it. It needs the instance's credentials and the NodeConfig's
	// cloud section.
	CloudFacts func(ctx context.Context, cfg node.Config, f node.Facts) (node.Facts, error)

	// UserDataFile is read instead of the metadata service's user-data; empty: not.
	UserDataFile string
	Root         string // what all other paths are below; empty on a node
	// Dial opens the connections to the API server; nil: plain TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	Log     *slog.Logger
	Console io.Writer // lines for whoever watches the serial console
}

// The exit statuses of `tkenode bootstrap`.
const (
	ExitDone   = 0 // the node is sealed and has its certificate
	ExitHuman  = 1 // a human must act; trying again would end the same
	ExitBroken = 2 // interrupted, or the machine failed: try again
)

// ExitCode returns the exit status for what Run returned.
func ExitCode(err error) int {
	switch {
	case err == nil:
		return ExitDone
	case node.ClassOf(err) == node.ClassTerminal:
		return ExitHuman
	}
	return ExitBroken
}

// Run brings the node as far as bootstrap can, and returns nil when there is
// nothing left for it to do. It ends early only for a terminal error, for a disk
// that cannot be written, or with ctx. It is meant to be run at every boot, and
// may be killed at any moment.
func Run(ctx context.Context, o Options) error {
	if o.Dial == nil {
		o.Dial = (&net.Dialer{}).DialContext
	}
	r := &run{Options: o, ledger: newLedger(o)}
	err := r.boot(ctx)
	r.ledger.end(err)
	return err
}

// run is one Run. It fills its fields from the top down.
type run struct {
	Options
	ledger *ledger

	config node.Config
	facts  node.Facts
	join   *join
	sealed node.Sealed
}

type step struct {
	name string
	do   func(context.Context) error
}

func (r *run) steps(ctx context.Context, steps ...step) error {
	for _, s := range steps {
		if err := r.ledger.step(s.name, func() error { return s.do(ctx) }); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) boot(ctx context.Context) error {
	known, err := r.prior(ctx)
	if err != nil {
		return err
	}
	if known {
		return r.rejoin(ctx)
	}
	return r.steps(ctx, step{"user-data", r.readUserData}, step{"metadata", r.readFacts}, step{"api-server", r.checkClock},
		step{"cloud-api", r.readCloudFacts}, step{"request", r.request}, step{"seal", r.seal}, step{"certificate", r.collect})
}

// rejoin makes sure that a node that is sealed has a certificate. What is sealed
// stays as it is, and the agent may act on it, whatever becomes of the certificate.
func (r *run) rejoin(ctx context.Context) error {
	r.ledger.confirm(r.sealed)
	r.config, r.facts = r.sealed.Config, r.sealed.Facts
	bad := r.checkCertificate()
	if bad == nil {
		return nil
	}
	if err := r.steps(ctx, step{"api-server", r.checkClock}); err != nil {
		return err
	}
	if outOfDate(bad) { // or the clock was, which now is right
		if bad = r.checkCertificate(); bad == nil {
			return nil
		}
	}
	if errors.Is(bad, fs.ErrNotExist) {
		r.ledger.say("sealed already, and without a certificate: asking for one")
	} else {
		r.ledger.say("kubelet's certificate cannot be used, asking for another: %v", bad)
	}
	return r.steps(ctx, step{"user-data", r.readToken}, step{"request", r.request}, step{"certificate", r.collect})
}

// readToken takes nothing but the bootstrap token from user-data.
func (r *run) readToken(ctx context.Context) error {
	if err := r.readUserData(ctx); err != nil {
		return err
	}
	token := r.config.Cluster.BootstrapToken
	r.config = r.sealed.Config
	r.config.Cluster.BootstrapToken = token
	return nil
}

// prior reads the configuration that is sealed already, and reports whether it is
// this instance's. Another instance's, which came with an image, is moved aside.
func (r *run) prior(ctx context.Context) (known bool, err error) {
	err = r.ledger.step("sealed", func() error {
		s, damaged := r.readSealed()
		if errors.Is(damaged, fs.ErrNotExist) {
			return nil
		}
		if damaged != nil {
			r.Log.Warn("sealed configuration is not used", "err", damaged)
			if s.Facts.InstanceID == "" {
				return nil // nobody knows whose it was
			}
		}
		ours, err := r.isOurs(ctx, s)
		switch {
		case err != nil:
			return err
		case !ours:
			from := s.Facts.InstanceID
			r.ledger.say("this disk is an image of %s: what that node kept is moved aside", from)
			return r.moveAside(from)
		case damaged == nil:
			known, r.sealed = true, s
		}
		return nil
	})
	return known, err
}

// identityWait is how long a reboot waits for the metadata service before it
// makes do with the machine's UUID.
const identityWait = 5 * time.Second

// isOurs reports whether s was sealed on this instance. The metadata service has
// the last word. Should it be silent, then the same machine UUID will do, so that
// a node comes back from a reboot without it.
func (r *run) isOurs(ctx context.Context, s node.Sealed) (bool, error) {
	soon, cancel := context.WithTimeout(ctx, identityWait)
	defer cancel()
	f, err := r.Metadata.Facts(soon)
	if err != nil && ctx.Err() == nil {
		if id := r.machine(); id != "" && id == s.Machine {
			r.Log.Warn("metadata service is silent; instance recognised by its machine UUID", "err", err)
			return true, nil
		}
		if err := r.readFacts(ctx); err != nil {
			return false, err
		}
		f = r.facts
	}
	return f.InstanceID == s.Facts.InstanceID, ctx.Err()
}

// machine returns the DMI system UUID, or "" where it says nothing.
func (r *run) machine() string {
	b, err := os.ReadFile(r.path("/sys/class/dmi/id/product_uuid"))
	if err != nil {
		return ""
	}
	id := string(bytes.TrimSpace(b))
	if id == "00000000-0000-0000-0000-000000000000" {
		return ""
	}
	return id
}

func (r *run) readUserData(ctx context.Context) error {
	if r.UserDataFile != "" {
		data, err := os.ReadFile(r.UserDataFile)
		if err != nil {
			return node.Terminal(nodeconfig.ReasonMissing, "", err)
		}
		r.config, err = nodeconfig.FromUserData(data)
		return err
	}
	var data []byte
	err := r.until(ctx, metadataTimeout, func(ctx context.Context) (err error) {
		data, err = r.Metadata.UserData(ctx)
		if errors.Is(err, fs.ErrNotExist) {
			return node.Terminal(nodeconfig.ReasonMissing, "launch the instance with a NodeConfig document as its user-data",
				errors.New("the instance has no user-data"))
		}
		return silent(err)
	})
	if err != nil {
		return err
	}
	r.config, err = nodeconfig.FromUserData(data)
	return err
}

func (r *run) readFacts(ctx context.Context) error {
	err := r.until(ctx, metadataTimeout, func(ctx context.Context) (err error) {
		r.facts, err = r.Metadata.Facts(ctx)
		if host := r.facts.Hostname; err == nil && r.config.Node.NameFrom == node.NameFromHostname && (host == "" || strings.HasPrefix(host, "localhost")) {
			return &node.Error{Class: node.ClassWaiting, Reason: ReasonUnnamed,
				Fix: "cloud-init sets it (cloud-init status --long); or set node.nameFrom to privateIP",
				Err: fmt.Errorf("node.nameFrom hostname: the host name is still %q, the image's", host)}
		}
		return silent(err)
	})
	if err != nil || r.config.Kind == "" {
		return err
	}
	if name := r.config.Name(r.facts); !nodeconfig.IsNodeName(name) {
		return node.Terminal(ReasonBadName, "give the instance another host name, or set node.nameFrom to privateIP",
			fmt.Errorf("node.nameFrom %s: %q is not a name that a Node can have", r.config.Node.NameFrom, name))
	}
	r.ledger.say("%s: %s in %s, node %s of %s", r.facts.InstanceID, r.facts.InstanceType, r.facts.Zone, r.config.Name(r.facts), r.config.Cluster.ID)
	return nil
}

// silent says of an error of the metadata service what it means here, unless it
// is one that time does not mend.
func silent(err error) error {
	if err == nil || node.ClassOf(err) == node.ClassTerminal {
		return err
	}
	return &node.Error{Class: node.ClassWaiting, Reason: ReasonMetadataSilent,
		Fix: "if it lasts: check this node's route and firewall to 169.254.0.23, then ask Tencent Cloud", Err: err}
}

func (r *run) readCloudFacts(ctx context.Context) error {
	if r.facts.ZoneID != 0 && r.facts.ENIQuota != 0 {
		return nil
	}
	return r.until(ctx, apiTimeout, func(ctx context.Context) error {
		f, err := r.CloudFacts(ctx, r.config, r.facts)
		if err == nil {
			r.facts = f
		}
		if err == nil || node.ClassOf(err) == node.ClassTerminal {
			return err
		}
		return &node.Error{Class: node.ClassWaiting, Reason: node.ReasonOf(err, ReasonCloudUnknown), Err: err}
	})
}

// path returns where an absolute path of the node is.
func (r *run) path(p string) string { return filepath.Join("/", r.Root, p) }
