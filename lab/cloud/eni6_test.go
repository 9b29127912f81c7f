package cloud_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common"
	vpc "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/vpc/v20170312"

	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

func six(host string) netip.Addr { return netip.MustParseAddr("2001:db8:0:10::" + host) }

// assign6 asks for n IPv6 addresses, and for those given.
func (s *sdk) assign6(eni string, n uint64, given ...string) (ips []*vpc.Ipv6Address, task string, err error) {
	q := vpc.NewAssignIpv6AddressesRequest()
	q.NetworkInterfaceId = &eni
	if n > 0 {
		q.Ipv6AddressCount = &n
	}
	for _, a := range given {
		q.Ipv6Addresses = append(q.Ipv6Addresses, &vpc.Ipv6Address{Address: &a})
	}
	a, err := s.vpc.AssignIpv6Addresses(q)
	if err != nil {
		return nil, "", err
	}
	return a.Response.Ipv6AddressSet, *a.Response.RequestId, nil
}

func (s *sdk) unassign6(eni string, given ...string) (task string, err error) {
	q := vpc.NewUnassignIpv6AddressesRequest()
	q.NetworkInterfaceId = &eni
	for _, a := range given {
		q.Ipv6Addresses = append(q.Ipv6Addresses, &vpc.Ipv6Address{Address: &a})
	}
	a, err := s.vpc.UnassignIpv6Addresses(q)
	if err != nil {
		return "", err
	}
	return *a.Response.RequestId, nil
}

// described6 are the IPv6 addresses of an ENI as the API describes them, and their states.
func (s *sdk) described6(t *testing.T, eni string) (ips []string) {
	t.Helper()
	q := vpc.NewDescribeNetworkInterfacesRequest()
	q.NetworkInterfaceIds = []*string{&eni}
	a, err := s.vpc.DescribeNetworkInterfaces(q)
	for _, ip := range must(t, a, err).Response.NetworkInterfaceSet[0].Ipv6AddressSet {
		if *ip.Primary {
			t.Errorf("%s is primary", *ip.Address)
		}
		ips = append(ips, *ip.Address+" "+*ip.State)
	}
	return ips
}

// TestIPv6Life follows the IPv6 addresses of an ENI with the delays of the lab.
func TestIPv6Life(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSDK(t, cloud.Default())
		eni := s.attached(t, "one")
		time.Sleep(10 * time.Second)
		described := func(want ...string) {
			t.Helper()
			if got := s.described6(t, eni.ID); !slices.Equal(got, want) {
				t.Errorf("after %s described as %v, want %v", time.Now(), got, want)
			}
		}
		carried := func(want ...netip.Addr) {
			t.Helper()
			if got := s.machines.addrs(eni.ID); !slices.Equal(got, append([]netip.Addr{eni.IPs[0].Addr}, want...)) {
				t.Errorf("packets may carry %v, want the primary address and %v", got, want)
			}
		}
		ips, task, err := s.assign6(eni.ID, 2)
		if err != nil || len(ips) != 2 || *ips[0].Address != six("2").String() || *ips[1].Address != six("3").String() || *ips[0].State != "PENDING" {
			t.Fatalf("assigned %+v, %v", ips, err)
		}
		carried()
		described()
		s.await(t, task, nil)
		carried(six("2"), six("3"))
		time.Sleep(1700 * time.Millisecond)
		described(six("2").String()+" PENDING", six("3").String()+" PENDING")
		time.Sleep(time.Second)
		described(six("2").String()+" AVAILABLE", six("3").String()+" AVAILABLE")

		task, err = s.unassign6(eni.ID, six("2").String())
		s.await(t, task, err)
		carried(six("3"))
		time.Sleep(1700 * time.Millisecond)
		described(six("2").String()+" DELETING", six("3").String()+" AVAILABLE")
		time.Sleep(time.Second)
		described(six("3").String() + " AVAILABLE")

		// The address that was given back is the next, and those of IPv4 go on beside it.
		_, task, err = s.assign6(eni.ID, 1)
		s.await(t, task, err)
		v4, task, err := s.api.AssignIPs(t.Context(), eni.ID, 1, "v4")
		s.await(t, task, err)
		carried(six("3"), six("2"), v4[0].Addr)
		if e := s.now(eni.ID); len(e.IPs) != 2 || len(e.IP6s) != 2 {
			t.Errorf("the ENI has %v and %v", e.IPs, e.IP6s)
		}
		subnets, err := s.api.DescribeSubnets(t.Context(), []string{"subnet-pods0001"})
		if err != nil || subnets[0].AvailableIPs != 4091 {
			t.Errorf("subnet %+v, %v: want IPv4 addresses counted alone", subnets, err)
		}

		// They come and go with the ENI.
		task, err = s.api.DetachENI(t.Context(), eni.ID, s.instance.ID, "detach")
		s.await(t, task, err)
		_, task, err = s.assign6(eni.ID, 0, six("abcd").String())
		s.await(t, task, err)
		task, err = s.api.AttachENI(t.Context(), eni.ID, s.instance.ID, 0, "attach")
		s.await(t, task, err)
		carried(v4[0].Addr, six("3"), six("2"), six("abcd"))
		time.Sleep(2 * time.Second)
		if _, body := s.read(t, "meta-data/network/interfaces/macs/"+strings.ToUpper(eni.MAC)+"/local-ipv4s/"); body != eni.IPs[0].Addr.String()+"/\n"+v4[0].Addr.String()+"/" {
			t.Errorf("metadata lists %q as IPv4 addresses", body)
		}
	})
}

