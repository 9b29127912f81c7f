package cloud

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"testing"
)

// idle is a hypervisor and a fabric in which everything works.
type idle struct{}

func (idle) Run(context.Context, Machine) error              { return nil }
func (idle) Destroy(context.Context, string) error           { return nil }
func (idle) PlugNIC(context.Context, string, NIC) error      { return nil }
func (idle) UnplugNIC(context.Context, string, string) error { return nil }
func (idle) PlugDisk(context.Context, string, Volume) error  { return nil }
func (idle) ResizeDisk(context.Context, string, Volume) error {
	return nil
}
func (idle) UnplugDisk(context.Context, string, string) error {
	return nil
}
func (idle) Attach(Port) error                   { return nil }
func (idle) SetAddrs(string, []netip.Addr) error { return nil }
func (idle) Detach(string) error                 { return nil }

// FuzzActions gives every action parameters that no client would: it answers
// something that can be sent, or refuses.
func FuzzActions(f *testing.F) {
	names := slices.Sorted(maps.Keys(actions))
	for i := range names {
		f.Add(uint(i), []byte(`{"Limit":101,"Offset":18446744073709551615,"Filters":[{"Name":"tag:","Values":[]}]}`))
		f.Add(uint(i), []byte(`{"VpcId":"vpc-lab00001","SubnetId":"subnet-pods0001","NetworkInterfaceName":"x","SecondaryPrivateIpAddressCount":18446744073709551615}`))
		f.Add(uint(i), []byte(`{"VpcId":"vpc-lab00001","SubnetId":"subnet-pods0001","NetworkInterfaceName":"x","PrivateIpAddresses":[{"PrivateIpAddress":"10.0.16.2"},{"PrivateIpAddress":"10.0.16.3","Primary":true}]}`))
		f.Add(uint(i), []byte(`{"NetworkInterfaceId":"eni-00000000","Ipv6Addresses":[{"Address":"2001:db8:0:10::9","Primary":true}],"Ipv6AddressCount":18446744073709551615}`))
		f.Add(uint(i), []byte(`{"Placement":{"Zone":"ap-guangzhou-3"},"DiskChargeType":"POSTPAID_BY_HOUR","DiskType":"CLOUD_SSD","DiskSize":20,"DiskCount":-1}`))
		f.Add(uint(i), []byte(`null`))
	}
	f.Fuzz(func(t *testing.T, which uint, body []byte) {
		config := Default()
		config.Delays, config.Log = Delays{}, slog.New(slog.DiscardHandler)
		r, err := New(config, idle{}, idle{})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if _, err := r.Launch(t.Context(), InstanceSpec{}); err != nil {
			t.Fatal(err)
		}
		name := names[which%uint(len(names))]
		r.mu.Lock()
		out, err := actions[name].do(r, "request", body)
		r.mu.Unlock()
		if err != nil {
			if e, ok := errors.AsType[*refusal](err); !ok || e.Code == "" {
				t.Errorf("%s %q: %v", name, body, err)
			}
			return
		}
		var answer struct{ Response struct{ RequestId string } }
		if err := json.Unmarshal(envelope(out, "request"), &answer); err != nil || answer.Response.RequestId != "request" {
			t.Errorf("%s %q answers %+v, %v", name, body, answer, err)
		}
	})
}

func FuzzAuthorization(f *testing.F) {
	f.Add("TC3-HMAC-SHA256 Credential=AKID/2026-09-01/vpc/tc3_request, SignedHeaders=content-type;host, Signature=00")
	f.Add("TC3-HMAC-SHA256 Credential=///,SignedHeaders=,Signature=")
	f.Fuzz(func(t *testing.T, header string) {
		a, err := parseAuthorization(header)
		if err == nil && (!slices.Contains(a.signed, "host") || !slices.Contains(a.signed, "content-type")) {
			t.Errorf("%q is taken for %+v", header, a)
		}
	})
}
