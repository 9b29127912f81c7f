package lab

import (
	"log/slog"
	"net/netip"
	"testing"

	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/vpc"
)

// TestDial: the lab reaches an address from one of the same family.
func TestDial(t *testing.T) {
	n, err := vpc.New(vpc.Config{CIDR: vpcCIDR, CIDR6: vpcCIDR6, Subnets: subnets(cloud.Default()), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	l := &Lab{Net: n}
	for at, probe := range map[string]netip.Addr{"10.0.16.200:80": ProbeAddr, "[2001:db8:0:10::200]:80": ProbeAddr6} {
		listener, err := n.Listen(netip.MustParseAddrPort(at))
		if err != nil {
			t.Fatal(err)
		}
		conn, err := l.Dial(t.Context(), "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if from := netip.MustParseAddrPort(accepted.RemoteAddr().String()).Addr(); from != probe {
			t.Errorf("%s is reached from %s, want %s", at, from, probe)
		}
		accepted.Close()
		listener.Close()
	}
}
