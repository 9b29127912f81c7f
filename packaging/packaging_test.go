package packaging

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// build writes a package with two small scripts for binaries and returns its path.
func build(t *testing.T, o Options) string {
	t.Helper()
	o.Bin = t.TempDir()
	for name := range binaries {
		if err := os.WriteFile(filepath.Join(o.Bin, name), []byte("#!/bin/sh\necho "+name+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	o.Out = filepath.Join(t.TempDir(), "tkenode.deb")
	if err := Deb(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	return o.Out
}

// output runs a tool that the Makefile installs.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestDebIsReproducible(t *testing.T) {
	o := Options{Version: "0.1.0", Arch: "amd64", Time: time.Unix(1767225600, 0)}
	a, err := os.ReadFile(build(t, o))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(build(t, o))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("two packages of the same input differ")
	}
}

func TestDebIsReadByDpkg(t *testing.T) {
	deb := build(t, Options{Version: "0.1.0~rc1", Arch: "arm64"})
	if got := output(t, "dpkg-deb", "--show", "--showformat=${Package} ${Version} ${Architecture}", deb); got != "tkenode 0.1.0~rc1 arm64" {
		t.Errorf("dpkg-deb reads %q", got)
	}
	root := t.TempDir()
	output(t, "dpkg-deb", "--extract", deb, root)
	if got := output(t, filepath.Join(root, "usr/bin/tkenode")); got != "tkenode\n" {
		t.Errorf("packaged tkenode prints %q", got)
	}
	if got := output(t, filepath.Join(root, "opt/cni/bin/tke-eni")); got != "tke-eni\n" {
		t.Errorf("packaged tke-eni prints %q", got)
	}
	for unit, target := range wants {
		link := filepath.Join(root, "usr/lib/systemd/system", target+".wants", unit)
		if _, err := os.Stat(link); err != nil {
			t.Errorf("nothing starts %s: %v", unit, err)
		}
	}
	control := t.TempDir()
	output(t, "dpkg-deb", "--control", deb, control)
	for _, script := range []string{"postinst", "prerm", "postrm"} {
		output(t, "sh", "-n", filepath.Join(control, script))
	}
	sums, err := os.ReadFile(filepath.Join(control, "md5sums"))
	if err != nil {
		t.Fatal(err)
	}
	check := exec.CommandContext(t.Context(), "md5sum", "--check", "--strict", "--quiet")
	check.Dir, check.Stdin = root, bytes.NewReader(sums)
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("md5sums do not match the files: %s", out)
	}
}

func TestDebRefuses(t *testing.T) {
	for name, o := range map[string]Options{
		"no binaries": {Version: "0.1.0", Bin: t.TempDir()},
		"bad version": {Version: "0.1.0\nDepends: x", Bin: t.TempDir()},
		"no version":  {Bin: t.TempDir()},
	} {
		o.Out = filepath.Join(t.TempDir(), "x.deb")
		if err := Deb(t.Context(), o); err == nil {
			t.Errorf("%s: no error", name)
		}
		if left, _ := filepath.Glob(filepath.Join(filepath.Dir(o.Out), "*")); len(left) != 0 {
			t.Errorf("%s: left %v", name, left)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	o := Options{Version: "1", Bin: t.TempDir(), Out: filepath.Join(t.TempDir(), "x.deb")}
	for name := range binaries {
		if err := os.WriteFile(filepath.Join(o.Bin, name), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := Deb(ctx, o); err == nil {
		t.Error("cancelled: no error")
	}
}

// TestTree keeps every file of this directory in the package: one that is put in
// a place that nothing installs would be forgotten silently.
func TestTree(t *testing.T) {
	bin := t.TempDir()
	for name := range binaries {
		if err := os.WriteFile(filepath.Join(bin, name), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := tree(bin)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range tree {
		got = append(got, f.path)
	}
	want := []string{
		"/opt/cni/bin/tke-eni",
		"/usr/bin/tkenode",
		"/usr/lib/systemd/system/multi-user.target.wants/tkenode-agent.service",
		"/usr/lib/systemd/system/multi-user.target.wants/tkenode-bootstrap.service",
		"/usr/lib/systemd/system/sockets.target.wants/tkenode-cni.socket",
		"/usr/lib/systemd/system/tkenode-agent.service",
		"/usr/lib/systemd/system/tkenode-bootstrap.service",
		"/usr/lib/systemd/system/tkenode-cni.socket",
		"/usr/lib/sysusers.d/tkenode.conf",
		"/usr/lib/tkenode/bin/tke-disk",
		"/usr/lib/udev/rules.d/63-tkenode.rules",
		"/usr/share/bash-completion/completions/tkenode",
		"/usr/share/doc/tkenode/copyright",
		"/usr/share/fish/vendor_completions.d/tkenode.fish",
		"/usr/share/man/man8/tkenode.8.gz",
		"/usr/share/zsh/vendor-completions/_tkenode",
	}
	if !slices.Equal(got, want) {
		t.Errorf("package holds\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestUnitsVerify has systemd itself read the units, in a root that holds what
// the package installs.
func TestUnitsVerify(t *testing.T) {
	root := t.TempDir()
	output(t, "dpkg-deb", "--extract", build(t, Options{Version: "1"}), root)
	// The targets and slices that every system has.
	if err := os.CopyFS(filepath.Join(root, "lib/systemd/system"), os.DirFS("/lib/systemd/system")); err != nil {
		t.Fatal(err)
	}
	for unit := range wants {
		if out := output(t, "systemd-analyze", "verify", "--root="+root, "--man=no", "--recursive-errors=no", unit); out != "" {
			t.Errorf("systemd-analyze verify %s:\n%s", unit, out)
		}
	}
}
