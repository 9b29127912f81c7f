package cloud

import (
	"slices"
	"strconv"
	"strings"
	"time"
)

// filterIn narrows what is described: one of the values, for each filter.
type filterIn struct {
	Name   string
	Values []string
}

// What is answered; names are the API's.

type addressOut struct {
	PrivateIpAddress string
	Primary          bool
	State            string
}

type address6Out struct {
	Address string
	Primary bool
	State   string
}

type attachmentOut struct {
	InstanceId        string
	DeviceIndex       int
	InstanceAccountId string
	AttachTime        string
}

type eniOut struct {
	NetworkInterfaceId          string
	NetworkInterfaceName        string
	NetworkInterfaceDescription string
	SubnetId                    string
	VpcId                       string
	GroupSet                    []string
	Primary                     bool
	MacAddress                  string
	State                       string
	PrivateIpAddressSet         []addressOut
	Ipv6AddressSet              []address6Out
	Attachment                  *attachmentOut
	Zone                        string
	CreatedTime                 string
	TagSet                      []Tag
	EniType                     int // 1: the primary one of an instance
	Business                    string
	AttachType                  int
}

func describeIP(ip IP) addressOut { return addressOut{ip.Addr.String(), ip.Primary, ip.State} }

func describeIP6(ip IP) address6Out { return address6Out{ip.Addr.String(), ip.Primary, ip.State} }

func (r *Region) describe(e ENI) eniOut {
	s, _ := r.subnet(e.Subnet)
	out := eniOut{
		NetworkInterfaceId: e.ID, NetworkInterfaceName: e.Name, NetworkInterfaceDescription: e.Description,
		SubnetId: e.Subnet, VpcId: r.config.VPCID, GroupSet: e.SecurityGroups, Primary: e.Primary,
		MacAddress: strings.ToUpper(e.MAC), State: e.State, Zone: s.Zone, CreatedTime: beijing(e.Created), TagSet: e.Tags, AttachType: e.AttachType,
	}
	if e.Primary {
		out.EniType = 1
	}
	for _, ip := range e.IPs {
		out.PrivateIpAddressSet = append(out.PrivateIpAddressSet, describeIP(ip))
	}
	for _, ip := range e.IP6s {
		out.Ipv6AddressSet = append(out.Ipv6AddressSet, describeIP6(ip))
	}
	if instance := e.attachedTo(); instance != "" {
		out.Business = "cvm"
		out.Attachment = &attachmentOut{instance, e.DeviceIndex, r.config.OwnerUin, beijing(e.Attached)}
	}
	return out
}

// beijing writes a time as the older APIs do, without its zone, UTC+8.
func beijing(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.In(time.FixedZone("CST", 8*60*60)).Format(time.DateTime)
}

// visible is the moment that describing looks back to.
func (r *Region) visible() time.Time { return time.Now().Add(-r.config.Delays.Visible) }

type describeENIsIn struct {
	NetworkInterfaceIds []string
	Filters             []filterIn
	Offset, Limit       uint64
}

func (r *Region) describeNetworkInterfaces(_ string, in *describeENIsIn) (any, error) {
	if len(in.NetworkInterfaceIds) > 0 && len(in.Filters) > 0 {
		return nil, refuse("InvalidParameter.Coexist", "NetworkInterfaceIds and Filters exclude each other")
	}
	enis := r.enis.asOf(r.visible())
	for _, id := range in.NetworkInterfaceIds {
		if !slices.ContainsFunc(enis, func(e ENI) bool { return e.ID == id }) {
			return nil, refuse("ResourceNotFound", "ENI %q is not found", id)
		}
	}
	if len(in.NetworkInterfaceIds) > 0 {
		enis = slices.DeleteFunc(enis, func(e ENI) bool { return !slices.Contains(in.NetworkInterfaceIds, e.ID) })
	}
	for _, f := range in.Filters {
		values, err := eniFilter(f.Name)
		if err != nil {
			return nil, err
		}
		enis = slices.DeleteFunc(enis, func(e ENI) bool { return !overlap(values(r, e), f.Values) })
	}
	total := len(enis)
	enis, err := page(enis, in.Offset, in.Limit)
	if err != nil {
		return nil, err
	}
	set := []eniOut{}
	for _, e := range enis {
		set = append(set, r.describe(e))
	}
	return struct {
		NetworkInterfaceSet []eniOut
		TotalCount          int
	}{set, total}, nil
}

