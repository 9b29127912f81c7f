package bootstrap

import "github.com/tkenode/tkenode/agent/node"

// Where the files of kube-proxy and CoreDNS go.
const (
	kubeProxyConfigPath = "/etc/kubernetes/kube-proxy.yaml"
	corefilePath        = "/etc/kubernetes/Corefile"
)

// identity lists the units that read the cluster's CA and kubelet's kubeconfig:
// kube-proxy and CoreDNS are the node to the API server, and read its certificate
// again whenever kubelet has rotated it.
func identity(c node.Config) []string {
	units := []string{node.KubeletUnit}
	if c.KubeProxy.Enabled {
		units = append(units, node.KubeProxyUnit)
	}
	if c.CoreDNS.Enabled {
		units = append(units, node.CoreDNSUnit)
	}
	return units
}

// kubeProxyConfig is the KubeProxyConfiguration.
func kubeProxyConfig(c node.Config, f node.Facts) map[string]any {
	type object = map[string]any
	return object{
		"apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
		"kind":       "KubeProxyConfiguration",

		"mode":             "nftables",
		"clientConnection": object{"kubeconfig": node.KubeconfigPath},
		"hostnameOverride": c.Name(f),
		// Pods have addresses of the VPC, of no range that tells a node's own from
		// others. What comes in by a pod's link keeps its address on the way to a
		// Service; all else is masqueraded, so that answers come back this way.
		"detectLocalMode": "InterfaceNamePrefix",
		"detectLocal":     object{"interfaceNamePrefix": node.PodLinkPrefix},
		// The maximum is the kernel's, by the size of memory, or of sysctl.d: kube-proxy
		// would set its own at each start, over either.
		"conntrack":          object{"maxPerCore": 0},
		"healthzBindAddress": node.KubeProxyHealth,
		"metricsBindAddress": "127.0.0.1:10249",
	}
}
