package cloud

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/tencent"
)

// What requests may carry; names are the API's.

type addressIn struct {
	PrivateIpAddress string
	Primary          bool
	Description      string
}

type createENIIn struct {
	VpcId                          string
	NetworkInterfaceName           string
	NetworkInterfaceDescription    string
	SubnetId                       string
	PrivateIpAddresses             []addressIn
	SecondaryPrivateIpAddressCount uint64
	SecurityGroupIds               []string
	Tags                           []Tag
	ClientToken                    string
}

type attachENIIn struct {
	NetworkInterfaceId string
	InstanceId         string
	AttachType         uint64
	ClientToken        string
}

type createAttachENIIn struct {
	createENIIn
	InstanceId string
	AttachType uint64
}

type eniIn struct{ NetworkInterfaceId string }

type assignIn struct {
	NetworkInterfaceId             string
	PrivateIpAddresses             []addressIn
	SecondaryPrivateIpAddressCount uint64
	ClientToken                    string
}

type unassignIn struct {
	NetworkInterfaceId string
	PrivateIpAddresses []addressIn
	InstanceId         string
}

// Bounds of the API: see the comments of the requests in tencentcloud-sdk-go.
const (
	maxName          = 60
	maxAddressesCall = 10
	maxIPsUnattached = 30 // an ENI on its own has the quota of the largest instance
)

// none is the answer of an action that answers only with its request's id.
type none struct{}

func (r *Region) createNetworkInterface(id string, in *createENIIn) (any, error) {
	e, err := r.newENI(in)
	if err != nil {
		return nil, err
	}
	r.begin(id, work{
		action: "CreateNetworkInterface", target: []string{e.ID}, takes: r.config.Delays.Task,
		done: func(error) { r.settleENI(e.ID) },
	})
	return struct{ NetworkInterface eniOut }{r.describe(e)}, nil
}

// newENI adds an ENI, PENDING. The caller holds mu.
func (r *Region) newENI(in *createENIIn) (ENI, error) {
	s, err := r.checkENI(in)
	if err != nil {
		return ENI{}, err
	}
	addrs, err := r.pickAddrs(s, in.PrivateIpAddresses, int(in.SecondaryPrivateIpAddressCount), true)
	if err != nil {
		return ENI{}, err
	}
	e := ENI{
		ID: newID("eni-"), Name: in.NetworkInterfaceName, Description: in.NetworkInterfaceDescription,
		Subnet: s.ID, MAC: r.newMAC(), State: pending, SecurityGroups: in.SecurityGroupIds, Tags: in.Tags, Created: time.Now(),
	}
	for i, a := range addrs {
		e.IPs = append(e.IPs, IP{Addr: a, Primary: i == 0, State: pending})
	}
	r.enis.put(e.ID, e)
	return e, nil
}

func (r *Region) checkENI(in *createENIIn) (Subnet, error) {
	s, ok := r.subnet(in.SubnetId)
	switch {
	case in.NetworkInterfaceName == "":
		return s, refuse("MissingParameter", "NetworkInterfaceName is missing")
	case len(in.NetworkInterfaceName) > maxName || len([]rune(in.NetworkInterfaceDescription)) > maxName:
		return s, refuse("InvalidParameterValue.TooLong", "a name or description is longer than %d", maxName)
	case in.VpcId != r.config.VPCID:
		return s, refuse("ResourceNotFound", "VPC %q is not found", in.VpcId)
	case !ok:
		return s, refuse("ResourceNotFound", "subnet %q is not found", in.SubnetId)
	case len(r.enis.all()) >= r.config.MaxENIs:
		return s, refuse("LimitExceeded.NetworkInterfaceLimitExceeded", "the VPC has its %d ENIs", r.config.MaxENIs)
	case len(in.PrivateIpAddresses)+int(min(in.SecondaryPrivateIpAddressCount, 1000)) > maxIPsUnattached:
		return s, refuse("LimitExceeded", "an ENI has at most %d addresses", maxIPsUnattached)
	}
	for _, g := range in.SecurityGroupIds {
		if !slices.Contains(r.config.SecurityGroups, g) {
			return s, refuse("ResourceNotFound", "security group %q is not found", g)
		}
	}
	for i, t := range in.Tags {
		if t.Key == "" || slices.ContainsFunc(in.Tags[:i], func(u Tag) bool { return u.Key == t.Key }) {
			return s, refuse("InvalidParameterValue.TagDuplicateKey", "tag key %q is empty or given twice", t.Key)
		}
	}
	return s, nil
}

