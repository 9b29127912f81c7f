package unit

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	loopback      = "lo"
	kubeletHealth = "http://127.0.0.1:10248/healthz"
	// kubeProxyHealth is not /healthz, by which load balancers are told to go elsewhere
	// when the Node is about to be deleted.
	// Source: https://github.com/kubernetes/kubernetes/blob/v1.36.3/pkg/proxy/healthcheck/proxy_health.go
	kubeProxyHealth = "http://" + node.KubeProxyHealth + "/livez"
)

// healthy returns the probe that asks a daemon at url whether it is well.
func healthy(url string) func(context.Context) error {
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		if err != nil {
			return fmt.Errorf("GET %s: %w", url, err)
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("GET %s: %s: %s", url, resp.Status, strings.TrimSpace(string(body)))
		}
		return nil
	}
}

// resolves returns the probe that asks a DNS server at each address what pods ask
// it: for a Service that every cluster has.
func resolves(addrs []netip.Addr, domain string) func(context.Context) error {
	return func(ctx context.Context) error {
		for _, a := range addrs {
			resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, network, netip.AddrPortFrom(a, 53).String())
			}}
			if _, err := resolver.LookupNetIP(ctx, "ip4", "kubernetes.default.svc."+domain+"."); err != nil {
				return fmt.Errorf("ask %s: %w", a, err)
			}
		}
		return nil
	}
}

// proxyTable reports whether kube-proxy's table is there. kube-proxy itself looks at
// it once an hour: until then a flush of the ruleset leaves no Service reachable.
// Source: https://github.com/kubernetes/kubernetes/blob/v1.36.3/pkg/proxy/nftables/proxier.go,
// kubeProxyTable and FullSyncPeriod of pkg/proxy/util
func proxyTable() (bool, error) {
	nft, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	tables, err := nft.ListTablesOfFamily(nftables.TableFamilyIPv4)
	if err != nil {
		return false, fmt.Errorf("list nftables tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == "kube-proxy" }), nil
}

// loopbackAddrs returns the addresses of the loopback device.
func loopbackAddrs() ([]netip.Addr, error) {
	lo, err := net.InterfaceByName(loopback)
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", loopback, err)
	}
	have, err := lo.Addrs()
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", loopback, err)
	}
	var addrs []netip.Addr
	for _, a := range have {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			addrs = append(addrs, p.Addr())
		}
	}
	return addrs, nil
}

// addLoopbackAddr makes a an address of the node's own. Of scope host, since the
// kernel would take one of a wider scope for the source of what leaves by a device
// that has no address, as pods' links have none.
func addLoopbackAddr(ctx context.Context, a netip.Addr) error {
	out, err := exec.CommandContext(ctx, "ip", "address", "replace", a.String(), "dev", loopback, "scope", "host").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}