// eniFilter returns what a filter compares of an ENI.
func eniFilter(name string) (func(r *Region, e ENI) []string, error) {
	if key, ok := strings.CutPrefix(name, "tag:"); ok {
		return func(_ *Region, e ENI) (values []string) {
			for _, t := range e.Tags {
				if t.Key == key {
					values = append(values, t.Value)
				}
			}
			return values
		}, nil
	}
	f, ok := eniFilters[name]
	if !ok {
		return nil, refuse("InvalidParameter.FilterInvalidKey", "filter %q is not known", name)
	}
	return f, nil
}

var eniFilters = map[string]func(r *Region, e ENI) []string{
	"vpc-id":                   func(r *Region, _ ENI) []string { return []string{r.config.VPCID} },
	"subnet-id":                func(_ *Region, e ENI) []string { return []string{e.Subnet} },
	"network-interface-id":     func(_ *Region, e ENI) []string { return []string{e.ID} },
	"network-interface-name":   func(_ *Region, e ENI) []string { return []string{e.Name} },
	"attachment.instance-id":   func(_ *Region, e ENI) []string { return []string{e.attachedTo()} },
	"groups.security-group-id": func(_ *Region, e ENI) []string { return e.SecurityGroups },
	"is-primary":               func(_ *Region, e ENI) []string { return []string{strconv.FormatBool(e.Primary)} },
	"address-ip": func(_ *Region, e ENI) (values []string) {
		for _, ip := range e.IPs {
			values = append(values, ip.Addr.String())
		}
		return values
	},
	"tag-key": func(_ *Region, e ENI) (values []string) {
		for _, t := range e.Tags {
			values = append(values, t.Key)
		}
		return values
	},
}

func overlap(have, want []string) bool {
	return slices.ContainsFunc(have, func(s string) bool { return slices.Contains(want, s) })
}

// page cuts a page of at most 100 out of what was found, 20 by default.
func page[T any](all []T, offset, limit uint64) ([]T, error) {
	if limit == 0 {
		limit = 20
	}
	if limit > 100 {
		return nil, refuse("InvalidParameterValue.Range", "Limit %d is not from 1 to 100", limit)
	}
	all = all[min(offset, uint64(len(all))):]
	return all[:min(limit, uint64(len(all)))], nil
}

type subnetOut struct {
	VpcId                   string
	SubnetId                string
	SubnetName              string
	CidrBlock               string
	Ipv6CidrBlock           string // empty: none
	Zone                    string
	AvailableIpAddressCount int
	TotalIpAddressCount     int
}

type describeSubnetsIn struct {
	SubnetIds     []string
	Filters       []filterIn
	Offset, Limit string // numbers, in this action
}

func (r *Region) describeSubnets(_ string, in *describeSubnetsIn) (any, error) {
	if len(in.SubnetIds) > 0 && len(in.Filters) > 0 {
		return nil, refuse("InvalidParameter.Coexist", "SubnetIds and Filters exclude each other")
	}
	set := []subnetOut{}
	for _, s := range r.config.Subnets {
		free, total := r.freeAddrs(s)
		out := subnetOut{r.config.VPCID, s.ID, s.ID, s.CIDR.String(), "", s.Zone, free, total}
		if s.CIDR6.IsValid() {
			out.Ipv6CidrBlock = s.CIDR6.String()
		}
		set = append(set, out)
	}
	for _, id := range in.SubnetIds {
		if _, ok := r.subnet(id); !ok {
			return nil, refuse("ResourceNotFound", "subnet %q is not found", id)
		}
	}
	if len(in.SubnetIds) > 0 {
		set = slices.DeleteFunc(set, func(s subnetOut) bool { return !slices.Contains(in.SubnetIds, s.SubnetId) })
	}
	for _, f := range in.Filters {
		var value func(subnetOut) string
		switch f.Name {
		case "vpc-id":
			value = func(s subnetOut) string { return s.VpcId }
		case "subnet-id":
			value = func(s subnetOut) string { return s.SubnetId }
		case "zone":
			value = func(s subnetOut) string { return s.Zone }
		default:
			return nil, refuse("InvalidParameter.FilterInvalidKey", "filter %q is not known", f.Name)
		}
		set = slices.DeleteFunc(set, func(s subnetOut) bool { return !slices.Contains(f.Values, value(s)) })
	}
	total := len(set)
	offset, err1 := number(in.Offset)
	limit, err2 := number(in.Limit)
	if err1 != nil || err2 != nil {
		return nil, refuse("InvalidParameterValue.Malformed", "Offset %q or Limit %q is no number", in.Offset, in.Limit)
	}
	set, err := page(set, offset, limit)
	return struct {
		TotalCount int
		SubnetSet  []subnetOut
	}{total, set}, err
}

func number(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	return strconv.ParseUint(s, 10, 32)
}