// pickAddrs returns the addresses asked for by value, and more free ones; with
// primary, one more, the first, unless one was given. The caller holds mu.
func (r *Region) pickAddrs(s Subnet, given []addressIn, more int, primary bool) ([]netip.Addr, error) {
	if len(given) > maxAddressesCall {
		return nil, refuse("InvalidParameterValue.LimitExceeded", "%d addresses in a call, at most %d are allowed", len(given), maxAddressesCall)
	}
	var first, rest []netip.Addr
	for _, g := range given {
		a, err := netip.ParseAddr(g.PrivateIpAddress)
		switch {
		case err != nil:
			return nil, refuse("InvalidParameterValue.Malformed", "address %q is malformed", g.PrivateIpAddress)
		case slices.Contains(first, a) || slices.Contains(rest, a):
			return nil, refuse("InvalidParameterValue.DuplicatePara", "address %s is given twice", a)
		case g.Primary && (!primary || len(first) > 0):
			return nil, refuse("InvalidParameterValue.Malformed", "address %s cannot be primary", a)
		}
		if err := r.checkAddr(s, a); err != nil {
			return nil, err
		}
		if g.Primary {
			first = append(first, a)
		} else {
			rest = append(rest, a)
		}
	}
	if primary && len(first) == 0 {
		more++
	}
	free, err := r.takeAddrs(s, more+len(rest))
	if err != nil {
		return nil, err
	}
	free = slices.DeleteFunc(free, func(a netip.Addr) bool { return slices.Contains(rest, a) || slices.Contains(first, a) })[:more]
	if primary && len(first) == 0 {
		first, free = free[:1:1], free[1:]
	}
	return slices.Concat(first, rest, free), nil
}

// settleENI makes an ENI and what is PENDING on it AVAILABLE. The caller holds mu.
func (r *Region) settleENI(id string) {
	e, ok := r.enis.get(id)
	if !ok {
		return
	}
	e = e.copy()
	e.State = available
	for _, ips := range [][]IP{e.IPs, e.IP6s} {
		for i := range ips {
			if ips[i].State == pending {
				ips[i].State = available
			}
		}
	}
	r.enis.put(id, e)
}

// idleENI returns an ENI that is AVAILABLE and that no task works on; otherwise
// it refuses with the code. The caller holds mu.
func (r *Region) idleENI(id, busy string) (ENI, error) {
	e, ok := r.enis.get(id)
	switch {
	case !strings.HasPrefix(id, "eni-"):
		return e, refuse("InvalidParameterValue.Malformed", "%q is no id of an ENI", id)
	case !ok:
		return e, refuse("ResourceNotFound", "ENI %s is not found", id)
	case e.State != available:
		return e, refuse("UnsupportedOperation.InvalidState", "ENI %s is %s", id, e.State)
	case r.claimed[id]:
		return e, refuse(busy, "another task works on ENI %s", id)
	}
	return e, nil
}

