//go:build node

package images

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// nodeImage is the image that "tkelab build" has built; what is missing is built.
func nodeImage(t *testing.T) string {
	t.Helper()
	t.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin") // for mke2fs, debugfs and e2fsck without root
	cache, err := CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	a, err := Build(t.Context(), Options{Source: "..", Cache: cache, Debs: []string{filepath.Join(cache, "tkenode.deb")}, Progress: &quiet{}})
	if err != nil {
		t.Fatalf("build: %v; run: make test-node", err)
	}
	return a.Disk
}

// questions is user-data: what the booted image says about itself, between two
// marks on the console.
const questions = `#!/bin/sh
# This script is a part of the boot, which so does not end before it does.
cat >/run/questions <<"EOF"
exec >/dev/ttyS0 2>&1
# Nothing here says what to join, so the bootstrap would wait, and the boot with it.
systemctl stop tkenode-bootstrap.service
systemctl is-system-running --wait
echo "failed: $(systemctl --failed --no-legend --plain | cut -d' ' -f1 | tr '\n' ' ')"
echo "hostname: $(hostname)"
echo "machine-id: $(cat /etc/machine-id)"
echo "address: $(ip -4 -o addr show eth0 | tr -s ' ' | cut -d' ' -f4)"
echo "resolv.conf: $(readlink /etc/resolv.conf)"
echo "cgroup: $(stat -fc %T /sys/fs/cgroup)"
echo "forward: $(cat /proc/sys/net/ipv4/ip_forward)"
echo "root: $(findmnt -no SOURCE,FSTYPE,OPTIONS /)"
echo "ssh: $(ss -Hltn 'sport = :22' | wc -l) $(ls /etc/ssh/ssh_host_* | wc -l)"
echo "kubelet: $(/usr/lib/tkenode/bin/kubelet --version)"
echo "containerd: $(/usr/lib/tkenode/bin/containerd --version)"
echo "runc: $(/usr/lib/tkenode/bin/runc --version | tr '\n' ' ')"
systemd-analyze --no-pager
systemd-analyze --no-pager blame | head -n 30
systemd-analyze --no-pager critical-chain
poweroff
EOF
systemd-run --no-block --quiet sh /run/questions
`

// boot boots a disk by its own boot loader, and nothing else, until it powers off,
// and returns what the serial console said.
func boot(t *testing.T, image string, limit time.Duration) string {
	t.Helper()
	dir := t.TempDir()
	disk, config, tree := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "config.img"), filepath.Join(dir, "config")
	write(t, tree, map[string]string{
		"openstack/latest/meta_data.json": `{"uuid":"ins-imagetest","hostname":"image-test"}`,
		"openstack/latest/user_data":      questions,
	})
	for _, args := range [][]string{
		{"qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", image, disk},
		{"mke2fs", "-q", "-t", "ext4", "-L", "config-2", "-d", tree, config, "8M"},
	} {
		if err := run(t.Context(), exec.Command(args[0], args[1:]...), nil); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var console strings.Builder
	qemu := exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio",
		"-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048", "-no-reboot",
		"-drive", "if=virtio,format=qcow2,file="+disk, "-drive", "if=virtio,format=raw,readonly=on,file="+config,
		"-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n")
	start := time.Now()
	err := run(ctx, qemu, func(line string) {
		console.WriteString(line + "\n")
		t.Logf("%5.1f %s", time.Since(start).Seconds(), line)
	})
	if err != nil {
		t.Fatalf("boot: %v", err)
	}
	return console.String()
}

func TestNodeImageBootsByItself(t *testing.T) {
	console := boot(t, nodeImage(t), 20*time.Minute)
	if !strings.Contains(console, "login:") {
		t.Error("no login prompt on the serial console")
	}
	for _, want := range []string{
		`failed: (tkenode-bootstrap\.service )?`,
		`hostname: image-test`,
		`machine-id: [0-9a-f]{32}`,
		`address: 10\.0\.2\.15/24`,                        // of QEMU's DHCP server
		`resolv\.conf: /run/systemd/resolve/resolv\.conf`, // the DHCP server's, not a loopback address
		`cgroup: cgroup2fs`,
		`forward: 1`,
		`root: /dev/vda1 +ext4 +rw,.*`,
		`ssh: [12] 0`, // listens, and no key was made before anybody came
		`kubelet: Kubernetes v[0-9.]+`,
		`containerd: containerd github\.com/containerd/containerd/v2 v[0-9.]+.*`,
		`runc: runc version [0-9.]+ .*libseccomp.*`,
	} {
		if !regexp.MustCompile(`(?m)^` + want + `\s*$`).MatchString(console) {
			t.Errorf("console does not say %s", want)
		}
	}
}

func TestNodeImageHasNothingThatNodesMustNotShare(t *testing.T) {
	dir := t.TempDir()
	raw, part := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "part")
	for _, args := range [][]string{
		{"qemu-img", "convert", "-O", "raw", nodeImage(t), raw},
		{"dd", "if=" + raw, "of=" + part, "bs=" + strconv.Itoa(rootStart), "skip=1", "conv=sparse", "status=none"},
		{"e2fsck", "-fn", part},
	} {
		if err := run(t.Context(), exec.Command(args[0], args[1:]...), nil); err != nil {
			t.Fatal(err)
		}
	}
	debugfs := func(request string) string {
		var out strings.Builder
		if err := run(t.Context(), exec.Command("debugfs", "-R", request, part), func(l string) { out.WriteString(l + "\n") }); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	if id := debugfs("stat /etc/machine-id"); !strings.Contains(id, "Size: 0") {
		t.Errorf("machine id is set:\n%s", id)
	}
	for _, dir := range []string{"/etc/ssh", "/var/lib/systemd", "/root", "/var/lib/cloud"} {
		list := debugfs("ls -p " + dir)
		for _, name := range []string{"ssh_host_", "random-seed", "authorized_keys", "bash_history", "instance"} {
			if strings.Contains(list, name) {
				t.Errorf("%s in %s:\n%s", name, dir, list)
			}
		}
	}
	if su := debugfs("stat /usr/bin/su"); !regexp.MustCompile(`(?s)Mode:\s+04755.*User:\s+0\s+Group:\s+0`).MatchString(su) {
		t.Errorf("su is not root's setuid program:\n%s", su)
	}
}
