package cloud

import (
	"context"
	"net/netip"
	"slices"
	"strings"
)

// mutexRunning is the code for an ENI whose addresses another task works on.
const mutexRunning = "UnsupportedOperation.MutexOperationTaskRunning"

func (r *Region) assignPrivateIPAddresses(id string, in *assignIn) (any, error) {
	e, err := r.idleENI(in.NetworkInterfaceId, mutexRunning)
	if err != nil {
		return nil, err
	}
	more := int(min(in.SecondaryPrivateIpAddressCount, 1000))
	if more == 0 && len(in.PrivateIpAddresses) == 0 {
		return nil, refuse("MissingParameter", "neither PrivateIpAddresses nor SecondaryPrivateIpAddressCount is given")
	}
	if quota := r.addressQuota(e); len(e.IPs)+more+len(in.PrivateIpAddresses) > quota {
		return nil, refuse("LimitExceeded", "ENI %s has %d addresses, %d more exceed the quota of %d",
			e.ID, len(e.IPs), more+len(in.PrivateIpAddresses), quota)
	}
	more = max(more-r.faults.now.Partial, 0)
	s, _ := r.subnet(e.Subnet)
	addrs, err := r.pickAddrs(s, in.PrivateIpAddresses, more, false)
	if err != nil {
		return nil, err
	}
	var out []addressOut
	for _, ip := range r.assign(id, "AssignPrivateIpAddresses", e, ip4s, addrs) {
		out = append(out, describeIP(ip))
	}
	return struct{ PrivateIpAddressSet []addressOut }{out}, nil
}

// family picks the addresses of one family of an ENI.
type family func(*ENI) *[]IP

func ip4s(e *ENI) *[]IP { return &e.IPs }
func ip6s(e *ENI) *[]IP { return &e.IP6s }

// assign starts to give an ENI addresses, and returns them. The caller holds mu.
func (r *Region) assign(id, action string, e ENI, of family, addrs []netip.Addr) []IP {
	e = e.copy()
	var given []IP
	for _, a := range addrs {
		given = append(given, IP{Addr: a, State: pending})
	}
	*of(&e) = append(*of(&e), given...)
	r.enis.put(e.ID, e)
	r.begin(id, work{
		action: action, target: []string{e.ID}, takes: r.config.Delays.Task,
		do: func(context.Context) error { return r.setAddrs(e, append(e.usable(), addrs...)) },
		done: func(err error) {
			if err != nil {
				e := e.copy()
				ips := of(&e)
				*ips = slices.DeleteFunc(*ips, func(ip IP) bool { return slices.Contains(addrs, ip.Addr) })
				r.enis.put(e.ID, e)
			}
			r.settleENI(e.ID)
		},
	})
	return given
}

// addressQuota is how many addresses of a family an ENI may have. The caller holds mu.
func (r *Region) addressQuota(e ENI) int {
	if instance, ok := r.instances.get(e.Instance); ok {
		return instanceTypes[instance.Type].IPs
	}
	return maxIPsUnattached
}

// setAddrs tells the fabric of the addresses of an ENI that is attached.
func (r *Region) setAddrs(e ENI, addrs []netip.Addr) error {
	if e.Instance == "" {
		return nil
	}
	return r.fabric.SetAddrs(e.ID, addrs)
}

func (r *Region) unassignPrivateIPAddresses(id string, in *unassignIn) (any, error) {
	e, err := r.idleENI(in.NetworkInterfaceId, mutexRunning)
	if err != nil {
		return nil, err
	}
	if in.InstanceId != "" && in.InstanceId != e.Instance {
		return nil, refuse("UnsupportedOperation.AttachmentNotFound", "ENI %s is not attached to %s", e.ID, in.InstanceId)
	}
	return none{}, r.unassign(id, "UnassignPrivateIpAddresses", e, ip4s, in.PrivateIpAddresses)
}

// unassign starts to take addresses from an ENI. The caller holds mu.
func (r *Region) unassign(id, action string, e ENI, of family, given []addressIn) error {
	if n := len(given); n == 0 || n > maxAddressesCall {
		return refuse("InvalidParameterValue.LimitExceeded", "%d addresses in a call, want 1 to %d", n, maxAddressesCall)
	}
	e = e.copy()
	ips := *of(&e)
	var gone []netip.Addr
	for _, g := range given {
		a, err := netip.ParseAddr(g.PrivateIpAddress)
		i := slices.IndexFunc(ips, func(ip IP) bool { return ip.Addr == a })
		switch {
		case err != nil:
			return refuse("InvalidParameterValue.Malformed", "address %q is malformed", g.PrivateIpAddress)
		case slices.Contains(gone, a):
			return refuse("InvalidParameterValue.DuplicatePara", "address %s is given twice", a)
		case i < 0:
			return refuse("ResourceNotFound", "ENI %s has no address %s", e.ID, a)
		case ips[i].Primary:
			return refuse("UnsupportedOperation", "address %s is the primary one of %s", a, e.ID)
		}
		ips[i].State = deleting
		gone = append(gone, a)
	}
	r.enis.put(e.ID, e)
	r.begin(id, work{
		action: action, target: []string{e.ID}, takes: r.config.Delays.Task,
		do: func(context.Context) error { return r.setAddrs(e, e.usable()) },
		done: func(err error) {
			e := e.copy()
			ips := of(&e)
			if err == nil {
				*ips = slices.DeleteFunc(*ips, func(ip IP) bool { return ip.State == deleting })
			}
			for i := range *ips {
				(*ips)[i].State = available
			}
			r.enis.put(e.ID, e)
		},
	})
	return nil
}

func (r *Region) describeNetworkInterfaceLimit(_ string, in *struct{ InstanceId string }) (any, error) {
	instanceID := in.InstanceId
	if strings.HasPrefix(instanceID, "eni-") {
		e, ok := r.enis.get(instanceID)
		if !ok || e.Instance == "" {
			return nil, refuse("ResourceNotFound", "ENI %s is not found, or not attached", instanceID)
		}
		instanceID = e.Instance
	}
	instance, ok := r.instances.get(instanceID)
	if !ok {
		return nil, refuse("InvalidInstanceId.NotFound", "instance %q is not found", in.InstanceId)
	}
	t := instanceTypes[instance.Type]
	return struct {
		EniQuantity, EniPrivateIpAddressQuantity             int
		ExtendEniQuantity, ExtendEniPrivateIpAddressQuantity int
	}{t.ENIs, t.IPs, t.extendENIs, extendIPs}, nil
}

func (r *Region) describeVpcTaskResult(_ string, in *struct{ TaskId string }) (any, error) {
	t := r.tasks[in.TaskId]
	if t == nil {
		return nil, refuse("ResourceNotFound", "task %q is not found", in.TaskId)
	}
	return struct{ Status, Output string }{t.Status, t.Output}, nil
}
