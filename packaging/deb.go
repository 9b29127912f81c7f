package packaging

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/md5" //nolint:gosec // what dpkg --verify compares with
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"
)

// Options say what Deb builds.
type Options struct {
	Bin     string    // directory with the binaries tkenode, tke-disk and tke-eni
	Out     string    // the package to write
	Version string    // Debian version, such as 0.1.0 or 0.1.0~git20260901
	Arch    string    // Debian architecture; default that of this machine
	Time    time.Time // of every file in the package; default 1970
}

// Characters of a Debian version, without epoch.
// Source: https://www.debian.org/doc/debian-policy/ch-controlfields.html#version
var validVersion = regexp.MustCompile(`^[0-9][0-9A-Za-z.+~-]*$`)

// Deb writes the Debian package, or nothing.
func Deb(ctx context.Context, o Options) error {
	if !validVersion.MatchString(o.Version) {
		return fmt.Errorf("package version %q is not a Debian version, such as 0.1.0", o.Version)
	}
	if o.Arch == "" {
		o.Arch = runtime.GOARCH
	}
	if o.Time.IsZero() {
		o.Time = time.Unix(0, 0)
	}
	tree, err := tree(o.Bin)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(o.Out), ".tkenode-*.deb")
	if err != nil {
		return fmt.Errorf("create package: %w", err)
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	if err := writeDeb(ctx, tmp, tree, o); err != nil {
		return fmt.Errorf("write package %s: %w", o.Out, err)
	}
	if err := tmp.Chmod(0o644); err != nil {
		return fmt.Errorf("write package %s: %w", o.Out, err)
	}
	if err := tmp.Close(); err != nil {
		return fmt.Errorf("write package %s: %w", o.Out, err)
	}
	return os.Rename(tmp.Name(), o.Out)
}

// writeDeb writes the three members of the archive (deb(5)). The data member goes
// through a temporary file, since its size and sums come before it.
func writeDeb(ctx context.Context, w io.Writer, tree []file, o Options) error {
	data, err := os.CreateTemp("", "tkenode-data-*")
	if err != nil {
		return err
	}
	defer os.Remove(data.Name())
	defer data.Close()
	sums, size, err := writeData(ctx, data, tree, o.Time)
	if err != nil {
		return err
	}
	control, err := controlMember(o, sums, size)
	if err != nil {
		return err
	}
	length, err := data.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if _, err := data.Seek(0, io.SeekStart); err != nil {
		return err
	}
	a := arWriter{w: w, time: o.Time}
	a.start()
	a.member("debian-binary", 4, strings.NewReader("2.0\n"))
	a.member("control.tar.gz", int64(len(control)), bytes.NewReader(control))
	a.member("data.tar.gz", length, data)
	return a.err
}

// writeData writes data.tar.gz and returns the md5sums file and the installed size in bytes.
func writeData(ctx context.Context, w io.Writer, tree []file, mtime time.Time) (sums []byte, size int64, err error) {
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	dirs := map[string]bool{}
	var md5sums bytes.Buffer
	for _, f := range tree {
		if err := ctx.Err(); err != nil {
			return nil, 0, err
		}
		if err := writeDirs(t, dirs, path.Dir(f.path), mtime); err != nil {
			return nil, 0, err
		}
		h := &tar.Header{Name: "." + f.path, Mode: int64(f.mode), ModTime: mtime, Uname: "root", Gname: "root", Format: tar.FormatGNU}
		if f.link != "" {
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
			if err := t.WriteHeader(h); err != nil {
				return nil, 0, err
			}
			continue
		}
		n, sum, err := writeFile(t, h, f)
		if err != nil {
			return nil, 0, fmt.Errorf("add %s: %w", f.path, err)
		}
		size += n
		fmt.Fprintf(&md5sums, "%s  %s\n", sum, strings.TrimPrefix(f.path, "/"))
	}
	if err := t.Close(); err != nil {
		return nil, 0, err
	}
	return md5sums.Bytes(), size, z.Close()
}

// writeDirs writes dir and the directories above it that were not written yet.
func writeDirs(t *tar.Writer, done map[string]bool, dir string, mtime time.Time) error {
	if done[dir] {
		return nil
	}
	if dir != "/" {
		if err := writeDirs(t, done, path.Dir(dir), mtime); err != nil {
			return err
		}
	}
	done[dir] = true
	return t.WriteHeader(&tar.Header{
		Typeflag: tar.TypeDir, Name: "." + strings.TrimSuffix(dir, "/") + "/", Mode: 0o755,
		ModTime: mtime, Uname: "root", Gname: "root", Format: tar.FormatGNU,
	})
}

func writeFile(t *tar.Writer, h *tar.Header, f file) (size int64, sum string, err error) {
	var r io.Reader = bytes.NewReader(f.data)
	h.Size = int64(len(f.data))
	if f.source != "" {
		src, err := os.Open(f.source)
		if err != nil {
			return 0, "", err
		}
		defer src.Close()
		info, err := src.Stat()
		if err != nil {
			return 0, "", err
		}
		r, h.Size = src, info.Size()
	}
	if err := t.WriteHeader(h); err != nil {
		return 0, "", err
	}
	digest := md5.New() //nolint:gosec // see import
	n, err := io.Copy(io.MultiWriter(t, digest), r)
	return n, hex.EncodeToString(digest.Sum(nil)), err
}

// controlMember returns control.tar.gz: the control file, the sums and the scripts.
func controlMember(o Options, sums []byte, size int64) ([]byte, error) {
	control := fmt.Sprintf(`Package: tkenode
Version: %s
Architecture: %s
Maintainer: The tkenode Authors <maintainers@tkenode.io>
Installed-Size: %d
Depends: systemd (>= 252), e2fsprogs, xfsprogs, mdadm, cryptsetup-bin
Section: admin
Priority: optional
Homepage: https://github.com/tkenode/tkenode
Description: makes a Tencent Cloud CVM a TKE node and keeps it one
 Joins the node to its cluster, gives pods VPC addresses, mounts CBS disks,
 supervises containerd and kubelet, and pushes metrics.
`, o.Version, o.Arch, (size+1023)/1024)
	members := []file{
		{path: "/control", mode: 0o644, data: []byte(control)},
		{path: "/md5sums", mode: 0o644, data: sums},
	}
	for _, script := range []string{"postinst", "postrm", "prerm"} {
		data, err := fs.ReadFile(files, "debian/"+script)
		if err != nil {
			return nil, err
		}
		members = append(members, file{path: "/" + script, mode: 0o755, data: data})
	}
	var b bytes.Buffer
	_, _, err := writeData(context.Background(), &b, members, o.Time)
	return b.Bytes(), err
}

// arWriter writes an ar(5) archive and keeps the first error.
type arWriter struct {
	w    io.Writer
	time time.Time
	err  error
}

func (a *arWriter) start() { _, a.err = io.WriteString(a.w, "!<arch>\n") }

func (a *arWriter) member(name string, size int64, r io.Reader) {
	if a.err != nil {
		return
	}
	if _, a.err = fmt.Fprintf(a.w, "%-16s%-12d%-6d%-6d%-8s%-10d`\n", name, a.time.Unix(), 0, 0, "100644", size); a.err != nil {
		return
	}
	if _, a.err = io.CopyN(a.w, r, size); a.err != nil {
		return
	}
	if size%2 == 1 { // members start at even offsets
		_, a.err = a.w.Write([]byte{'\n'})
	}
}
