package images

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// debian is the release the node image is made of.
const debian = "bookworm"

// packages of the node, besides Debian's essential ones.
var packages = []string{
	"linux-image-cloud-amd64", "tiny-initramfs", "busybox-static", "kmod",
	"systemd", "systemd-sysv", "systemd-timesyncd", "systemd-resolved", "libpam-systemd", "dbus", "udev",
	"cloud-init", "cloud-guest-utils", "openssh-server", "ca-certificates",
	"nftables", "iproute2", "conntrack", "ethtool",
	"e2fsprogs", "xfsprogs", "mdadm", "cryptsetup-bin",
	"procps", "less", "tcpdump", "strace", // for whoever is on call
	"grub-pc-bin", // makes the boot loader; base.sh removes it again
}

// recipe is the key of this package's own source: whoever changes how images are
// made gets new ones.
var recipe = func() string {
	h := sha256.New()
	err := fs.WalkDir(source, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(name, "_test.go") {
			return err
		}
		data, err := source.ReadFile(name)
		fmt.Fprintf(h, "%s %d\n%s", name, len(data), data)
		return err
	})
	if err != nil {
		panic(err) // the file system is in the binary
	}
	return hex.EncodeToString(h.Sum(nil))
}()

//go:embed *.go *.sh
var source embed.FS

const baseStep = "Debian"

// base makes the tar of a Debian with kernel, initramfs and boot loader, before
// anything of ours is in it but what the initramfs is made by.
func (b *builder) base(ctx context.Context) (string, error) {
	sources, err := aptSources("/etc/apt", debian)
	if err != nil {
		return "", err
	}
	script, err := source.ReadFile("base.sh")
	if err != nil {
		return "", err
	}
	initramfs := filepath.Join(b.Source, "images", "rootfs", "etc", "tiny-initramfs")
	tree, err := treeKey(initramfs)
	if err != nil {
		return "", err
	}
	file := filepath.Join(b.Cache, "images", "base.tar")
	key := keyOf(append([]string{debian, string(script), tree, sources}, packages...)...)
	err = b.step(baseStep, file, key, func(tmp string) error {
		return b.mmdebstrap(ctx, tmp, sources, string(script), initramfs)
	})
	return file, err
}

func (b *builder) mmdebstrap(ctx context.Context, out, sources, script, initramfs string) error {
	list := filepath.Join(filepath.Dir(out), "debian.sources")
	if err := os.WriteFile(list, []byte(sources), 0o644); err != nil {
		return err
	}
	hook := filepath.Join(filepath.Dir(out), "base.sh")
	if err := os.WriteFile(hook, []byte(script), 0o755); err != nil {
		return err
	}
	// The tree is in a tmpfs that is gone with the namespace: faster, and an
	// interrupted build leaves no files of other users behind.
	tree := filepath.Join(filepath.Dir(out), "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	cmd := asRoot(os.Geteuid(), "sh", "-c",
		`mount -t tmpfs -o mode=0755,size=90% tmpfs "$TMPDIR" && exec mmdebstrap "$@"`, "mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar",
		"--include="+strings.Join(packages, ","),
		"--aptopt=Apt::Install-Recommends \"false\"",
		// Documentation has no reader on a node; licences stay.
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
		"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/info/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--essential-hook=mkdir -p \"$1/etc\" && cp -r \"$INITRAMFS\" \"$1/etc/\"",
		"--customize-hook=\"$HOOK\" \"$1\"",
		debian, out, list)
	// The hooks are text for a shell; a path may hold anything.
	cmd.Env = append(cmd.Env, "TMPDIR="+tree, "INITRAMFS="+initramfs, "HOOK="+hook)
	// mmdebstrap does not read the host's apt.conf. As an option of its own the proxy
	// would stay in the image.
	if dump, err := exec.CommandContext(ctx, "apt-config", "dump", "--format", "%f %v%n", "Acquire").Output(); err == nil {
		cmd.Env = append(cmd.Env, aptProxies(string(dump))...)
	}
	step := 0.0
	return run(ctx, cmd, func(line string) {
		note, ok := strings.CutPrefix(line, "I: ")
		if !ok {
			return
		}
		step++
		b.Progress.Update(baseStep, min(step/mmdebstrapSteps, 1), note)
	})
}

