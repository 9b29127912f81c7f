package kube

import (
	"net"
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
