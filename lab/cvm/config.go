package cvm

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// maxUserData is Tencent Cloud's own limit on user-data before base64.
// Source: https://cloud.tencent.com/document/api/213/15730
const maxUserData = 16 << 10

// ConfigDrive is what cloud-init reads about the instance from a disk, in
// OpenStack's format, since Debian's cloud-init knows no Tencent data source.
// Source: https://docs.openstack.org/nova/latest/user/metadata.html#config-drives
type ConfigDrive struct {
	InstanceID string
	Hostname   string
	PublicKeys []string // for the login of the image's default user
	UserData   []byte
}

// write makes the drive: an ext2 file system with the label that cloud-init
// looks for. Nothing is mounted, so no privilege is needed.
func (c *ConfigDrive) write(ctx context.Context, path string) error {
	if len(c.UserData) > maxUserData {
		return fmt.Errorf("config drive: user-data of %d bytes is larger than the %d that the cloud takes", len(c.UserData), maxUserData)
	}
	keys := map[string]string{}
	for i, k := range c.PublicKeys {
		keys[fmt.Sprintf("key-%d", i)] = k
	}
	meta, err := json.Marshal(map[string]any{"uuid": c.InstanceID, "hostname": c.Hostname, "public_keys": keys})
	if err != nil {
		return err
	}
	tree, err := os.MkdirTemp(filepath.Dir(path), "config-")
	if err != nil {
		return fmt.Errorf("config drive: %w", err)
	}
	defer os.RemoveAll(tree)
	latest := filepath.Join(tree, "openstack", "latest")
	if err := os.MkdirAll(latest, 0o755); err != nil {
		return fmt.Errorf("config drive: %w", err)
	}
	files := map[string][]byte{"meta_data.json": meta}
	if len(c.UserData) > 0 {
		files["user_data"] = c.UserData
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(latest, name), content, 0o644); err != nil {
			return fmt.Errorf("config drive: %w", err)
		}
	}
	return makeFS(ctx, tree, path)
}

func makeFS(ctx context.Context, tree, path string) error {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("config drive: %w", err)
	}
	cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext2", "-L", "config-2", "-d", tree, path, "1M")
	// Debian keeps mke2fs where the PATH of ordinary users does not reach.
	if cmd.Err != nil {
		cmd = exec.CommandContext(ctx, "/usr/sbin/mke2fs", cmd.Args[1:]...)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("config drive: mke2fs: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
