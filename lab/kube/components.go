package kube

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tkenode/tkenode/lab/proc"
)

// component is one program of the control plane.
type component struct {
	name string
	args []string
	stop time.Duration
}

func (c *Cluster) command(comp component) proc.Command {
	return proc.Command{
		Path: filepath.Join(c.options.Bin, comp.name),
		Args: comp.args,
		Log:  filepath.Join(c.options.Dir, comp.name+".log"),
		Stop: comp.stop,
	}
}

// etcd listens on a unix socket: no port to choose, no certificates, and nobody
// else on the host can read the cluster.
func (c *Cluster) etcd() component {
	return component{name: "etcd", stop: 2 * time.Second, args: []string{
		"--name=lab", "--data-dir=" + c.path("etcd"), "--log-level=warn",
		"--listen-client-urls=" + c.etcdURL(), "--advertise-client-urls=" + c.etcdURL(),
		"--listen-peer-urls=" + c.peerURL(), "--initial-advertise-peer-urls=" + c.peerURL(),
		"--initial-cluster=lab=" + c.peerURL(),
		// The cluster lives as long as the lab; a lost page costs nothing.
		"--unsafe-no-fsync",
		// One member has nobody to beat for.
		"--heartbeat-interval=1000", "--election-timeout=10000",
	}}
}

func (c *Cluster) etcdURL() string { return "unix://" + c.path("etcd.sock") }
func (c *Cluster) peerURL() string { return "unix://" + c.path("peer.sock") }

const (
	// kubeletClient is who the API server is to kubelets.
	kubeletClient = "kube-apiserver-kubelet-client"
	// frontProxyClient is who the API server is to aggregated API servers.
	frontProxyClient = "front-proxy-client"
	issuer           = "https://kubernetes.default.svc.cluster.local"
)

func (c *Cluster) apiServer() component {
	p := c.pki
	return component{name: "kube-apiserver", stop: 5 * time.Second, args: []string{
		"--bind-address=" + c.address.Addr().String(), "--secure-port=" + fmt.Sprint(c.address.Port()),
		"--advertise-address=" + c.options.Address.Addr().String(),
		"--etcd-servers=" + c.etcdURL(),
		"--service-cluster-ip-range=" + c.options.ServiceCIDR.String(),
		"--tls-cert-file=" + p.cert("apiserver"), "--tls-private-key-file=" + p.key("apiserver"),
		"--client-ca-file=" + p.cert("ca"), "--enable-bootstrap-token-auth",
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged",
		"--service-account-issuer=" + issuer,
		"--service-account-signing-key-file=" + p.key(tokenKey), "--service-account-key-file=" + p.key(tokenKey),
		"--requestheader-client-ca-file=" + p.cert("front-proxy-ca"), "--requestheader-allowed-names=" + frontProxyClient,
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file=" + p.cert("front-proxy"), "--proxy-client-key-file=" + p.key("front-proxy"),
		"--kubelet-client-certificate=" + p.cert("kubelet"), "--kubelet-client-key=" + p.key("kubelet"),
		"--kubelet-preferred-address-types=InternalIP",
		"--egress-selector-config-file=" + c.path("egress.yaml"),
		// Webhooks are called at their pods: service addresses exist on nodes only.
		"--enable-aggregator-routing",
		// A guest without hardware virtualisation needs the processor more.
		"--enable-priority-and-fairness=false", "--profiling=false",
	}}
}

// controllers are those that nodes and the workloads on them meet. Each one more
// keeps watches and caches that an idle lab would pay for.
var controllers = []string{
	"bootstrap-signer-controller", "token-cleaner-controller",
	"certificatesigningrequest-approving-controller", "certificatesigningrequest-signing-controller",
	"certificatesigningrequest-cleaner-controller",
	"node-lifecycle-controller", "taint-eviction-controller", "pod-garbage-collector-controller",
	"serviceaccount-controller", "root-ca-certificate-publisher-controller", "clusterrole-aggregation-controller",
	"namespace-controller", "garbage-collector-controller", "disruption-controller",
	"deployment-controller", "replicaset-controller", "daemonset-controller", "statefulset-controller", "job-controller",
	"endpointslice-controller", "service-cidr-controller",
}

func (c *Cluster) controllerManager() component {
	p := c.pki
	args := []string{
		"--kubeconfig=" + c.path("manager.kubeconfig"), "--secure-port=0", "--leader-elect=false",
		"--use-service-account-credentials", "--controllers=" + strings.Join(controllers, ","),
		"--root-ca-file=" + p.cert("ca"), "--service-account-private-key-file=" + p.key(tokenKey),
		"--cluster-signing-cert-file=" + p.cert("ca"), "--cluster-signing-key-file=" + p.key("ca"),
		"--kube-api-qps=200", "--kube-api-burst=400", "--profiling=false",
	}
	if d := c.options.SigningDuration; d != 0 {
		args = append(args, "--cluster-signing-duration="+d.String())
	}
	return component{name: "kube-controller-manager", stop: 2 * time.Second, args: args}
}

func (c *Cluster) scheduler() component {
	return component{name: "kube-scheduler", stop: 2 * time.Second, args: []string{
		"--kubeconfig=" + c.path("scheduler.kubeconfig"), "--secure-port=0", "--leader-elect=false", "--profiling=false",
	}}
}

// writeEgress writes the API server's configuration of its way into the VPC
// (JSON is YAML). etcd is left out: where its traffic is named, even as Direct,
// the API server dials TCP alone.
func (c *Cluster) writeEgress() error {
	return writeJSON(c.path("egress.yaml"), map[string]any{
		"apiVersion": "apiserver.k8s.io/v1beta1", "kind": "EgressSelectorConfiguration",
		"egressSelections": []any{
			map[string]any{"name": "cluster", "connection": map[string]any{
				"proxyProtocol": "HTTPConnect",
				"transport":     map[string]any{"uds": map[string]any{"udsName": c.path("egress.sock")}},
			}},
		},
	})
}

// writeKubeconfig writes <name>.kubeconfig for the certificate of that name.
func (c *Cluster) writeKubeconfig(name string) error {
	named := func(kind string, v any) []any { return []any{map[string]any{"name": "lab", kind: v}} }
	return writeJSON(c.path(name+".kubeconfig"), map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "lab",
		"clusters": named("cluster", map[string]any{"server": c.Endpoint(), "certificate-authority": c.pki.cert("ca")}),
		"users":    named("user", map[string]any{"client-certificate": c.pki.cert(name), "client-key": c.pki.key(name)}),
		"contexts": named("context", map[string]any{"cluster": "lab", "user": "lab"}),
	})
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o600)
}
