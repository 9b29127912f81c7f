package bootstrap

import (
	"bytes"
	"embed"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/template"

	"go.yaml.in/yaml/v3"

	"github.com/tkenode/tkenode/agent/node"
)

// Machine is what the files depend on that is neither configured nor told by the
// cloud.
type Machine struct {
	CPUs        int
	MemoryBytes int64
}

// ThisMachine measures the machine it runs on.
func ThisMachine() (Machine, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return Machine{}, fmt.Errorf("measure memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "MemTotal:" {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			return Machine{}, fmt.Errorf("measure memory: %w", err)
		}
		return Machine{CPUs: runtime.NumCPU(), MemoryBytes: kib << 10}, nil
	}
	return Machine{}, fmt.Errorf("measure memory: /proc/meminfo has no MemTotal")
}

// Where the files go, beside those of package node.
const (
	kubeletConfigPath    = "/etc/kubernetes/kubelet.yaml"
	containerdConfigPath = "/etc/containerd/config.toml"
	registriesDir        = "/etc/containerd/certs.d"
	unitDir              = "/etc/systemd/system"
)

//go:embed templates
var templateFiles embed.FS

var templates = template.Must(template.New("").Funcs(template.FuncMap{"quote": strconv.Quote}).ParseFS(templateFiles, "templates/*"))

// Render returns every file that containerd, kubelet, and what else the node runs
// are started with, in order of their paths. It is pure: the same input gives the same bytes.
func Render(c node.Config, f node.Facts, m Machine) ([]node.File, error) {
	kubelet, containerd := []string{node.KubeletUnit}, []string{node.ContainerdUnit}
	kubeProxy, coreDNS := []string{node.KubeProxyUnit}, []string{node.CoreDNSUnit}
	files := []node.File{
		{Path: node.CAPath, Mode: 0o644, Units: identity(c), Data: []byte(c.Cluster.CertificateAuthority)},
	}
	var failed error
	add := func(path string, mode fs.FileMode, units []string, data []byte, err error) {
		if err != nil && failed == nil {
			failed = fmt.Errorf("render %s: %w", path, err)
		}
		files = append(files, node.File{Path: path, Mode: mode, Units: units, Data: data})
	}
	text := func(name string, with any) ([]byte, error) {
		var b bytes.Buffer
		err := templates.ExecuteTemplate(&b, name, with)
		return b.Bytes(), err
	}
	asYAML := func(path string, mode fs.FileMode, units []string, v any) {
		data, err := yaml.Marshal(v)
		add(path, mode, units, data, err)
	}
	fromTemplate := func(path string, units []string, name string, with any) {
		data, err := text(name, with)
		add(path, 0o644, units, data, err)
	}

	asYAML(kubeletConfigPath, 0o644, kubelet, kubeletConfig(c, f, m))
	asYAML(node.KubeconfigPath, 0o600, identity(c), kubeconfig(c))
	fromTemplate(unitPath(node.KubeletUnit), kubelet, "kubelet.service", kubeletUnit(c, f))
	fromTemplate(unitPath(node.ContainerdUnit), containerd, "containerd.service", struct {
		Config, Root string
		OwnDisk      bool
	}{containerdConfigPath, node.ContainerdRoot, slices.ContainsFunc(c.Disks, func(d node.DiskConfig) bool { return d.MountPoint == node.ContainerdRoot })})
	fromTemplate(containerdConfigPath, containerd, "config.toml", struct{ Root, Pause, Registries string }{node.ContainerdRoot, node.PauseImage, registriesDir})
	if c.KubeProxy.Enabled {
		asYAML(kubeProxyConfigPath, 0o644, kubeProxy, kubeProxyConfig(c, f))
		fromTemplate(unitPath(node.KubeProxyUnit), kubeProxy, "kube-proxy.service", struct{ Config string }{kubeProxyConfigPath})
	}
	if c.CoreDNS.Enabled {
		fromTemplate(corefilePath, coreDNS, "Corefile", struct {
			Addrs              []netip.Addr
			Domain, Kubeconfig string
		}{c.LocalDNS(), c.Cluster.Domain, node.KubeconfigPath})
		fromTemplate(unitPath(node.CoreDNSUnit), coreDNS, "coredns.service", struct{ Corefile string }{corefilePath})
	}
	for _, r := range c.Containerd.Registries {
		// containerd reads it at each pull: nothing needs a restart.
		fromTemplate(filepath.Join(registriesDir, r.Host, "hosts.toml"), nil, "hosts.toml", struct {
			Server  string
			Mirrors []string
		}{"https://" + upstream(r.Host), r.Mirrors})
	}
	slices.SortFunc(files, func(a, b node.File) int { return strings.Compare(a.Path, b.Path) })
	return files, failed
}

func unitPath(unit string) string { return filepath.Join(unitDir, unit) }

// upstream is where the images of a registry are really served.
func upstream(host string) string {
	if host == "docker.io" {
		return "registry-1.docker.io"
	}
	return host
}

type kubeletFlags struct {
	Config, Kubeconfig, Name, IP, Labels string
	OwnDisks                             []string // mount points in kubelet's directory
}

func kubeletUnit(c node.Config, f node.Facts) kubeletFlags {
	labels := nodeLabels(f)
	maps.Copy(labels, c.Node.Labels)
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		pairs = append(pairs, k+"="+labels[k])
	}
	var disks []string
	for _, d := range c.Disks {
		if d.MountPoint == node.KubeletRoot || strings.HasPrefix(d.MountPoint, node.KubeletRoot+"/") {
			disks = append(disks, d.MountPoint)
		}
	}
	return kubeletFlags{kubeletConfigPath, node.KubeconfigPath, c.Name(f), f.PrivateIP.String(), strings.Join(pairs, ","), disks}
}

// nodeLabels are those that a cloud controller sets, from the facts: known before
// the Node exists, they cost no second scheduling round. TKE names a zone by its
// number there, as provider ids do.
func nodeLabels(f node.Facts) map[string]string {
	return map[string]string{
		"cloud.tencent.com/node-instance-id": f.InstanceID,
		"node.kubernetes.io/instance-type":   f.InstanceType,
		"topology.kubernetes.io/region":      f.Region,
		"topology.kubernetes.io/zone":        strconv.Itoa(f.ZoneID),
	}
}

// kubeconfig is kubelet's way to the API server. Its certificate is read again
// whenever kubelet has rotated it.
func kubeconfig(c node.Config) any {
	type m = map[string]any
	return m{
		"apiVersion": "v1", "kind": "Config", "current-context": "default",
		"clusters": []m{{"name": "default", "cluster": m{"server": c.Cluster.Endpoint, "certificate-authority": node.CAPath}}},
		"users":    []m{{"name": "default", "user": m{"client-certificate": node.ClientCertPath, "client-key": node.ClientCertPath}}},
		"contexts": []m{{"name": "default", "context": m{"cluster": "default", "user": "default"}}},
	}
}
