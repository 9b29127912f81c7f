package nodeconfig

import (
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// The syntax of names, labels and taints.
// Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#syntax-and-character-set
var (
	dnsSubdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	labelName    = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
)

func isSubdomain(s string) bool { return len(s) <= 253 && dnsSubdomain.MatchString(s) }

// Labels that tkenode itself puts on the Node: their truth comes from metadata.
var ownLabels = []string{
	"beta.kubernetes.io/arch",
	"beta.kubernetes.io/instance-type",
	"beta.kubernetes.io/os",
	"cloud.tencent.com/node-instance-id",
	"failure-domain.beta.kubernetes.io/region",
	"failure-domain.beta.kubernetes.io/zone",
	"kubernetes.io/arch",
	"kubernetes.io/hostname",
	"kubernetes.io/os",
	"node.kubernetes.io/instance-type",
	"topology.kubernetes.io/region",
	"topology.kubernetes.io/zone",
}

// kubeletMaySet reports whether NodeRestriction lets a kubelet set a label of
// this prefix on its own Node.
// Source: https://kubernetes.io/docs/reference/access-authn-authz/admission-controllers/#noderestriction
func kubeletMaySet(prefix string) bool {
	in := func(domain string) bool { return prefix == domain || strings.HasSuffix(prefix, "."+domain) }
	return !in("kubernetes.io") && !in("k8s.io") || in("node.kubernetes.io") || in("kubelet.kubernetes.io")
}

func (v *validator) node(n *node.NodeSpec) {
	switch n.NameFrom {
	case node.NameFromPrivateIP, node.NameFromInstanceID, node.NameFromHostname:
	default:
		v.problem("node.nameFrom", "found %s, expected privateIP, instanceID or hostname", quote(string(n.NameFrom)))
	}
	for _, key := range slices.Sorted(maps.Keys(n.Labels)) {
		field := entry("node.labels", key)
		if !v.key(field, key) {
			continue
		}
		v.labelValue(field, n.Labels[key])
		prefix, _, _ := strings.Cut(key, "/")
		switch {
		case slices.Contains(ownLabels, key):
			v.problem(field, "is set by tkenode from the instance's metadata; remove it")
		case strings.Contains(key, "/") && !kubeletMaySet(prefix):
			v.problem(field, "the API server lets no node label itself so (NodeRestriction); use a prefix of your own, node.kubernetes.io/, or label the Node with kubectl")
		}
	}
	for i, t := range n.Taints {
		field := index("node.taints", i)
		if v.need(field+".key", t.Key, "write the taint's key") {
			v.key(field+".key", t.Key)
		}
		if t.Value != "" {
			v.labelValue(field+".value", t.Value)
		}
		switch t.Effect {
		case "NoSchedule", "PreferNoSchedule", "NoExecute":
		case "":
			v.problem(field+".effect", "missing; write NoSchedule, PreferNoSchedule or NoExecute")
		default:
			v.problem(field+".effect", "found %s, expected NoSchedule, PreferNoSchedule or NoExecute", quote(t.Effect))
		}
		same := func(o node.Taint) bool { return o.Key == t.Key && o.Effect == t.Effect }
		if j := slices.IndexFunc(n.Taints, same); j < i {
			v.problem(field, "has the key and effect of %s; keep one", index("node.taints", j))
		}
	}
}

// key checks the key of a label or taint: a name of at most 63 characters, after
// a DNS name and a slash or not.
func (v *validator) key(field, key string) bool {
	prefix, name, slash := strings.Cut(key, "/")
	if !slash {
		prefix, name = "", key
	}
	ok := len(name) <= 63 && labelName.MatchString(name) && (!slash || isSubdomain(prefix))
	if !ok {
		v.problem(field, "%s is not a key of Kubernetes: at most 63 letters, digits, - _ or . with a letter or digit at both ends, after a lower-case DNS name and a slash or not", quote(key))
	}
	return ok
}

func (v *validator) labelValue(field, value string) {
	if value != "" && (len(value) > 63 || !labelName.MatchString(value)) {
		v.problem(field, "%s is not a value of Kubernetes: at most 63 letters, digits, - _ or . with a letter or digit at both ends", quote(value))
	}
}

// IsNodeName reports whether a Node can be called name.
func IsNodeName(name string) bool { return isSubdomain(name) }
