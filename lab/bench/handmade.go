package bench

import (
	"fmt"
	"io/fs"
	"net/netip"
	"path"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/bootstrap"
)

// handmade is a node that somebody who knows everything beforehand sets up by
// hand. kubelet and containerd are configured and started as ours are, so that
// what is compared is the way there.
type handmade struct {
	config      node.Config
	facts       node.Facts
	machine     bootstrap.Machine
	certificate []byte       // with its key
	eni         netip.Prefix // primary address of eth1
	gateway     netip.Addr   // of its subnet
}

// file is a file of an image, or a symbolic link.
type file struct {
	path string
	mode fs.FileMode
	data []byte
	link string // target; the file is a link
}

// diskUUID is of the file system that the hand-written node mounts.
const diskUUID = "6f1b64a5-1c0d-4d0e-9f0c-0d9a5e4b7c21"

// units of our package that the hand-written node does without.
var units = []string{"tkenode-agent.service", "tkenode-bootstrap.service", "tkenode-cni.socket"}

const systemDir = "/etc/systemd/system"

// files are what is written by hand.
func (h handmade) files() ([]file, error) {
	rendered, err := bootstrap.Render(h.config, h.facts, h.machine)
	if err != nil {
		return nil, err
	}
	var files []file
	for _, f := range rendered {
		files = append(files, file{path: f.Path, mode: f.Mode, data: f.Data})
	}
	text := func(path, format string, args ...any) {
		files = append(files, file{path: path, mode: 0o644, data: fmt.Appendf(nil, format, args...)})
	}
	link := func(at, target string) { files = append(files, file{path: at, link: target}) }

	certificate := "kubelet-client-handmade.pem"
	files = append(files, file{path: path.Join(node.KubeletPKI, certificate), mode: 0o600, data: h.certificate})
	link(node.ClientCertPath, certificate)
	text(systemDir+"/var-lib-containerd.mount", dataMount, diskUUID)
	// Before the image's own file for eth*, which leaves secondary ENIs alone.
	text("/etc/systemd/network/15-eth1.network", eth1Network, h.eni, h.gateway, h.eni.Addr())
	// No pod runs here: a network that containerd takes for ready will do. Plugins of
	// this version are not asked how they are.
	text("/etc/cni/net.d/10-handmade.conflist", cniConfig)
	for _, unit := range []string{node.ContainerdUnit, node.KubeletUnit} {
		link(path.Join(systemDir, "multi-user.target.wants", unit), "../"+unit)
	}
	for _, unit := range units {
		link(path.Join(systemDir, unit), "/dev/null")
	}
	return files, nil
}

const dataMount = `[Unit]
Description=Data disk

[Mount]
What=/dev/disk/by-uuid/%s
Where=/var/lib/containerd
Type=ext4
Options=noatime
`

const eth1Network = `[Match]
Name=eth1

[Link]
RequiredForOnline=no

[Network]
LinkLocalAddressing=no
IPv6AcceptRA=no

[Address]
Address=%s
AddPrefixRoute=no

[Route]
Gateway=%s
GatewayOnLink=yes
Table=101

[RoutingPolicyRule]
From=%s
Table=101
Priority=1001
`

const cniConfig = `{
  "cniVersion": "1.0.0",
  "name": "handmade",
  "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "subnet": "192.168.0.0/24"}}]
}
`
