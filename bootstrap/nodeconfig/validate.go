package nodeconfig

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// validator collects what is wrong with a defaulted Config.
type validator struct {
	skip     func(field string) bool // a problem of it is known already
	present  map[string]int          // the fields that the document says
	problems Problems
	places   []place // of mount points, so far
}

// place is a mount point, and the field that names it.
type place struct{ field, dir string }

func (v *validator) problem(field, format string, args ...any) {
	if !v.skip(field) {
		v.problems = append(v.problems, Problem{Field: field, Text: fmt.Sprintf(format, args...)})
	}
}

// need reports an empty field, and whether there is something to look at.
func (v *validator) need(field, value, advice string) bool {
	if value == "" {
		v.problem(field, "missing; %s", advice)
	}
	return value != ""
}

func (v *validator) config(c *node.Config) {
	v.cluster(&c.Cluster)
	if c.Network.ExclusiveENIs > 0 && !c.Cluster.ServiceCIDR.IsValid() {
		v.problem("cluster.serviceCIDR", "missing; with network.exclusiveENIs it says what pods with an ENI of their own reach through the node, such as 172.16.0.0/20")
	}
	v.node(&c.Node)
	v.network(&c.Network)
	v.disks(c.Disks, len(c.Disks)+len(c.DataDisks) == 1)
	v.dataDisks(c)
	v.kubelet(&c.Kubelet)
	v.registries(c.Containerd.Registries)
	v.services(c)
	v.metrics(&c.Metrics)
	v.domain("cloud.apiDomain", c.Cloud.APIDomain)
	if c.Cloud.CertificateAuthority != "" {
		v.authority("cloud.certificateAuthority", c.Cloud.CertificateAuthority)
	}
}

// The forms of Tencent Cloud's resource ids: a prefix and eight characters so
// far; some more are let through.
var resourceID = regexp.MustCompile(`^([a-z]+)-[a-z0-9]{6,16}$`)

func (v *validator) id(field, prefix, id string) {
	if m := resourceID.FindStringSubmatch(id); m == nil || m[1] != prefix {
		v.problem(field, "found %s, expected an id such as %s-1a2b3c4d", quote(id), prefix)
	}
}

// Source of the form: https://kubernetes.io/docs/reference/access-authn-authz/bootstrap-tokens/
var tokenForm = regexp.MustCompile(`^[a-z0-9]{6}\.[a-z0-9]{16}$`)

