package bootstrap

import (
	"fmt"
	"maps"

	"github.com/tkenode/tkenode/agent/node"
)

// kubeletConfig is the KubeletConfiguration. What kubelet defaults well is left
// out: it reports a Node Ready within 100 ms of being so, for one.
func kubeletConfig(c node.Config, f node.Facts, m Machine) map[string]any {
	type object = map[string]any
	config := object{
		"apiVersion": "kubelet.config.k8s.io/v1beta1",
		"kind":       "KubeletConfiguration",

		"authentication": object{
			"anonymous": object{"enabled": false},
			"webhook":   object{"enabled": true},
			"x509":      object{"clientCAFile": node.CAPath},
		},
		"authorization":      object{"mode": "Webhook"},
		"readOnlyPort":       0,
		"rotateCertificates": true,
		"serverTLSBootstrap": false,
		"tlsMinVersion":      "VersionTLS12",

		"providerID":         f.ProviderID(),
		"registerNode":       true,
		"registerWithTaints": taints(c.Node.Taints),
		"maxPods":            c.MaxPods(f),
		"clusterDomain":      c.Cluster.Domain,
		"clusterDNS":         c.Cluster.DNS,
		// Not /etc/resolv.conf, which may name a loopback address: in a pod that is the pod's own.
		"resolvConf": "/run/systemd/resolve/resolv.conf",

		"containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
		"cgroupDriver":             "systemd",
		"failSwapOn":               true,
		"serializeImagePulls":      false,
		"maxParallelImagePulls":    5,

		"kubeReserved": reserved(m),
		// TKE's threshold for memory; a map given here replaces kubelet's defaults,
		// so the others are said again.
		"evictionHard": object{
			"memory.available": "100Mi", "nodefs.available": "10%", "nodefs.inodesFree": "5%", "imagefs.available": "15%", "imagefs.inodesFree": "5%",
		},
		"shutdownGracePeriod":             "30s",
		"shutdownGracePeriodCriticalPods": "10s",
	}
	// A default of ours must not stand beside a setting that kubelet allows only
	// without it. Source: pkg/kubelet/apis/config/validation/validation.go
	if c.Kubelet.Config["serializeImagePulls"] == true {
		delete(config, "maxParallelImagePulls")
	}
	if c.Kubelet.Config["shutdownGracePeriodByPodPriority"] != nil {
		delete(config, "shutdownGracePeriod")
		delete(config, "shutdownGracePeriodCriticalPods")
	}
	return merge(config, c.Kubelet.Config)
}

func taints(ts []node.Taint) []map[string]string {
	list := []map[string]string{}
	for _, t := range ts {
		list = append(list, map[string]string{"key": t.Key, "value": t.Value, "effect": t.Effect})
	}
	return list
}

// merge lays over on base: mappings field by field, all else whole.
func merge(base, over map[string]any) map[string]any {
	out := maps.Clone(base)
	for k, v := range over {
		below, isMap := base[k].(map[string]any)
		if m, ok := v.(map[string]any); ok && isMap {
			v = merge(below, m)
		}
		out[k] = v
	}
	return out
}

// tier is a part of a resource and the share of it that is reserved, in ten
// thousandths.
type tier struct{ upTo, share int64 }

// reserved is what is kept from pods for kubelet, containerd and the system.
// Source: https://cloud.tencent.com/document/product/457/76057
func reserved(m Machine) map[string]any {
	const gib = 1 << 30
	milliCPU := 100 + share(int64(m.CPUs)*1000, []tier{{4000, 0}, {64_000, 250}, {128_000, 125}, {1 << 62, 50}})
	memory := share(m.MemoryBytes, []tier{{4 * gib, 2500}, {8 * gib, 2000}, {16 * gib, 1000}, {128 * gib, 600}, {1 << 62, 200}})
	return map[string]any{"cpu": fmt.Sprintf("%dm", milliCPU), "memory": fmt.Sprintf("%dMi", memory>>20)}
}

func share(of int64, tiers []tier) (sum int64) {
	from := int64(0)
	for _, t := range tiers {
		if part := min(of, t.upTo) - from; part > 0 {
			sum += part * t.share / 10_000
		}
		from = t.upTo
	}
	return sum
}
