// Package packaging turns the binaries into what is installed on a node: the
// systemd units, the group of the socket's readers, man pages and completions,
// as a Debian package. The files are in this directory, under the name of the
// place they go to.
//
// It needs no packaging tool, and the same input gives the same bytes. It does
// not build the binaries and does not know how the node image is made.
package packaging

import (
	"bytes"
	"compress/gzip"
	"embed"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed systemd sysusers.d udev man completions debian
var files embed.FS

// file is one file of the package. Exactly one of data, source and link is set.
type file struct {
	path   string // absolute
	mode   fs.FileMode
	data   []byte
	source string // a file to copy
	link   string // target of a symbolic link
}

// binaries are where the binaries go, by their name in Options.Bin.
var binaries = map[string]string{
	"tkenode":  "/usr/bin/tkenode",
	"tke-disk": "/usr/lib/tkenode/bin/tke-disk",
	"tke-eni":  "/opt/cni/bin/tke-eni", // where containerd and every other CNI plugin has it
}

// wants is what starts the units. They are links in the package, not the
// administrator's, for the package is there to make a node: with them, the
// package works in whatever way it gets into an image, script run or not, and
// "systemctl mask" still turns a unit off.
var wants = map[string]string{
	"tkenode-agent.service":     "multi-user.target",
	"tkenode-bootstrap.service": "multi-user.target",
	"tkenode-cni.socket":        "sockets.target",
}

// tree returns the files of the package, sorted by path.
func tree(bin string) ([]file, error) {
	var out []file
	for name, dst := range binaries {
		src := filepath.Join(bin, name)
		if _, err := os.Stat(src); err != nil {
			return nil, fmt.Errorf("package binary: %w", err)
		}
		out = append(out, file{path: dst, mode: 0o755, source: src})
	}
	for unit, target := range wants {
		out = append(out, file{
			path: "/usr/lib/systemd/system/" + target + ".wants/" + unit,
			mode: 0o777,
			link: "../" + unit,
		})
	}
	err := fs.WalkDir(files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := files.ReadFile(name)
		if err != nil {
			return err
		}
		if f, ok := installed(name, data); ok {
			out = append(out, f)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read packaged files: %w", err)
	}
	slices.SortFunc(out, func(a, b file) int { return strings.Compare(a.path, b.path) })
	return out, nil
}

// installed says where a file of this directory goes.
func installed(name string, data []byte) (file, bool) {
	dir, base := path.Split(name)
	f := file{mode: 0o644, data: data}
	switch {
	case dir == "systemd/":
		f.path = "/usr/lib/systemd/system/" + base
	case dir == "udev/":
		f.path = "/usr/lib/udev/rules.d/" + base
	case dir == "sysusers.d/":
		f.path = "/usr/lib/sysusers.d/" + base
	case dir == "man/":
		f.path = "/usr/share/man/man" + strings.TrimPrefix(path.Ext(base), ".") + "/" + base + ".gz"
		f.data = compress(data)
	case dir == "completions/" && strings.HasSuffix(base, ".bash"):
		f.path = "/usr/share/bash-completion/completions/" + strings.TrimSuffix(base, ".bash")
	case dir == "completions/" && strings.HasSuffix(base, ".zsh"):
		f.path = "/usr/share/zsh/vendor-completions/_" + strings.TrimSuffix(base, ".zsh")
	case dir == "completions/" && strings.HasSuffix(base, ".fish"):
		f.path = "/usr/share/fish/vendor_completions.d/" + base
	case name == "debian/copyright":
		f.path = "/usr/share/doc/tkenode/copyright"
	default:
		return file{}, false
	}
	return f, true
}

// compress gzips data the same way every time. Writing to memory cannot fail.
func compress(data []byte) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
	_, _ = w.Write(data)
	_ = w.Close()
	return b.Bytes()
}