func (v *validator) cluster(c *node.ClusterConfig) {
	if v.need("cluster.id", c.ID, "write the cluster's id, such as cls-1a2b3c4d") {
		v.id("cluster.id", "cls", c.ID)
	}
	const endpoint = "the API server's address, such as https://10.0.0.10:6443"
	if v.need("cluster.endpoint", c.Endpoint, "write "+endpoint) {
		u, err := url.Parse(c.Endpoint)
		if err != nil || u.Scheme != "https" || !validHostPort(u) || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			v.problem("cluster.endpoint", "found %s, expected %s", quote(redactURL(c.Endpoint)), endpoint)
		}
	}
	if v.need("cluster.certificateAuthority", c.CertificateAuthority, "write the cluster's CA certificate in PEM") {
		v.authority("cluster.certificateAuthority", c.CertificateAuthority)
	}
	if token := c.BootstrapToken.Reveal(); v.need("cluster.bootstrapToken", token, "make one with: kubeadm token create") && !tokenForm.MatchString(token) {
		v.problem("cluster.bootstrapToken", "found %d characters (not shown), expected 6 and 16 lower-case letters or digits with a dot between, such as abcdef.0123456789abcdef", len(token))
	}
	v.domain("cluster.domain", c.Domain)
	if p := c.ServiceCIDR; p.IsValid() && p != p.Masked() {
		v.problem("cluster.serviceCIDR", "found %s, whose address has bits beyond the prefix; did you mean %s?", p, p.Masked())
	}
	if len(c.DNS) == 0 {
		v.problem("cluster.dns", "missing; write the service address of the cluster's DNS, such as [172.16.0.10]")
	}
	for i, a := range c.DNS {
		switch field := index("cluster.dns", i); {
		case !a.IsValid() || a.IsUnspecified():
			v.problem(field, "found %s, expected an IP address such as 172.16.0.10", quote(addrText(a)))
		case slices.Index(c.DNS, a) < i:
			v.problem(field, "%s is there twice; keep one", a)
		// A node-local DNS cache listens on a link-local address.
		case c.ServiceCIDR.IsValid() && !c.ServiceCIDR.Contains(a) && !a.IsLinkLocalUnicast():
			v.problem(field, "%s is outside cluster.serviceCIDR %s; correct one of them", a, c.ServiceCIDR)
		}
	}
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// authority checks a bundle of CA certificates. Their dates are judged when they
// are used: here the clock may not be set yet.
func (v *validator) authority(field, text string) {
	rest := []byte(text)
	for n := 1; ; n++ {
		block, after := pem.Decode(rest)
		// What cannot be decoded is skipped: there is one BEGIN line more then.
		if block != nil && bytes.Count(rest[:len(rest)-len(after)], []byte("-----BEGIN")) > 1 {
			v.problem(field, "certificate %d is damaged; check its indentation, its base64 lines and its END line", n)
			return
		}
		if block == nil {
			switch {
			case strings.Contains(string(rest), "-----BEGIN") && !strings.Contains(string(rest), "-----END"):
				v.problem(field, "certificate %d is cut off: it has a BEGIN line and no END line", n)
			case strings.Contains(string(rest), "-----BEGIN"):
				v.problem(field, "certificate %d is not PEM; check its indentation and its base64 lines", n)
			case n == 1:
				v.problem(field, "found %s, expected PEM that begins with -----BEGIN CERTIFICATE-----", quote(text))
			}
			return
		}
		rest = after
		if block.Type != "CERTIFICATE" {
			v.problem(field, "block %d is a %s, expected a CERTIFICATE", n, clip(block.Type))
			continue
		}
		if len(block.Headers) > 0 { // which kubelet and the agent pass over
			v.problem(field, "certificate %d has header lines before its base64 (%s: …); remove them", n, clip(slices.Sorted(maps.Keys(block.Headers))[0]))
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		switch {
		case err != nil:
			v.problem(field, "certificate %d cannot be read: %v", n, err)
		case !cert.BasicConstraintsValid || !cert.IsCA:
			v.problem(field, "certificate %d (%s) is not a CA's; write the certificate that signed the API server's", n, clip(cert.Subject.String()))
		}
	}
}

func (v *validator) network(n *node.NetworkConfig) {
	switch n.Allocator {
	case node.AllocatorNode:
		v.ids("network.subnetIDs", "subnet", n.SubnetIDs, "write the VPC subnets that pods get their addresses from")
		v.ids("network.securityGroupIDs", "sg", n.SecurityGroupIDs, "write the security groups of the pods' ENIs")
	case node.AllocatorObserve: // whoever attaches the ENIs knows
	default:
		v.problem("network.allocator", "found %s, expected node or observe", quote(string(n.Allocator)))
	}
	// More ENIs or addresses than this has no instance type.
	// Source: https://cloud.tencent.com/document/product/576/18527
	v.limit("network.enis", n.ENIs, 19)
	v.limit("network.ipsPerENI", n.IPsPerENI, 50)
	v.exclusive(n)
	v.between("network.warmIPs.min", n.WarmIPs.Min, 0, node.MaxPodsLimit)
	v.between("network.warmIPs.max", n.WarmIPs.Max, 0, node.MaxPodsLimit)
	if n.WarmIPs.Max < n.WarmIPs.Min {
		v.problem("network.warmIPs.max", "found %d, which is less than network.warmIPs.min, %d", n.WarmIPs.Max, n.WarmIPs.Min)
	}
	if n.Layout != node.LayoutMark && n.Layout != node.LayoutTKECompat {
		v.problem("network.layout", "found %s, expected %s or %s", quote(string(n.Layout)), node.LayoutMark, node.LayoutTKECompat)
	}
	v.families(n.IPFamilies)
	v.ranges("network.nonMasqueradeCIDRs", n.NonMasqueradeCIDRs)
	v.between("network.metadataAccess", len(n.MetadataAccess), 0, maxRanges)
	for i, pods := range n.MetadataAccess {
		if !podPattern.MatchString(pods) {
			v.problem(index("network.metadataAccess", i), "found %s, expected pods of one namespace, such as kube-system/cbs-csi-* or monitoring/*", quote(pods))
		}
	}
}

// exclusive checks what is said of pods that have an ENI of their own.
func (v *validator) exclusive(n *node.NetworkConfig) {
	v.between("network.exclusiveENIs", n.ExclusiveENIs, 0, node.MaxExclusiveENIs)
	if n.ExclusiveENIs > 0 && n.Allocator == node.AllocatorObserve {
		v.problem("network.exclusiveENIs", "with network.allocator observe the agent attaches no ENIs; leave it out, or set network.allocator to node")
	}
	if len(n.PodSecurityGroupIDs) == 0 {
		return
	}
	v.ids("network.podSecurityGroupIDs", "sg", n.PodSecurityGroupIDs, "")
	if n.ExclusiveENIs == 0 {
		v.problem("network.podSecurityGroupIDs", "only a pod with an ENI of its own has security groups of its own; set network.exclusiveENIs, too")
	}
}

// podPattern is namespace/name, with * for any characters in the name only: who
// may create pods in a namespace is known, who may create namespaces less so.
var podPattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[-a-z0-9.*]{1,253}$`)

// families checks which families pods get addresses of. The node itself, and what
// serves it, the API server first, know each other by IPv4.
func (v *validator) families(families []node.IPFamily) {
	const field = "network.ipFamilies"
	if _, ok := v.present[field]; !ok || slices.Equal(families, []node.IPFamily{node.IPv4}) ||
		slices.Equal(families, []node.IPFamily{node.IPv4, node.IPv6}) {
		return
	}
	var text []string
	for _, f := range families {
		text = append(text, string(f))
	}
	v.problem(field, "found %s, expected [IPv4] or [IPv4, IPv6]; a node without IPv4 is not supported, and IPv4 comes first", quote("["+strings.Join(text, ", ")+"]"))
}

// maxRanges bounds a list of the network's.
const maxRanges = 100

func (v *validator) ranges(field string, ranges []netip.Prefix) {
	switch {
	case len(ranges) == 0:
		v.problem(field, "is empty, so that not even the VPC would see a pod's own address; leave it out, or write the destinations that shall")
	case len(ranges) > maxRanges:
		v.problem(field, "found %d ranges, expected at most %d", len(ranges), maxRanges)
		return
	}
	for i, p := range ranges {
		at := index(field, i)
		switch {
		case !p.Addr().Is4():
			v.problem(at, "found %s, expected an IPv4 range such as 10.0.0.0/8", quote(p.String()))
			continue
		case p != p.Masked():
			v.problem(at, "found %s, whose address has bits beyond the prefix; did you mean %s?", p, p.Masked())
			continue
		}
		for j, o := range ranges {
			if j != i && p.Overlaps(o) && (o.Bits() < p.Bits() || o == p && j < i) {
				v.problem(at, "%s is in %s's %s already; keep one", p, index(field, j), o)
				break
			}
		}
	}
}

// limit checks a number that may be left out.
func (v *validator) limit(field string, n, high int) {
	if _, ok := v.present[field]; ok {
		v.between(field, n, 1, high)
	}
}

func (v *validator) between(field string, n, low, high int) {
	if n < low || n > high {
		v.problem(field, "found %d, expected %d to %d", n, low, high)
	}
}

func (v *validator) ids(field, prefix string, ids []string, advice string) {
	if len(ids) == 0 {
		v.problem(field, "missing; %s", advice)
	}
	for i, id := range ids {
		v.id(index(field, i), prefix, id)
		if slices.Index(ids, id) < i {
			v.problem(index(field, i), "%s is there twice; keep one", quote(id))
		}
	}
}

func (v *validator) kubelet(k *node.KubeletConfig) {
	v.limit("kubelet.maxPods", k.MaxPods, node.MaxPodsLimit)
	known := slices.Sorted(maps.Keys(kubeletFields)) // so that did-you-mean is the same every time
	for _, name := range slices.Sorted(maps.Keys(k.Config)) {
		value := k.Config[name]
		field := join("kubelet.config", name)
		kind, ok := kubeletFields[name]
		switch instead, owned := kubeletOwned[name]; {
		case owned:
			v.problem(field, "is set by tkenode; %s", instead)
		case !ok:
			_, advice := didYouMean(name, known)
			v.problem(field, "kubelet has no such field%s", advice)
		case value != nil:
			if found, below := misfit(value, kind); below != "" {
				v.problem(field, "its %s: found %s, expected %s", clip(below), found, strings.TrimPrefix(kind, aMappingOf("")))
			} else if found != "" {
				v.problem(field, "found %s, expected %s", found, kind)
			}
		}
	}
}

func kindOf(x any) string {
	switch x.(type) {
	case string:
		return "text"
	case bool:
		return "a boolean"
	case []any:
		return "a list"
	case map[string]any:
		return "a mapping"
	}
	return "a number"
}

func (v *validator) registries(rs []node.Registry) {
	for i, r := range rs {
		at := index("containerd.registries", i)
		if v.need(at+".host", r.Host, "write the registry's host, such as ccr.ccs.tencentyun.com") {
			if u, err := url.Parse("https://" + r.Host); err != nil || !validHostPort(u) || u.Host != r.Host {
				v.problem(at+".host", "found %s, expected a host, such as ccr.ccs.tencentyun.com", quote(redactURL(r.Host)))
			} else if j := slices.IndexFunc(rs, func(o node.Registry) bool { return o.Host == r.Host }); j < i {
				v.problem(at+".host", "%s is %s already", quote(r.Host), index("containerd.registries", j))
			}
		}
		if len(r.Mirrors) == 0 {
			v.problem(at+".mirrors", "missing; write the mirrors' URLs, or remove the registry")
		}
		for j, m := range r.Mirrors {
			v.httpURL(index(at+".mirrors", j), m, "a URL such as https://mirror.ccs.tencentyun.com")
			if slices.Index(r.Mirrors, m) < j { // containerd refuses the file
				v.problem(index(at+".mirrors", j), "%s is there twice; keep one", quote(redactURL(m)))
			}
		}
	}
}

// services checks what the node runs for the cluster's Services.
func (v *validator) services(c *node.Config) {
	if c.KubeProxy.Enabled && !c.Cluster.ServiceCIDR.IsValid() && !v.skip("cluster.serviceCIDR") {
		v.problem("kubeProxy.enabled", "demands cluster.serviceCIDR; write it, such as 172.16.0.0/20, or leave kube-proxy to a DaemonSet")
	}
	if !c.CoreDNS.Enabled || v.skip("cluster.dns") {
		return
	}
	// An address of the Service range is no alternative: pods would reach the Service
	// of that address, if there is one, and of what the node itself sends to one that
	// is no Service's kube-proxy drops everything.
	// Source: https://github.com/kubernetes/kubernetes/blob/v1.36.3/pkg/proxy/nftables/proxier.go (cluster-ips-check)
	if len(c.LocalDNS()) == 0 {
		v.problem("coreDNS.enabled", "cluster.dns has no link-local address for it to listen on; write 169.254.20.10 as the first of cluster.dns, or leave CoreDNS to a Deployment")
	}
	for i, a := range c.Cluster.DNS {
		if a.Is6() && a.IsLinkLocalUnicast() {
			v.problem(index("cluster.dns", i), "found %s, expected an IPv4 address, such as 169.254.20.10, for CoreDNS to listen on", a)
		}
	}
}

// Source: https://prometheus.io/docs/concepts/data_model/
var metricLabel = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_]*$`)

