//go:build kernel

package images

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// An interrupted build is killed, whatever it does: it has no chance to unmount.
func TestKernelInterruptionLeavesNoMount(t *testing.T) {
	mounts := func() string {
		data, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	before := mounts()
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	up, done := make(chan struct{}), make(chan error, 1)
	go func() {
		script := "mount -t tmpfs tmpfs " + dir + " && touch " + dir + "/file && echo up && sleep 60"
		done <- run(ctx, asRoot(os.Geteuid(), "sh", "-c", script), func(string) { close(up) })
	}()
	select {
	case <-up:
	case err := <-done:
		t.Fatalf("mount in a namespace: %v", err)
	case <-time.After(30 * time.Second):
		t.Fatal("mount in a namespace takes too long")
	}
	cancel()
	<-done
	if after := mounts(); after != before {
		t.Errorf("mounts before:\n%s\nafter:\n%s", before, after)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("what was mounted there is visible here: %v, %v", names, err)
	}
}

// What is made without root belongs to root all the same.
func TestKernelOwnersWithoutRoot(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "a.tar")
	script := "mount -t tmpfs tmpfs " + dir + "/t && cd " + dir + "/t && touch a b && chown 104:106 b && chmod 4755 b && " +
		"tar -cf ../a.tar a b && tar --numeric-owner -tvf ../a.tar"
	if err := os.Mkdir(filepath.Join(dir, "t"), 0o755); err != nil {
		t.Fatal(err)
	}
	var list []string
	if err := run(t.Context(), asRoot(os.Geteuid(), "sh", "-c", script), func(l string) { list = append(list, l) }); err != nil {
		t.Fatal(err)
	}
	if len(list) != 2 || list[0][:14] != "-rw-r--r-- 0/0" || list[1][:18] != "-rwsr-xr-x 104/106" {
		t.Errorf("owners: %q", list)
	}
	info, err := os.Stat(out)
	if err != nil || info.Size() == 0 {
		t.Errorf("archive: %v", err)
	}
}
