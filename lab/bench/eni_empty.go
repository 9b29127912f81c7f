package bench

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/vpc"
)

// measureEmpty measures an ADD that finds no address: the cloud of the lab, with
// the delays that it always has, must first make an ENI and attach it.
func measureEmpty(ctx context.Context, n *eniNode) error {
	f, err := n.newFabric()
	if err != nil {
		return err
	}
	config := cloud.Default()
	config.Log = n.log
	h := host{f}
	region, err := cloud.New(config, h, h)
	if err != nil {
		return err
	}
	n.closers = append(n.closers, func() error { region.Close(); return nil })
	in, err := region.Launch(ctx, cloud.InstanceSpec{PrivateIP: n.facts.PrivateIP})
	if err != nil {
		return err
	}
	n.facts.InstanceID = in.ID
	for _, e := range region.Snapshot().ENIs {
		n.facts.MAC = e.MAC
	}
	metadata := tencent.NewMetadata(tencent.MetadataURL)
	metadata.HTTP.Transport = direct{region.Metadata(), in.PrivateIP}
	api, err := tencent.NewClient(node.CloudConfig{APIDomain: config.Domain}, config.Region, metadata)
	if err != nil {
		return err
	}
	api.HTTP.Transport = direct{region.API(), in.PrivateIP}

	ours, err := n.ourSide()
	if err != nil {
		return err
	}
	ns, err := newNamespaces(1)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := n.start(ctx, api, node.NetworkConfig{
		SubnetIDs: []string{config.Subnets[1].ID}, SecurityGroupIDs: config.SecurityGroups, ENIs: 1, IPsPerENI: 8,
		NonMasqueradeCIDRs: []netip.Prefix{vpcCIDR}, Layout: node.LayoutMark,
	}); err != nil {
		return err
	}
	if _, err := ours.add(ctx, ours.newPod(ns[0])); err != nil {
		return err
	}
	n.figure(Figure{Name: "eni.add.first", Unit: "s", Ours: round(time.Since(began).Seconds())})
	return nil
}

// host is the machine that the node is: an ENI is plugged in as a tap.
type host struct{ *fabric }

func (h host) Attach(p cloud.Port) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ports[p.ENI] = vpc.Port(p)
	return nil
}

func (h host) SetAddrs(eni string, addrs []netip.Addr) error {
	return h.Network.SetAddrs(eni, addrs)
}

func (h host) Run(_ context.Context, m cloud.Machine) error {
	for _, nic := range m.NICs {
		if err := h.PlugNIC(context.Background(), m.Instance, nic); err != nil {
			return err
		}
	}
	return nil
}

func (h host) PlugNIC(_ context.Context, _ string, nic cloud.NIC) error {
	h.mu.Lock()
	p := h.ports[nic.ENI]
	h.mu.Unlock()
	dev, err := h.plug(p)
	if err != nil || !p.Primary {
		return err
	}
	return h.configure(dev, p.Addrs[0])
}

func (h host) UnplugNIC(_ context.Context, _, eni string) error { return h.Network.Detach(eni) }

func (host) Detach(string) error                                    { return nil }
func (host) Destroy(context.Context, string) error                  { return nil }
func (host) PlugDisk(context.Context, string, cloud.Volume) error   { return nil }
func (host) UnplugDisk(context.Context, string, string) error       { return nil }
func (host) ResizeDisk(context.Context, string, cloud.Volume) error { return nil }

// direct calls a handler of the region in place, as the instance.
type direct struct {
	handler http.Handler
	from    netip.Addr
}

func (d direct) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.Host, req.RemoteAddr = req.URL.Host, fmt.Sprintf("%s:40000", d.from)
	if req.Body == nil {
		req.Body = http.NoBody
	}
	w := httptest.NewRecorder()
	d.handler.ServeHTTP(w, req)
	return w.Result(), nil
}