func (v *validator) metrics(m *node.MetricsConfig) {
	if m.Endpoint != "" {
		v.httpURL("metrics.endpoint", m.Endpoint, "a remote write URL such as http://10.0.0.11:9090/api/v1/write")
	}
	if d := time.Duration(m.Interval); d < time.Second || d > 10*time.Minute {
		v.problem("metrics.interval", "found %s, expected 1s to 10m", d)
	}
	for _, name := range slices.Sorted(maps.Keys(m.ExternalLabels)) {
		if !metricLabel.MatchString(name) || strings.HasPrefix(name, "__") {
			v.problem(entry("metrics.externalLabels", name), "is not a label name of Prometheus: letters, digits and _, no digit and no __ at the beginning")
		}
		if m.ExternalLabels[name] == "" {
			v.problem(entry("metrics.externalLabels", name), "is empty, which Prometheus takes as absent; fill it in or remove it")
		}
	}
}

func (v *validator) httpURL(field, text, want string) {
	u, err := url.Parse(text)
	switch {
	case err != nil || (u.Scheme != "http" && u.Scheme != "https") || !validHostPort(u):
		v.problem(field, "found %s, expected %s", quote(redactURL(text)), want)
	case u.User != nil:
		v.problem(field, "has a user name or password in it (not shown), which would be logged; remove it")
	}
}

func (v *validator) domain(field, text string) {
	if !isSubdomain(text) {
		v.problem(field, "found %s, expected a DNS name in lower case", quote(text))
	}
}

// validHostPort reports whether u's host is an address or a DNS name, with a
// port that exists, or none.
func validHostPort(u *url.URL) bool {
	if port := u.Port(); port != "" {
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			return false
		}
	} else if strings.HasSuffix(u.Host, ":") {
		return false
	}
	if a, err := netip.ParseAddr(u.Hostname()); err == nil {
		return a.Zone() == "" // an interface's name means nothing on another machine
	}
	return isSubdomain(strings.ToLower(u.Hostname())) && !numericHost.MatchString(u.Hostname())
}

// numericHost is a name whose last label is a number: an address with a mistake,
// which no resolver takes for a name. Source: RFC 1123, 2.1.
var numericHost = regexp.MustCompile(`(^|\.)[0-9]+$`)

var userInfo = regexp.MustCompile(`(?i)^([a-z]*://)?[^/]*@`)

// redactURL takes user name and password out of what may be a URL.
func redactURL(text string) string { return userInfo.ReplaceAllString(text, "${1}…@") }

func index(field string, i int) string { return field + "[" + strconv.Itoa(i) + "]" }
