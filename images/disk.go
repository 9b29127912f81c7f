package images

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
)

const (
	diskStep = "node image"
	sector   = 512
	// diskSize is that of the smallest system disk; on a larger one cloud-init grows
	// partition and file system.
	diskSize = 10 << 30
	// rootStart is where the partition starts, aligned for every kind of storage.
	// The boot loader has its place before it.
	rootStart = 1 << 20
)

// disk makes the node image and returns its file, which has the key in its name:
// the disks of running machines are based on it, so it is never written again.
func (b *builder) disk(ctx context.Context, base string) (string, error) {
	rootfs := filepath.Join(b.Source, "images", "rootfs")
	tree, err := treeKey(rootfs)
	if err != nil {
		return "", err
	}
	inputs := []string{recipe, tree, b.key(baseStep), b.key(seedStep)}
	for _, name := range slices.Sorted(maps.Keys(components)) {
		if components[name].onNode {
			inputs = append(inputs, name, b.key(name))
		}
	}
	for _, ref := range slices.Sorted(maps.Keys(containerImages)) {
		inputs = append(inputs, ref, b.key(containerStep(ref)))
	}
	for _, deb := range b.Debs {
		key, err := treeKey(deb)
		if err != nil {
			return "", err
		}
		inputs = append(inputs, filepath.Base(deb), key)
	}
	key := keyOf(inputs...)
	file := filepath.Join(b.Cache, "images", "node-"+key[:16]+".qcow2")
	err = b.step(diskStep, file, key, func(tmp string) error {
		return b.makeDisk(ctx, tmp, base, rootfs, key)
	})
	if err != nil {
		return "", err
	}
	return file, b.dropOld(file)
}

func (b *builder) makeDisk(ctx context.Context, out, base, rootfs, key string) error {
	dir := filepath.Dir(out)
	stage, tree, raw := filepath.Join(dir, "stage"), filepath.Join(dir, "tree"), filepath.Join(dir, "disk.raw")
	if err := b.stage(ctx, stage); err != nil {
		return err
	}
	script, err := source.ReadFile("assemble.sh")
	if err != nil {
		return err
	}
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(raw, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(raw, diskSize); err != nil {
		return err
	}
	b.Progress.Update(diskStep, 0.1, "root file system")
	uuid := fmt.Sprintf("%s-%s-4%s-8%s-%s", key[:8], key[8:12], key[13:16], key[17:20], key[20:32])
	args := []string{"-c", string(script), "assemble.sh", tree, base, rootfs, stage, raw,
		fmt.Sprint(rootStart), fmt.Sprintf("%dk", (diskSize-rootStart)>>10), uuid}
	if err := run(ctx, asRoot(os.Geteuid(), "sh", append(args, b.Debs...)...), nil); err != nil {
		return fmt.Errorf("make root file system: %w", err)
	}
	b.Progress.Update(diskStep, 0.6, "boot loader")
	if err := bootable(raw, filepath.Join(dir, "boot.img"), filepath.Join(dir, "core.img"), key); err != nil {
		return err
	}
	b.Progress.Update(diskStep, 0.7, "qcow2")
	return run(ctx, exec.Command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, out), nil)
}

// stage links together what goes to /usr/lib/tkenode: the components, the
// container images, the seed of containerd's root, and the versions of both, for
// nobody should have to start kubelet to learn its version.
func (b *builder) stage(ctx context.Context, dir string) error {
	links := map[string]string{"seed.tar": b.seedFile()}
	for name, what := range components {
		if what.onNode {
			links["bin/"+name] = filepath.Join(b.binDir(), name)
		}
	}
	for _, image := range containerImages {
		links["images/"+image.file] = filepath.Join(b.ociDir(), image.file)
	}
	for name, to := range links {
		at := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(to, at); err != nil {
			return err
		}
	}
	versions, err := versions(ctx, filepath.Join(b.Source, "images", "components"))
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(map[string]any{
		"containerd": versions["github.com/containerd/containerd/v2"],
		"coredns":    versions["github.com/coredns/coredns"],
		"kube-proxy": versions["k8s.io/kubernetes"],
		"kubelet":    versions["k8s.io/kubernetes"],
		"runc":       versions["github.com/opencontainers/runc"],
		"images":     slices.Sorted(maps.Keys(containerImages)),
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "versions.json"), append(data, '\n'), 0o644)
}