func (r *Region) attachNetworkInterface(id string, in *attachENIIn) (any, error) {
	e, err := r.idleENI(in.NetworkInterfaceId, "UnsupportedOperation.ResourceIsInvalidState")
	if err != nil {
		return nil, err
	}
	if e.Instance != "" {
		return nil, refuse("UnsupportedOperation.AttachmentAlreadyExists", "ENI %s is attached to %s", e.ID, e.Instance)
	}
	instance, err := r.checkAttach(e, in.InstanceId, in.AttachType)
	if err != nil {
		return nil, err
	}
	e.AttachType = int(in.AttachType)
	r.attach(id, "AttachNetworkInterface", e, instance)
	return none{}, nil
}

// checkAttach says whether an ENI may be attached to an instance. The caller
// holds mu.
func (r *Region) checkAttach(e ENI, instanceID string, attachType uint64) (Instance, error) {
	instance, ok := r.instances.get(instanceID)
	if !ok {
		return instance, refuse("ResourceNotFound", "instance %q is not found", instanceID)
	}
	s, _ := r.subnet(e.Subnet)
	switch {
	case instance.State != running:
		return instance, refuse("UnsupportedOperation.InvalidState", "instance %s is %s", instanceID, instance.State)
	case s.Zone != instance.Zone:
		return instance, refuse("UnsupportedOperation.ZoneMismatch", "ENI %s is in %s, instance %s in %s", e.ID, s.Zone, instanceID, instance.Zone)
	case len(e.SecurityGroups) == 0:
		return instance, refuse("UnsupportedOperation", "ENI %s has no security group", e.ID)
	}
	return instance, r.checkQuota(instance, attachType, max(len(e.IPs), len(e.IP6s)))
}

// extendIPs is how many addresses an extension ENI has: its primary one.
const extendIPs = 1

// checkQuota says whether an instance may have one more ENI with so many addresses.
// Extension ENIs have a quota of their own. The caller holds mu.
func (r *Region) checkQuota(instance Instance, attachType uint64, addresses int) error {
	t := instanceTypes[instance.Type]
	enis, ips := t.ENIs, t.IPs
	switch attachType {
	case 0:
	case tencent.AttachExtension:
		enis, ips = t.extendENIs, extendIPs
	default:
		return refuse("InvalidParameterValue", "AttachType %d is neither 0 nor 1", attachType)
	}
	have := slices.DeleteFunc(r.attachedENIs(instance.ID), func(e ENI) bool { return e.AttachType != int(attachType) })
	switch {
	case len(have) >= enis:
		return refuse("LimitExceeded", "instance %s has its %d ENIs of type %d", instance.ID, enis, attachType)
	case addresses > ips:
		return refuse("LimitExceeded", "the ENI has %d addresses of a family, instance %s allows %d", addresses, instance.ID, ips)
	}
	return nil
}

// attach starts to attach an ENI. The caller holds mu.
func (r *Region) attach(id, action string, e ENI, instance Instance) {
	e = e.copy()
	e.Instance, e.DeviceIndex = instance.ID, 1
	for _, other := range r.attachedENIs(instance.ID) {
		e.DeviceIndex = max(e.DeviceIndex, other.DeviceIndex+1)
	}
	port := e.port(instance.Name)
	e.State = attaching
	r.enis.put(e.ID, e)
	r.begin(id, work{
		action: action, target: []string{e.ID}, takes: r.config.Delays.Attach,
		do: func(ctx context.Context) error {
			if err := r.fabric.Attach(port); err != nil {
				return err
			}
			if err := r.hypervisor.PlugNIC(ctx, instance.ID, NIC{e.ID, port.MAC}); err != nil {
				_ = r.fabric.Detach(e.ID) // the port was ours alone
				return err
			}
			return nil
		},
		done: func(err error) {
			e := e.copy()
			e.Attached = time.Now()
			if err != nil {
				e.Instance, e.DeviceIndex, e.AttachType, e.Attached = "", 0, 0, time.Time{}
			}
			r.enis.put(e.ID, e)
			r.settleENI(e.ID)
		},
	})
}