func TestIPv6Refusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := instant()
		config.Subnets = append(config.Subnets, cloud.Subnet{
			ID: "subnet-four0001", CIDR: netip.MustParsePrefix("10.0.48.0/24"), Zone: "ap-guangzhou-3", First: netip.MustParseAddr("10.0.48.2"),
		})
		s := newSDK(t, config)
		eni, other := s.attached(t, "one"), s.attached(t, "two")
		_, task, err := s.assign6(other.ID, 1)
		s.await(t, task, err)
		taken := six("2").String()
		for what, c := range map[string]struct {
			n     uint64
			given []string
			want  string
		}{
			"nothing":              {0, nil, "MissingParameter"},
			"beyond the quota":     {11, nil, "LimitExceeded.Address"},
			"an IPv4 address":      {0, []string{"10.0.16.9"}, "InvalidParameterValue.Range"},
			"another subnet's":     {0, []string{"2001:db8:0:1::9"}, "InvalidParameterValue.Range"},
			"the subnet's own":     {0, []string{six("").String()}, "InvalidParameterValue.Reserved"},
			"the gateway's":        {0, []string{six("1").String()}, "InvalidParameterValue.Reserved"},
			"another ENI's":        {0, []string{taken}, "ResourceInUse"},
			"one twice":            {0, []string{six("9").String(), six("9").String()}, "InvalidParameterValue.DuplicatePara"},
			"no address":           {0, []string{"six"}, "InvalidParameterValue.Malformed"},
			"one and all the rest": {10, []string{six("9").String()}, "LimitExceeded.Address"},
		} {
			if _, _, err := s.assign6(eni.ID, c.n, c.given...); sdkCode(err) != c.want {
				t.Errorf("assign %s: %v, want %s", what, err, c.want)
			}
		}
		primary := vpc.NewAssignIpv6AddressesRequest()
		primary.NetworkInterfaceId = &eni.ID
		primary.Ipv6Addresses = []*vpc.Ipv6Address{{Address: common.StringPtr(six("9").String()), Primary: common.BoolPtr(true)}}
		if _, err := s.vpc.AssignIpv6Addresses(primary); sdkCode(err) != "InvalidParameterValue.Malformed" {
			t.Errorf("assign a primary one: %v", err)
		}
		for what, c := range map[string]struct {
			given []string
			want  string
		}{
			"nothing":        {nil, "InvalidParameterValue.LimitExceeded"},
			"another ENI's":  {[]string{taken}, tencent.CodeNotFound},
			"an IPv4 one":    {[]string{eni.IPs[0].Addr.String()}, tencent.CodeNotFound},
			"no address":     {[]string{"six"}, "InvalidParameterValue.Malformed"},
			"eleven of them": {make([]string, 11), "InvalidParameterValue.LimitExceeded"},
		} {
			if _, err := s.unassign6(eni.ID, c.given...); sdkCode(err) != c.want {
				t.Errorf("unassign %s: %v, want %s", what, err, c.want)
			}
		}
		s.Inject(cloud.Fault{Action: "vpc:AssignIpv6Addresses", Stuck: time.Minute})
		_, task, err = s.assign6(eni.ID, 10)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.unassign6(eni.ID, taken); sdkCode(err) != tencent.CodeMutexTaskRunning {
			t.Errorf("unassign while assigning: %v", err)
		}
		if _, _, err := s.api.AssignIPs(t.Context(), eni.ID, 1, "a"); code(err) != tencent.CodeMutexTaskRunning {
			t.Errorf("assign IPv4 while assigning IPv6: %v", err)
		}
		time.Sleep(2 * time.Minute)
		s.await(t, task, nil)

		four := s.spec("four")
		four.SubnetID = "subnet-four0001"
		e, task, err := s.api.CreateENI(t.Context(), four)
		s.await(t, task, err)
		if _, _, err := s.assign6(e.ID, 1); sdkCode(err) != "UnsupportedOperation" {
			t.Errorf("assign in a subnet without IPv6: %v", err)
		}
		q := vpc.NewDescribeSubnetsRequest()
		a, err := s.vpc.DescribeSubnets(q)
		for i, want := range []string{"2001:db8:0:1::/64", "2001:db8:0:10::/64", ""} {
			if got := must(t, a, err).Response.SubnetSet[i]; *got.Ipv6CidrBlock != want {
				t.Errorf("subnet %s has %q, want %q", *got.SubnetId, *got.Ipv6CidrBlock, want)
			}
		}
	})
}

