package node

import "time"

// Where bootstrap leaves what the agent and kubelet read.
const (
	ConfigDir      = "/var/lib/tkenode/config"                  // <generation>.json, 0600
	SealedPath     = ConfigDir + "/current"                     // link to the generation in force
	BootReportPath = "/run/tkenode/bootstrap.json"              // gone with the boot it reports on
	KubeletPKI     = "/var/lib/kubelet/pki"                     // where kubelet keeps and rotates its certificate
	ClientCertPath = KubeletPKI + "/kubelet-client-current.pem" // certificate and key in one, a link
	CAPath         = "/etc/kubernetes/ca.crt"                   // the cluster's CA
	KubeconfigPath = "/etc/kubernetes/kubelet.kubeconfig"       // kubelet's way to the API server
)

// BootReport is what bootstrap says about this boot: how far it got, why it
// waits or has given up, and how long each step took.
type BootReport struct {
	Phase   string    `json:"phase"` // the step that runs, or the one that failed; "done" at the end
	OK      bool      `json:"ok"`    // the node is sealed and has its certificate
	Class   string    `json:"class,omitempty"`
	Reason  string    `json:"reason,omitempty"`
	Message string    `json:"message,omitempty"` // a line a problem
	Since   time.Time `json:"since"`             // of Phase and Reason
	// Digest is of the sealed configuration that this boot has confirmed to be
	// this instance's own. Until it is there, the agent must not act on what is
	// sealed: the disk may be an image captured from another node.
	Digest     string     `json:"digest,omitempty"`
	Generation int        `json:"generation,omitempty"`
	Steps      []BootStep `json:"steps"`
}

// BootStep is one line of the boot ledger.
type BootStep struct {
	Name  string        `json:"name"`
	Start time.Time     `json:"start"`
	Took  time.Duration `json:"took"` // nanoseconds; 0 while it runs
}
