package kube

import (
	"net"
	"os"
	"testing"
)

func TestFreeAddressWhereThePortIsTakenEverywhere(t *testing.T) {
	l, err := net.Listen("tcp4", ":0") // as a cluster of somebody's listens on 6443
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := uint16(l.Addr().(*net.TCPAddr).Port)
	a, err := freeAddress(taken)
	if err != nil || a.Port() == taken || !a.Addr().IsLoopback() {
		t.Errorf("address %v, %v; port %d is taken", a, err, taken)
	}
}

// shortDir is a directory for sockets, whose paths have room for some 100 bytes:
// $TMPDIR may be longer than that by itself.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "tkenode")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