func TestIPv6Faults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSDK(t, instant())
		eni := s.attached(t, "one")
		s.Inject(cloud.Fault{Action: "vpc:AssignIpv6Addresses", Partial: 3})
		ips, task, err := s.assign6(eni.ID, 5)
		s.await(t, task, err)
		if len(ips) != 2 || len(s.now(eni.ID).IP6s) != 2 {
			t.Errorf("partial: %d addresses, and the ENI has %d", len(ips), len(s.now(eni.ID).IP6s))
		}
		for _, fault := range []cloud.Fault{{Vanish: true}, {Fail: true}} {
			fault.Action = "vpc:*Ipv6Addresses"
			before, carried := s.now(eni.ID).IP6s, s.machines.addrs(eni.ID)
			for _, call := range []func() error{
				func() error { _, _, err := s.assign6(eni.ID, 1); return err },
				func() error { _, err := s.unassign6(eni.ID, *ips[0].Address); return err },
			} {
				s.Inject(fault)
				if err := call(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
				if after := s.now(eni.ID).IP6s; !slices.Equal(after, before) || !slices.Equal(s.machines.addrs(eni.ID), carried) {
					t.Errorf("%+v: before %v, after %v", fault, before, after)
				}
			}
		}

		// A request that is made again is answered again, and no address more is given.
		q := vpc.NewAssignIpv6AddressesRequest()
		q.NetworkInterfaceId, q.Ipv6AddressCount, q.ClientToken = &eni.ID, common.Uint64Ptr(1), common.StringPtr("again")
		for range 2 {
			a, err := s.vpc.AssignIpv6Addresses(q)
			s.await(t, *must(t, a, err).Response.RequestId, nil)
		}
		if n := len(s.now(eni.ID).IP6s); n != 3 {
			t.Errorf("the ENI has %d addresses, want 3", n)
		}
	})
}
