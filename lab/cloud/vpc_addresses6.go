package cloud

type address6In struct {
	Address     string
	Primary     bool
	Description string
}

type assign6In struct {
	NetworkInterfaceId string
	Ipv6Addresses      []address6In
	Ipv6AddressCount   uint64
	ClientToken        string
}

type unassign6In struct {
	NetworkInterfaceId string
	Ipv6Addresses      []address6In
}

func addressesIn(given []address6In) (in []addressIn) {
	for _, g := range given {
		in = append(in, addressIn{PrivateIpAddress: g.Address, Primary: g.Primary, Description: g.Description})
	}
	return in
}

// assignIPv6Addresses gives an ENI IPv6 addresses, of which none can be primary. No
// page of the vendor and no field of DescribeNetworkInterfaceLimit tells how many an
// ENI may have: here it is as many as of IPv4, counted on their own.
func (r *Region) assignIPv6Addresses(id string, in *assign6In) (any, error) {
	e, err := r.idleENI(in.NetworkInterfaceId, mutexRunning)
	if err != nil {
		return nil, err
	}
	s, _ := r.subnet(e.Subnet)
	if !s.CIDR6.IsValid() {
		return nil, refuse("UnsupportedOperation", "subnet %s has no IPv6 range", s.ID)
	}
	more := int(min(in.Ipv6AddressCount, 1000))
	wanted := more + len(in.Ipv6Addresses)
	switch quota := r.addressQuota(e); {
	case wanted == 0:
		return nil, refuse("MissingParameter", "neither Ipv6Addresses nor Ipv6AddressCount is given")
	case len(e.IP6s)+wanted > quota:
		return nil, refuse("LimitExceeded.Address", "ENI %s has %d IPv6 addresses, %d more exceed the quota of %d", e.ID, len(e.IP6s), wanted, quota)
	}
	more = max(more-r.faults.now.Partial, 0)
	addrs, err := r.pickAddrs(s.six(), addressesIn(in.Ipv6Addresses), more, false)
	if err != nil {
		return nil, err
	}
	var out []address6Out
	for _, ip := range r.assign(id, "AssignIpv6Addresses", e, ip6s, addrs) {
		out = append(out, describeIP6(ip))
	}
	return struct{ Ipv6AddressSet []address6Out }{out}, nil
}

func (r *Region) unassignIPv6Addresses(id string, in *unassign6In) (any, error) {
	e, err := r.idleENI(in.NetworkInterfaceId, mutexRunning)
	if err != nil {
		return nil, err
	}
	return none{}, r.unassign(id, "UnassignIpv6Addresses", e, ip6s, addressesIn(in.Ipv6Addresses))
}
