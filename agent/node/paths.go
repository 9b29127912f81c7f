package node

// Where bootstrap leaves what the agent and kubelet read.
const (
	ConfigDir      = "/var/lib/tkenode/config"                  // <generation>.json, 0600
	SealedPath     = ConfigDir + "/current"                     // link to the generation in force
	KubeletRoot    = "/var/lib/kubelet"                         // kubelet's directory
	KubeletPKI     = "/var/lib/kubelet/pki"                     // where kubelet keeps and rotates its certificate
	ClientCertPath = KubeletPKI + "/kubelet-client-current.pem" // certificate and key in one, a link
	CAPath         = "/etc/kubernetes/ca.crt"                   // the cluster's CA
	KubeconfigPath = "/etc/kubernetes/kubelet.kubeconfig"       // kubelet's way to the API server
)
