package vpc_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"

	"github.com/tkenode/tkenode/lab/vpc"
)

// A service of the lab at a link-local address, and a request to it from an address in the VPC. A machine would join
// with n.Attach(vpc.Port{…}, socket) and QEMU's -netdev stream,server=off,addr.type=unix,addr.path=socket.
func Example() {
	n, err := vpc.New(vpc.Config{
		CIDR:    netip.MustParsePrefix("10.0.0.0/16"),
		Subnets: []vpc.Subnet{{ID: "subnet-node0001", CIDR: netip.MustParsePrefix("10.0.0.0/24")}},
		Hosts:   map[string]netip.Addr{"metadata.tencentyun.com": netip.MustParseAddr("169.254.0.23")},
	})
	if err != nil {
		panic(err)
	}
	defer n.Close()
	l, err := n.Listen(netip.MustParseAddrPort("169.254.0.23:80"))
	if err != nil {
		panic(err)
	}
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		from := netip.MustParseAddrPort(r.RemoteAddr).Addr() // which machine asks
		fmt.Fprintf(w, "%s asks for %s", from, r.URL.Path)
	}))

	probe := netip.MustParseAddr("10.0.0.20")
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return n.DialContext(ctx, probe, network, addr)
	}}}
	response, err := client.Get("http://metadata.tencentyun.com/latest/meta-data/instance-id")
	if err != nil {
		panic(err)
	}
	defer response.Body.Close()
	answer, _ := io.ReadAll(response.Body)
	fmt.Printf("%s\n", answer)
	// Output: 10.0.0.20 asks for /latest/meta-data/instance-id
}
