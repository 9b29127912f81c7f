package nodeconfig

import (
	"encoding/base64"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// defaults fills in what the document does not say. present has the fields that
// it does say: an explicit zero is not replaced, validation refuses it.
func defaults(c *node.Config, present map[string]int) {
	fill(present, "cluster.domain", &c.Cluster.Domain, "cluster.local")
	fill(present, "node.nameFrom", &c.Node.NameFrom, node.NameFromPrivateIP)
	fill(present, "network.allocator", &c.Network.Allocator, node.AllocatorNode)
	// TKE's; one that is given moves the other.
	// Source: https://cloud.tencent.com/document/product/457/64919
	const warm = 5
	fill(present, "network.warmIPs.max", &c.Network.WarmIPs.Max, max(warm, c.Network.WarmIPs.Min))
	fill(present, "network.warmIPs.min", &c.Network.WarmIPs.Min, max(min(warm, c.Network.WarmIPs.Max), 0))
	fill(present, "network.layout", &c.Network.Layout, node.LayoutMark)
	fill(present, "network.nonMasqueradeCIDRs", &c.Network.NonMasqueradeCIDRs, node.PrivateNetworks)
	for i := range c.Disks {
		fill(present, index("disks", i)+".fileSystem", &c.Disks[i].FileSystem, node.Ext4)
		fill(present, index("disks", i)+".whenNotBlank", &c.Disks[i].WhenNotBlank, node.RefuseFound)
	}
	fill(present, "metrics.interval", &c.Metrics.Interval, node.Duration(15*time.Second))
	fill(present, "cloud.apiDomain", &c.Cloud.APIDomain, "internal.tencentcloudapi.com")
	c.Cluster.CertificateAuthority = pemText(c.Cluster.CertificateAuthority)
	c.Cloud.CertificateAuthority = pemText(c.Cloud.CertificateAuthority)
}

func fill[T any](present map[string]int, field string, v *T, to T) {
	if _, ok := present[field]; !ok {
		*v = to
	}
}

// pemText takes off the base64 that kubeconfig files put around PEM.
func pemText(s string) string {
	if b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s), "")); err == nil {
		return string(b)
	}
	return s
}
