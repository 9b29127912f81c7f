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
)

// PauseImage is the sandbox image that every node image carries. Its name leads
// to no registry on purpose: where the image is missing, pods fail at once and
// say so, instead of waiting for the network.
const PauseImage = "localhost/tkenode/pause:v1"
