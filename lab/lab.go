// Package lab is a Tencent Cloud region on one machine, without root and without
// an account: a VPC, the cloud's API and metadata service, CVMs that boot the
// node image that ships, a managed control plane, and the monitoring endpoint.
//
// It wires the packages below it and gives tests and cmd/tkelab one handle: Start
// a lab, Launch a CVM, look at its Timeline. What the cloud does is decided in
// lab/cloud; here nothing is decided. Everything runs in, or as a child of, this
// process, and ends with it.
package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/tkenode/tkenode/images"
	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/kube"
	"github.com/tkenode/tkenode/lab/monitor"
	"github.com/tkenode/tkenode/lab/vpc"
)

// Addresses of the lab's own services in the VPC. The metadata service, DNS and
// the domain of the API are Tencent's; the others are the lab's choice.
var (
	metadataAddr  = netip.MustParseAddrPort("169.254.0.23:80")
	cloudAPIAddr  = netip.MustParseAddrPort("169.254.0.95:443")
	apiServerAddr = netip.MustParseAddrPort("10.0.0.10:6443")
	monitorAddr   = netip.MustParseAddrPort("10.0.0.11:9090")
	// ProbeAddr is the address from which the lab reaches nodes and pods, as any
	// other machine of the VPC would.
	ProbeAddr = netip.MustParseAddr("10.0.0.20")
	// ProbeAddr6 is that for IPv6, in a range of the VPC that no subnet has.
	ProbeAddr6 = netip.MustParseAddr("2001:db8:0:ff::20")
)

// Options say what a lab is made of.
type Options struct {
	Dir   string // of this lab: sockets, disks, logs
	Cache string // what outlives it: the login key and snapshots of machines; default Dir
	Bin   string // the built components
	Image string // the node image
	// Delays of the cloud; the zero value are the real-life ones.
	Delays *cloud.Delays
	Log    *slog.Logger
	// Begin and End tell of the steps of Start; nil: nobody is told.
	Begin func(step string)
	End   func(step string, err error)
}

// Lab is a running region.
type Lab struct {
	options Options
	log     *slog.Logger
	key     loginKey
	ca      *authority // of the cloud API's certificate

	Net     *vpc.Network
	Region  *cloud.Region
	Cluster *kube.Cluster
	Monitor *monitor.Monitor
	host    *host

	// cutAPIServer makes the API server unreachable for nodes: connections are refused.
	cutAPIServer func() error

	servers sync.WaitGroup
	closers []func(context.Context) error // last first
}

// Start starts the region; it is ready when Start returns.
func Start(ctx context.Context, o Options) (_ *Lab, err error) {
	o.Cache = cmp.Or(o.Cache, o.Dir)
	l := &Lab{options: o, log: o.Log}
	defer func() {
		if err != nil {
			sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			err = errors.Join(err, l.Stop(sctx))
		}
	}()
	for _, d := range []string{"net", "disks", "cvm"} {
		if err := os.MkdirAll(filepath.Join(o.Dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("make lab directory: %w", err)
		}
	}
	held, err := images.Hold(o.Image) // the machines' disks are based on it
	if err != nil {
		return nil, err
	}
	l.onStop(func(context.Context) error { return held.Close() })
	if l.key, err = newLoginKey(o.Cache); err != nil {
		return nil, err
	}
	if l.ca, err = newAuthority(); err != nil {
		return nil, err
	}
	for _, s := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"VPC, metadata, cloud API", l.startCloud},
		{"control plane", l.startControlPlane},
		{"monitoring", l.startMonitor},
	} {
		if o.Begin != nil {
			o.Begin(s.name)
		}
		err := s.run(ctx)
		if o.End != nil {
			o.End(s.name, err)
		}
		if err != nil {
			return nil, fmt.Errorf("start %s: %w", s.name, err)
		}
	}
	return l, nil
}

// Stop ends every machine, then the services, and waits for all of them.
func (l *Lab) Stop(ctx context.Context) error {
	var errs []error
	if l.host != nil { // the machines first: nothing they need goes before them
		errs = append(errs, l.host.close())
	}
	for i := len(l.closers) - 1; i >= 0; i-- {
		errs = append(errs, l.closers[i](ctx))
	}
	l.closers = nil
	l.servers.Wait()
	return errors.Join(errs...)
}

