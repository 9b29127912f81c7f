// Package kube is the lab's managed control plane: real etcd, kube-apiserver,
// kube-controller-manager and kube-scheduler on one loopback address, set up as
// a TKE cluster presents itself to a node: bootstrap tokens, certificates signed
// on request, RBAC with the Node authorizer and NodeRestriction, and an API
// server that reaches kubelets and pods at their VPC addresses.
//
// It is no installer: a cluster begins empty and lives as long as the lab. It
// gives pods no addresses and nodes no cloud provider, as a TKE cluster in
// VPC-CNI mode does not either.
package kube

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/tkenode/tkenode/lab/proc"
)

// Options say where the control plane lives and how the VPC knows it.
type Options struct {
	Dir         string         // created; holds keys, data, sockets and logs
	Bin         string         // holds etcd and the kube-* programs
	Address     netip.AddrPort // of the API server in the VPC
	ServiceCIDR netip.Prefix
	// SigningDuration is how long the certificates of nodes are valid; zero: a year.
	SigningDuration time.Duration
	// Dial connects to an address of the VPC on the API server's behalf.
	Dial DialFunc
}

// Cluster is a control plane that runs.
type Cluster struct {
	options Options
	address netip.AddrPort // of the API server on this host
	pki     pki
	client  *http.Client
	egress  *egress
	group   *proc.Group

	watchers sync.WaitGroup
	failed   chan struct{} // closed when a component has ended by itself
	once     sync.Once
	err      error
}

// Start starts a control plane in a directory that does not exist yet, and
// returns when nodes can join.
func Start(ctx context.Context, o Options) (*Cluster, error) {
	c := &Cluster{options: o, group: proc.NewGroup(), failed: make(chan struct{})}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start the control plane: %w", err), c.Stop())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	if err := c.prepare(); err != nil {
		return err
	}
	var err error
	if c.egress, err = newEgress(c.path("egress.sock"), c.options.Dial); err != nil {
		return err
	}
	for _, comp := range []component{c.etcd(), c.apiServer()} {
		if err := c.run(comp); err != nil {
			return err
		}
	}
	// The others would start on an API server that does not know them yet, since
	// it makes their roles itself, and back off.
	if err := c.waitReady(ctx); err != nil {
		return err
	}
	for _, comp := range []component{c.controllerManager(), c.scheduler()} {
		if err := c.run(comp); err != nil {
			return err
		}
	}
	return c.bindRoles(ctx)
}

// prepare writes everything that the components read.
func (c *Cluster) prepare() error {
	if err := os.MkdirAll(filepath.Dir(c.options.Dir), 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(c.options.Dir, 0o700); err != nil {
		return err
	}
	var err error
	if c.address, err = freeAddress(c.options.Address.Port()); err != nil {
		return err
	}
	dns := []string{
		"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}
	var ips []net.IP
	for _, a := range []netip.Addr{
		c.options.Address.Addr(), c.address.Addr(), netip.AddrFrom4([4]byte{127, 0, 0, 1}),
		c.options.ServiceCIDR.Masked().Addr().Next(), // of the service "kubernetes"
	} {
		ips = append(ips, a.AsSlice())
	}
	if c.pki, err = newPKI(c.path("pki"), dns, ips); err != nil {
		return err
	}
	if c.client, err = newClient(c.pki, "admin"); err != nil {
		return err
	}
	for _, name := range []string{"admin", "manager", "scheduler"} {
		if err := c.writeKubeconfig(name); err != nil {
			return err
		}
	}
	return c.writeEgress()
}

// freeAddress returns a loopback address on which port is free. The address
// varies, not the port, because the API server tells pods its own port, and in
// the VPC that is the one that nodes know. Only where the port is taken on every
// address of this host, by a cluster of somebody's, another one has to do.
func freeAddress(port uint16) (netip.AddrPort, error) {
	var last error
	for i := range 32 {
		b := [3]byte{}
		if _, err := rand.Read(b[:]); err != nil {
			return netip.AddrPort{}, err
		}
		if i == 16 {
			port = 0
		}
		// 127.64.0.0/10 keeps clear of addresses that people use by hand; the last
		// byte of those that look like networks or broadcasts.
		a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 64 | b[0]&63, b[1], 1 + b[2]%254}), port)
		l, err := net.Listen("tcp", a.String())
		if err == nil {
			a = netip.MustParseAddrPort(l.Addr().String())
			return a, l.Close()
		}
		last = err
	}
	return netip.AddrPort{}, fmt.Errorf("find a free loopback address: %w", last)
}

// run starts a component and watches over it.
func (c *Cluster) run(comp component) error {
	p, err := c.group.Start(c.command(comp))
	if err != nil {
		return err
	}
	c.watchers.Go(func() {
		if err := p.Err(); err != nil {
			c.once.Do(func() {
				c.err = err
				close(c.failed)
			})
		}
	})
	return nil
}

// waitReady waits until the API server says that it is ready.
func (c *Cluster) waitReady(ctx context.Context) error {
	for {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := c.Do(try, http.MethodGet, "/readyz", nil, nil)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-c.failed:
			return c.err
		case <-ctx.Done():
			return fmt.Errorf("wait for the API server: %w (%w)", ctx.Err(), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Stop ends the control plane. What it wrote stays in its directory.
func (c *Cluster) Stop() error {
	err := c.group.Close()
	c.watchers.Wait()
	if c.egress != nil {
		err = errors.Join(err, c.egress.close())
	}
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	return err
}

// Failed is closed when a component has ended although nobody stopped it.
func (c *Cluster) Failed() <-chan struct{} { return c.failed }

// Err says, once Failed is closed, which component ended and what it printed.
func (c *Cluster) Err() error {
	<-c.failed
	return c.err
}

// Endpoint returns the URL of the API server on this host.
func (c *Cluster) Endpoint() string { return "https://" + c.address.String() }

// LocalAddress returns the address of the API server on this host: where the VPC
// forwards what comes to Options.Address.
func (c *Cluster) LocalAddress() netip.AddrPort { return c.address }

// Kubeconfig returns the path of an administrator's kubeconfig for this host.
func (c *Cluster) Kubeconfig() string { return c.path("admin.kubeconfig") }

// CACert returns the certificate of the cluster's authority as PEM.
func (c *Cluster) CACert() []byte { return c.pki.ca }

// IssueNodeCertificate returns certificate and key of a node that has not asked
// for them, as kubelet keeps them.
func (c *Cluster) IssueNodeCertificate(name string) ([]byte, error) {
	pem, err := c.pki.issueNode(name)
	if err != nil {
		return nil, fmt.Errorf("issue certificate of node %s: %w", name, err)
	}
	return pem, nil
}

func (c *Cluster) path(name string) string { return filepath.Join(c.options.Dir, name) }