// bootable writes the boot sector with the partition table, and the boot loader
// behind it.
func bootable(disk, bootImage, coreImage, key string) error {
	boot, err := os.ReadFile(bootImage)
	if err != nil {
		return err
	}
	core, err := os.ReadFile(coreImage)
	if err != nil {
		return err
	}
	signature, err := hex.DecodeString(key[:8])
	if err != nil {
		return err
	}
	head, err := bootArea(boot, core, [4]byte(signature))
	if err != nil {
		return err
	}
	f, err := os.OpenFile(disk, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(head, 0); err != nil {
		return err
	}
	return f.Close()
}

// bootArea is what stands before the partition: GRUB's boot sector with the
// partition table in it, and from sector 1 on its core image. Both are made to
// find each other there; that is checked, not assumed.
// Source: grub-core/boot/i386/pc/{boot,diskboot}.S, include/grub/i386/pc/boot.h of GRUB 2.06.
func bootArea(boot, core []byte, signature [4]byte) ([]byte, error) {
	const (
		kernelSector = 0x5c        // in the boot sector: where the core image starts
		blockList    = sector - 12 // in the core image's first sector: where its second is
		table        = 0x1be
	)
	switch {
	case len(boot) != sector:
		return nil, fmt.Errorf("boot sector has %d bytes", len(boot))
	case len(core) <= sector || len(core) > rootStart-sector:
		return nil, fmt.Errorf("boot loader has %d bytes, there is room for %d", len(core), rootStart-sector)
	case binary.LittleEndian.Uint64(boot[kernelSector:]) != 1 || binary.LittleEndian.Uint64(core[blockList:]) != 2:
		return nil, errors.New("boot loader is not made for sector 1")
	}
	head := make([]byte, sector, sector+len(core))
	copy(head, boot)
	copy(head[0x1b8:], signature[:])
	clear(head[table : table+4*16])
	entry := head[table:]
	entry[0] = 0x80                            // active
	copy(entry[1:4], []byte{0xfe, 0xff, 0xff}) // cylinder, head, sector: not in use
	entry[4] = 0x83                            // Linux
	copy(entry[5:8], []byte{0xfe, 0xff, 0xff})
	binary.LittleEndian.PutUint32(entry[8:], rootStart/sector)
	binary.LittleEndian.PutUint32(entry[12:], (diskSize-rootStart)/sector)
	head[0x1fe], head[0x1ff] = 0x55, 0xaa
	return append(head, core...), nil
}

// dropOld removes the node images that were replaced, except for the last one and
// those that somebody holds: machines are based on them.
func (b *builder) dropOld(current string) error {
	found, err := filepath.Glob(filepath.Join(b.Cache, "images", "node-*.qcow2"))
	if err != nil {
		return err
	}
	type image struct {
		file string
		made int64
	}
	var old []image
	for _, file := range found {
		info, err := os.Stat(file)
		if err != nil {
			return fmt.Errorf("look for old node images: %w", err)
		}
		if file != current {
			old = append(old, image{file, info.ModTime().UnixNano()})
		}
	}
	slices.SortFunc(old, func(a, b image) int { return cmp.Compare(b.made, a.made) })
	for _, image := range old[min(1, len(old)):] {
		f, err := hold(image.file, syscall.LOCK_EX)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			continue
		}
		if err != nil {
			return fmt.Errorf("remove old node image: %w", err)
		}
		err = errors.Join(removeFile(stampOf(image.file)), removeFile(image.file), f.Close())
		if err != nil {
			return fmt.Errorf("remove old node image: %w", err)
		}
	}
	return nil
}

func removeFile(name string) error {
	if err := os.Remove(name); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// Hold keeps later builds from removing a node image, until the file is closed.
func Hold(image string) (*os.File, error) {
	f, err := hold(image, syscall.LOCK_SH)
	if err != nil {
		return nil, fmt.Errorf("hold node image: %w", err)
	}
	return f, nil
}

// hold locks by flock(2), which is not what QEMU locks its disks by.
func hold(image string, how int) (*os.File, error) {
	f, err := os.Open(image)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
