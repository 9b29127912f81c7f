package node

import "io/fs"

// File is a whole file that tkenode owns on the node: what it holds is computed
// from the sealed configuration, and any other content is drift.
type File struct {
	Path string // absolute
	Mode fs.FileMode
	Data []byte
	// Units are the systemd units that read the file when they start, and so are
	// restarted when its content changes: "containerd.service".
	Units []string
}

// The units that the rendered files describe, and that the agent starts.
const (
	ContainerdUnit = "containerd.service"
	KubeletUnit    = "kubelet.service"
	KubeProxyUnit  = "kube-proxy.service"
	CoreDNSUnit    = "coredns.service"
)

// KubeProxyHealth is where kube-proxy answers health checks.
const KubeProxyHealth = "127.0.0.1:10256"

// PodLinkPrefix begins the names of the host's ends of pods' links, as TKE names
// them: by it kube-proxy tells what comes from a pod of this node.
const PodLinkPrefix = "eni"

// PauseImage is the sandbox image that every node image carries. Its name leads
// to no registry on purpose: where the image is missing, pods fail at once and
// say so, instead of waiting for the network.
const PauseImage = "localhost/tkenode/pause:v1"

// ContainerdRoot is where containerd keeps images and containers; usually a disk
// of its own is mounted there.
const ContainerdRoot = "/var/lib/containerd"

// CRINamespace is where containerd's CRI plug-in looks for images.
const CRINamespace = "k8s.io"

// ImageLabels are those by which the CRI plug-in knows its images, and which of
// them kubelet's garbage collection must spare.
// Source: containerd internal/cri/labels/labels.go
var ImageLabels = map[string]string{
	"io.cri-containerd.image":  "managed",
	"io.cri-containerd.pinned": "pinned",
}
