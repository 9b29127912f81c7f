package images

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"syscall"
)

// firstBuild is the free space that a first build needs: the cache takes 2 GiB, the
// go command's caches of builds and modules 7, and the step before the last one
// works in sparse files.
const firstBuild = 12 << 30

// check says at once what a build would otherwise fail of after many minutes. It
// does so only where there is something long to build.
func (b *builder) check(ctx context.Context) error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("this machine is %s: components, node image and CVMs are built for amd64 only, on an amd64 machine", runtime.GOARCH)
	}
	if _, err := os.Stat(b.binDir()); err == nil {
		return nil
	}
	if err := namespaces(ctx); err != nil {
		return err
	}
	return b.space(firstBuild)
}

// namespaces tries what every step that needs root does.
func namespaces(ctx context.Context) error {
	if err := run(ctx, asRoot(os.Geteuid(), "true"), nil); err != nil {
		return fmt.Errorf("make namespaces: %w\nthe node image is made by root in a user namespace of its own. "+
			"Ranges of this user in /etc/subuid and /etc/subgid are needed (make setup adds them), "+
			"and sysctl must not forbid it: kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces>0", err)
	}
	return nil
}

func (b *builder) space(need uint64) error {
	var fs syscall.Statfs_t
	if err := syscall.Statfs(b.Cache, &fs); err != nil {
		return fmt.Errorf("look for free space: %w", err)
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < need {
		return fmt.Errorf("%s has %d GiB free, a first build needs %d GiB (with go's build and module caches); set TKENODE_CACHE to a directory on a larger disk",
			b.Cache, free>>30, need>>30)
	}
	return nil
}
