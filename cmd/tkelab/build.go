package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tkenode/tkenode/images"
	"github.com/tkenode/tkenode/packaging"
)

// version of what is baked into the image; releases come later.
const version = "0.1.0"

func build(ctx context.Context) error {
	p := newProgress(os.Stdout)
	defer p.Close()
	_, err := buildWith(ctx, p)
	return err
}

// buildWith builds what a lab needs and returns the node image.
func buildWith(ctx context.Context, p *progress) (string, error) {
	source, err := repository()
	if err != nil {
		return "", err
	}
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	// The longest of the lab's sockets; unix(7) has room for 107 bytes.
	if n := len(filepath.Join(labDir(), "cvm", "ins-12345678", "qmp.sock")) - 107; n > 0 {
		return "", fmt.Errorf("%s is too long by %d bytes for the sockets in it; set TKENODE_CACHE to a shorter path", cacheDir(), n)
	}
	if err := os.MkdirAll(cacheDir(), 0o755); err != nil {
		return "", err
	}
	deb := filepath.Join(cacheDir(), "tkenode.deb")
	a, err := images.Build(ctx, images.Options{
		Source: source, Cache: cacheDir(), Debs: []string{deb}, Progress: p,
		Package: func(ctx context.Context) error {
			// The binaries are where make build puts them: beside this one.
			err := packaging.Deb(ctx, packaging.Options{Bin: filepath.Dir(self), Out: deb, Version: version})
			if err != nil {
				return fmt.Errorf("%w; run: make build", err)
			}
			return nil
		},
	})
	if err != nil {
		return "", err
	}
	return a.Disk, nil
}

// repository is the directory at or above the current one that holds ours.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "images", "components", "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("run this in the repository of tkenode: components and image are built from it")
		}
	}
}