func (l *Lab) onStop(f func(context.Context) error) { l.closers = append(l.closers, f) }

func (l *Lab) startCloud(context.Context) error {
	config := cloud.Default()
	if l.options.Delays != nil {
		config.Delays = *l.options.Delays
	}
	config.Log = l.log.With("part", "cloud")
	hosts := map[string]netip.Addr{
		"metadata.tencentyun.com": metadataAddr.Addr(),
		"*." + config.Domain:      cloudAPIAddr.Addr(),
	}
	var err error
	l.Net, err = vpc.New(vpc.Config{CIDR: vpcCIDR, CIDR6: vpcCIDR6, Subnets: subnets(config), Hosts: hosts, Log: l.log.With("part", "vpc")})
	if err != nil {
		return err
	}
	l.onStop(func(context.Context) error { return l.Net.Close() })
	l.host = newHost(l.options.Dir, l.key.public, l.Net, l.log.With("part", "cvm"))
	l.host.addImage(config.Images[0], l.options.Image)
	l.Region, err = cloud.New(config, l.host, l.host)
	if err != nil {
		return err
	}
	l.onStop(func(context.Context) error { l.Region.Close(); return l.host.close() })
	certificate, err := l.ca.issue("*." + config.Domain)
	if err != nil {
		return err
	}
	if err := l.serve("metadata", metadataAddr, nil, l.metadata()); err != nil {
		return err
	}
	return l.serve("cloud API", cloudAPIAddr, certificate, l.Region.API())
}

// metadata serves the metadata service, and takes down who asked first.
func (l *Lab) metadata() http.Handler {
	next := l.Region.Metadata()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if from, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
			if in, ok := l.Region.InstanceAt(from.Addr()); ok {
				l.host.timeline(in.ID).mark(Metadata)
			}
		}
		next.ServeHTTP(w, r)
	})
}

func (l *Lab) startControlPlane(ctx context.Context) error {
	var err error
	l.Cluster, err = kube.Start(ctx, kube.Options{
		Dir: filepath.Join(l.options.Dir, "kube"),
		Bin: l.options.Bin,
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return l.Net.DialContext(ctx, apiServerAddr.Addr(), network, addr)
		},
		Address:     apiServerAddr,
		ServiceCIDR: netip.MustParsePrefix("172.16.0.0/20"),
	})
	if err != nil {
		return err
	}
	l.onStop(func(context.Context) error { return l.Cluster.Stop() })
	return l.forwardAPIServer()
}

func (l *Lab) startMonitor(ctx context.Context) error {
	var err error
	l.Monitor, err = monitor.Start(ctx, monitor.Options{
		Dir: filepath.Join(l.options.Dir, "monitor"),
		Bin: l.options.Bin,
		Log: l.log.With("part", "monitor"),
	})
	if err != nil {
		return err
	}
	l.onStop(l.Monitor.Stop)
	_, err = l.forward(monitorAddr, l.Monitor.Addr())
	return err
}

// forwardAPIServer lets nodes reach the API server, until cutAPIServer: at the
// address that they know, and at the port that the API server tells pods, which is
// its own and another one where that was taken on this host.
func (l *Lab) forwardAPIServer() error {
	local := l.Cluster.LocalAddress()
	stop, err := l.forward(apiServerAddr, local.String())
	if err != nil {
		return err
	}
	l.cutAPIServer = stop
	if local.Port() == apiServerAddr.Port() {
		return nil
	}
	stopOther, err := l.forward(netip.AddrPortFrom(apiServerAddr.Addr(), local.Port()), local.String())
	l.cutAPIServer = func() error { return errors.Join(stop(), stopOther()) }
	return err
}

// Dial opens a connection to a machine or a pod of the VPC, from another address
// in it, through the fabric and its checks.
func (l *Lab) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	from := ProbeAddr
	if to, err := netip.ParseAddrPort(addr); err == nil && to.Addr().Is6() {
		from = ProbeAddr6
	}
	return l.Net.DialContext(ctx, from, network, addr)
}

// HTTPClient returns a client that reaches nodes and pods by their VPC addresses.
func (l *Lab) HTTPClient() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: l.Dial, DisableKeepAlives: true}, Timeout: 30 * time.Second}
}
