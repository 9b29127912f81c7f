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
	fill(present, "network.enis", &c.Network.ENIs, 1)
	fill(present, "network.ipsPerENI", &c.Network.IPsPerENI, 8)
	for i := range c.Disks {
		fill(present, index("disks", i)+".fileSystem", &c.Disks[i].FileSystem, node.Ext4)
	}
	// In bounds even when the network's numbers are not: one problem is enough.
	fill(present, "kubelet.maxPods", &c.Kubelet.MaxPods, min(max(c.Network.ENIs*c.Network.IPsPerENI, 1), maxMaxPods))
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