// attachedENIs lists the ENIs of an instance, those that are being attached or
// detached among them. The caller holds mu.
func (r *Region) attachedENIs(instance string) []ENI {
	return slices.DeleteFunc(r.enis.all(), func(e ENI) bool { return e.Instance != instance })
}

// createAndAttachNetworkInterface takes as long as its two halves: the ENI is PENDING
// and then ATTACHING. One that cannot be attached is left detached.
func (r *Region) createAndAttachNetworkInterface(id string, in *createAttachENIIn) (any, error) {
	if instance, ok := r.instances.get(in.InstanceId); !ok {
		return nil, refuse("ResourceNotFound", "instance %q is not found", in.InstanceId)
	} else if err := r.checkQuota(instance, in.AttachType, 0); err != nil {
		return nil, err
	}
	e, err := r.newENI(&in.createENIIn)
	if err != nil {
		return nil, err
	}
	instance, err := r.checkAttach(e, in.InstanceId, in.AttachType)
	if err != nil {
		r.enis.drop(e.ID)
		return nil, err
	}
	const action = "CreateAndAttachNetworkInterface"
	e.Instance, e.AttachType = instance.ID, int(in.AttachType) // whose place is taken
	r.enis.put(e.ID, e)
	r.begin(id, work{
		action: action, target: []string{e.ID}, takes: r.config.Delays.Task,
		done: func(err error) {
			if err != nil { // it is there nevertheless
				e := e.copy()
				e.Instance, e.AttachType = "", 0
				r.enis.put(e.ID, e)
			}
			r.settleENI(e.ID)
			if e, _ := r.enis.get(e.ID); err == nil {
				r.attach(id, action, e, instance)
			}
		},
	})
	return struct{ NetworkInterface eniOut }{r.describe(e)}, nil
}

func (r *Region) detachNetworkInterface(id string, in *detachENIIn) (any, error) {
	e, err := r.idleENI(in.NetworkInterfaceId, "UnsupportedOperation.InvalidState")
	switch {
	case err != nil:
		return nil, err
	case e.Primary:
		return nil, refuse("UnsupportedOperation", "ENI %s is the primary one of %s", e.ID, e.Instance)
	case e.Instance == "" || e.Instance != in.InstanceId:
		return nil, refuse("UnsupportedOperation.InvalidState", "ENI %s is not attached to instance %q", e.ID, in.InstanceId)
	}
	e = e.copy()
	e.State = detaching
	r.enis.put(e.ID, e)
	r.begin(id, work{
		action: "DetachNetworkInterface", target: []string{e.ID}, takes: r.config.Delays.Attach,
		do: func(ctx context.Context) error {
			if err := r.hypervisor.UnplugNIC(ctx, e.Instance, e.ID); err != nil {
				return err
			}
			return r.fabric.Detach(e.ID)
		},
		done: func(err error) {
			e := e.copy()
			e.State = available
			if err == nil {
				e.Instance, e.DeviceIndex, e.AttachType, e.Attached = "", 0, 0, time.Time{}
			}
			r.enis.put(e.ID, e)
		},
	})
	return none{}, nil
}

type detachENIIn struct{ NetworkInterfaceId, InstanceId, ClientToken string }

func (r *Region) deleteNetworkInterface(id string, in *eniIn) (any, error) {
	e, err := r.idleENI(in.NetworkInterfaceId, "UnsupportedOperation.InvalidState")
	if err != nil {
		return nil, err
	}
	if e.Instance != "" {
		return nil, refuse("ResourceInUse", "ENI %s is attached to %s", e.ID, e.Instance)
	}
	e = e.copy()
	e.State = deleting
	r.enis.put(e.ID, e)
	r.begin(id, work{
		action: "DeleteNetworkInterface", target: []string{e.ID}, takes: r.config.Delays.Task,
		done: func(err error) {
			if err == nil {
				r.enis.drop(e.ID)
				return
			}
			e := e.copy()
			e.State = available
			r.enis.put(e.ID, e)
		},
	})
	return none{}, nil
}
