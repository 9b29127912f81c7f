package main

import (
	"iter"
	"net/netip"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

// The versions of CNI that are spoken.
// Source: https://github.com/containernetworking/cni/blob/main/SPEC.md
var versions = [...]string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

const latest = "1.1.0"

// since says in which version a command was introduced.
var since = map[string]string{"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}

// maxConfig bounds standard input: a GC lists the attachments of a node.
const maxConfig = cni.MaxRequest

// config is what is read of the network configuration. Other fields are for
// other plugins of the chain, or for the runtime.
type config struct {
	CNIVersion       string           `json:"cniVersion"`
	Name             string           `json:"name"`
	PrevResult       *result          `json:"prevResult"`
	ValidAttachments []cni.Attachment `json:"cni.dev/valid-attachments"`
	// RuntimeConfig has what the capabilities in the configuration ask the runtime for.
	RuntimeConfig struct {
		Annotations map[string]string `json:"io.kubernetes.cri.pod-annotations"`
	} `json:"runtimeConfig"`
}

func (c config) check(command string) error {
	i := slices.Index(versions[:], c.CNIVersion)
	if i < 0 {
		return cni.Errorf(cni.CodeIncompatibleVersion, "incompatible CNI version", "cniVersion is %q, want one of %s", c.CNIVersion, strings.Join(versions[:], ", "))
	}
	if v, ok := since[command]; ok && i < slices.Index(versions[:], v) {
		return cni.Errorf(cni.CodeIncompatibleVersion, "incompatible CNI version", "%s needs cniVersion %s, the configuration's is %s", command, v, c.CNIVersion)
	}
	if c.Name == "" {
		return cni.Errorf(cni.CodeInvalidConfig, "invalid network configuration", "it has no name")
	}
	return nil
}

// result is the result of an ADD, in the form that all versions share but for
// ip.Version.
type result struct {
	CNIVersion string        `json:"cniVersion"`
	Interfaces []interfaceOf `json:"interfaces,omitempty"`
	IPs        []ip          `json:"ips,omitempty"`
	Routes     []route       `json:"routes,omitempty"`
	DNS        struct{}      `json:"dns"`
}

type interfaceOf struct {
	Name    string `json:"name"`
	MAC     string `json:"mac,omitempty"`
	MTU     int    `json:"mtu,omitempty"` // from 1.1.0 on
	Sandbox string `json:"sandbox,omitempty"`
}

type ip struct {
	Version   string       `json:"version,omitempty"` // before 1.0.0
	Address   netip.Prefix `json:"address"`
	Gateway   netip.Addr   `json:"gateway,omitzero"`
	Interface *int         `json:"interface,omitempty"`
}

type route struct {
	Dst netip.Prefix `json:"dst"`
	GW  netip.Addr   `json:"gw,omitzero"`
}

// resultFor prints r as version has it.
func resultFor(version string, r cni.Result, req cni.Request) result {
	inPod := 1
	out := result{
		CNIVersion: version,
		Interfaces: []interfaceOf{{Name: r.HostName, MAC: r.HostMAC}, {Name: req.IfName, MAC: r.MAC, Sandbox: req.NetNS}},
		IPs:        []ip{{Address: r.Addr, Gateway: r.Gateway, Interface: &inPod}},
		Routes:     []route{{Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), GW: r.Gateway}},
	}
	if r.Addr6.IsValid() {
		out.IPs = append(out.IPs, ip{Address: r.Addr6, Gateway: r.Gateway6, Interface: &inPod})
		out.Routes = append(out.Routes, route{Dst: netip.PrefixFrom(netip.IPv6Unspecified(), 0), GW: r.Gateway6})
	}
	if r.VethName != "" {
		out.Interfaces = append(out.Interfaces, interfaceOf{Name: r.VethName, MAC: r.VethMAC, Sandbox: req.NetNS})
	}
	switch version {
	case "0.3.1", "0.4.0":
		for i, a := range out.IPs {
			out.IPs[i].Version = "4"
			if a.Address.Addr().Is6() {
				out.IPs[i].Version = "6"
			}
		}
	case "1.1.0":
		for i := range out.Interfaces {
			out.Interfaces[i].MTU = r.MTU
		}
	}
	return out
}

// asks puts what the pod's annotations ask of its network into the request.
func asks(annotations map[string]string, req *cni.Request) {
	req.Network = strings.TrimSpace(annotations[cni.AnnotationNetwork])
	for id := range strings.SplitSeq(annotations[cni.AnnotationGroups], ",") {
		if id = strings.TrimSpace(id); id != "" {
			req.SecurityGroups = append(req.SecurityGroups, id)
		}
	}
}

// args yields the pairs of CNI_ARGS, "K=V;K=V". What is no pair is passed over,
// as is every key that we do not know: runtimes set IgnoreUnknown for that.
func args(s string) iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		for pair := range strings.SplitSeq(s, ";") {
			if key, value, ok := strings.Cut(pair, "="); ok && !yield(key, value) {
				return
			}
		}
	}
}