// aptProxies are the proxies of apt's configuration, as environment variables that
// apt reads where it has no configuration.
func aptProxies(dump string) []string {
	var out []string
	for line := range strings.Lines(dump) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		variable := map[string]string{"Acquire::http::Proxy": "http_proxy", "Acquire::https::Proxy": "https_proxy"}[name]
		if variable != "" && value != "" && !strings.EqualFold(value, "DIRECT") {
			out = append(out, variable+"="+value)
		}
	}
	return out
}

// mmdebstrapSteps is how many lines of progress mmdebstrap prints, as of 1.3.5.
const mmdebstrapSteps = 15

// aptSources are the entries of the host's apt sources (sources.list(5)) that hold
// the main component of a release, in deb822 form. Entries of others, which need
// not have that release, are left out.
func aptSources(dir, release string) (string, error) {
	var files []string
	for _, pattern := range []string{"sources.list", "sources.list.d/*.list", "sources.list.d/*.sources"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return "", err
		}
		files = append(files, found...)
	}
	var out []string
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("read apt sources: %w", err)
		}
		stanzas := strings.Split(string(data), "\n\n")
		if strings.HasSuffix(file, ".sources") {
			for i, s := range stanzas {
				stanzas[i] = uncomment(s)
			}
		} else {
			stanzas = oneLine(string(data))
		}
		for _, s := range stanzas {
			if s = only(s, release); s != "" {
				out = append(out, s)
			}
		}
	}
	if len(out) == 0 {
		return "", fmt.Errorf("no apt source in %s has %s main: the node image is made of Debian %s", dir, release, release)
	}
	return strings.Join(out, "\n"), nil
}

func uncomment(stanza string) string {
	var out strings.Builder
	for line := range strings.Lines(stanza) {
		if !strings.HasPrefix(line, "#") {
			out.WriteString(line)
		}
	}
	return strings.TrimSuffix(out.String(), "\n") + "\n"
}

// optionFields are the options of one-line entries that say how an archive is
// trusted and reached, by their names in deb822 (sources.list(5)).
var optionFields = map[string]string{
	"signed-by": "Signed-By", "trusted": "Trusted", "check-valid-until": "Check-Valid-Until", "check-date": "Check-Date",
	"allow-insecure": "Allow-Insecure", "allow-weak": "Allow-Weak", "by-hash": "By-Hash",
}

// oneLine rewrites the lines of a one-line-style list as deb822 stanzas.
func oneLine(list string) []string {
	var out []string
	for line := range strings.Lines(list) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			continue
		}
		stanza := "Types: deb\n"
		rest = strings.TrimSpace(rest)
		if options, after, found := strings.Cut(rest, "]"); found && strings.HasPrefix(rest, "[") {
			for _, o := range strings.Fields(options[1:]) {
				key, value, _ := strings.Cut(o, "=")
				if field := optionFields[key]; field != "" {
					stanza += field + ": " + value + "\n"
				}
			}
			rest = after
		}
		f := strings.Fields(rest)
		if len(f) < 3 {
			continue
		}
		out = append(out, stanza+"URIs: "+f[0]+"\nSuites: "+f[1]+"\nComponents: "+strings.Join(f[2:], " ")+"\n")
	}
	return out
}

// only narrows a stanza to the suites of a release and the component main; empty
// if that leaves nothing.
func only(stanza, release string) string {
	var out strings.Builder
	suites, component := false, false
	for line := range strings.Lines(stanza) {
		field, value, _ := strings.Cut(line, ":")
		values := strings.Fields(value)
		switch strings.ToLower(field) {
		case "enabled":
			if strings.EqualFold(strings.TrimSpace(value), "no") {
				return ""
			}
		case "types":
			if !slices.Contains(values, "deb") {
				return ""
			}
			out.WriteString("Types: deb\n")
		case "suites":
			values = slices.DeleteFunc(values, func(s string) bool {
				return s != release && s != release+"-updates" && s != release+"-security"
			})
			suites = len(values) > 0
			out.WriteString("Suites: " + strings.Join(values, " ") + "\n")
		case "components":
			component = slices.Contains(values, "main")
			out.WriteString("Components: main\n")
		default:
			out.WriteString(line)
		}
	}
	if !suites || !component {
		return ""
	}
	return out.String()
}
