package tencent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// States of an ENI and of an address on it. An ENI that is attached is AVAILABLE
// and has an Attachment; NetworkInterfaceState, the newer field beside State, calls
// it INUSE.
const (
	StatePending   = "PENDING"
	StateAvailable = "AVAILABLE"
	StateAttaching = "ATTACHING"
	StateDetaching = "DETACHING"
	StateDeleting  = "DELETING"
	StateMigrating = "MIGRATING" // of an address only
	stateInUse     = "INUSE"
)

// ENI is an elastic network interface as the API describes it.
type ENI struct {
	ID             string      `json:"NetworkInterfaceId"`
	Name           string      `json:"NetworkInterfaceName"`
	VPCID          string      `json:"VpcId"`
	SubnetID       string      `json:"SubnetId"`
	SecurityGroups []string    `json:"GroupSet"`
	Primary        bool        `json:"Primary"`
	MAC            string      `json:"MacAddress"` // lower case
	State          string      `json:"State"`
	NewState       string      `json:"NetworkInterfaceState,omitempty"`
	IPs            []IP        `json:"PrivateIpAddressSet"`
	IP6s           []IP6       `json:"Ipv6AddressSet"`
	Attachment     *Attachment `json:"Attachment"`
	AttachType     int         `json:"AttachType,omitempty"` // 1: against the quota of extension ENIs
	Tags           []Tag       `json:"TagSet"`
	CreatedTime    string      `json:"CreatedTime"`
}

// plain makes the ENI's MAC what the kernel calls it, and of its two states one.
func (e ENI) plain() ENI {
	e.MAC = strings.ToLower(e.MAC)
	e.State = cmp.Or(e.State, e.NewState)
	if e.State == stateInUse {
		e.State = StateAvailable
	}
	e.NewState = ""
	return e
}

// AttachedTo reports whether the ENI is attached to the instance, for good: not
// while it is being attached or detached.
func (e ENI) AttachedTo(instanceID string) bool {
	return e.State == StateAvailable && e.Attachment != nil && e.Attachment.InstanceID == instanceID
}

// IP is an address of an ENI. It may be used only while it is AVAILABLE.
type IP struct {
	Addr    netip.Addr `json:"PrivateIpAddress"`
	Primary bool       `json:"Primary"`
	State   string     `json:"State,omitempty"`
}

// IP6 is an IPv6 address of an ENI. None is primary so far: the API has it that an
// ENI's are all secondary.
type IP6 struct {
	Addr    netip.Addr `json:"Address"`
	Primary bool       `json:"Primary"`
	State   string     `json:"State,omitempty"`
}

// Attachment says which instance an ENI is attached to.
type Attachment struct {
	InstanceID  string `json:"InstanceId"`
	DeviceIndex int    `json:"DeviceIndex"`
	AttachTime  string `json:"AttachTime"`
}

// Tag is a tag of a resource.
type Tag struct {
	Key   string `json:"Key"`
	Value string `json:"Value"`
}

// ENISpec says what ENI to create, and which instance to attach it to. ClientToken
// makes the call idempotent: the same token and spec get the same ENI.
type ENISpec struct {
	VPCID            string   `json:"VpcId"`
	SubnetID         string   `json:"SubnetId"`
	Name             string   `json:"NetworkInterfaceName"`                  // at most 60 bytes
	Description      string   `json:"NetworkInterfaceDescription,omitempty"` // at most 60 characters
	SecondaryIPs     int      `json:"SecondaryPrivateIpAddressCount,omitempty"`
	SecurityGroupIDs []string `json:"SecurityGroupIds"`
	Tags             []Tag    `json:"Tags,omitempty"`
	InstanceID       string   `json:"InstanceId"`
	AttachType       int      `json:"AttachType,omitempty"` // AttachExtension, or 0
	ClientToken      string   `json:"ClientToken"`          // at most 64 ASCII characters
}

// AttachExtension is the type of attachment of an ENI that counts against the
// instance's quota of extension ENIs, and not against that of standard ones.
// Source: tencentcloud-sdk-go, vpc/v20170312, AttachNetworkInterfaceRequest
const AttachExtension = 1

// ENILimit says how many ENIs, the primary one included, an instance may have,
// and how many addresses, the primary one included, each of them; and how many
// extension ENIs beside them: 0 where the instance type has none.
type ENILimit struct {
	ENIs       int `json:"EniQuantity"`
	IPsPerENI  int `json:"EniPrivateIpAddressQuantity"`
	ExtendENIs int `json:"ExtendEniQuantity,omitempty"`
}

// Subnet is a subnet of the VPC.
type Subnet struct {
	ID           string       `json:"SubnetId"`
	VPCID        string       `json:"VpcId"`
	CIDR         netip.Prefix `json:"CidrBlock"`
	CIDR6        netip.Prefix `json:"Ipv6CidrBlock"` // invalid: none
	Zone         string       `json:"Zone"`
	AvailableIPs int          `json:"AvailableIpAddressCount"`
}

// States of a task.
const (
	TaskRunning = "RUNNING"
	TaskSuccess = "SUCCESS"
	TaskFailed  = "FAILED"
)

// Task is the state of an asynchronous call.
type Task struct {
	Status string `json:"Status"`
	Output string `json:"Output"` // why it failed
}

// filter narrows a Describe call.
type filter struct {
	Name   string
	Values []string
}

// answer is what a call that starts a task returns: its request id is the task's.
type answer struct{ RequestId string }

// DescribeENIs lists the ENIs of an instance: attached, being attached or being
// detached.
func (c *Client) DescribeENIs(ctx context.Context, instanceID string) ([]ENI, error) {
	return c.describeENIs(ctx, []filter{{"attachment.instance-id", []string{instanceID}}})
}

// DescribeTaggedENIs lists the ENIs that carry every one of the tags, attached or
// not.
func (c *Client) DescribeTaggedENIs(ctx context.Context, tags map[string]string) ([]ENI, error) {
	var filters []filter
	for _, k := range slices.Sorted(maps.Keys(tags)) {
		filters = append(filters, filter{"tag:" + k, []string{tags[k]}})
	}
	return c.describeENIs(ctx, filters)
}

func (c *Client) describeENIs(ctx context.Context, filters []filter) ([]ENI, error) {
	const pageSize, maxPages = 100, 50
	var all []ENI
	for range maxPages {
		in := struct {
			Filters       []filter
			Offset, Limit int
		}{filters, len(all), pageSize}
		var out struct {
			NetworkInterfaceSet []ENI
			TotalCount          int
		}
		if err := c.call(ctx, "vpc", "DescribeNetworkInterfaces", in, &out); err != nil {
			return nil, err
		}
		for _, e := range out.NetworkInterfaceSet {
			all = append(all, e.plain())
		}
		if len(out.NetworkInterfaceSet) == 0 || len(all) >= out.TotalCount {
			return all, nil
		}
	}
	return nil, fmt.Errorf("vpc DescribeNetworkInterfaces: more than %d ENIs", pageSize*maxPages)
}

// CreateENI starts to create an ENI and to attach it, and returns it, PENDING, with
// the task. It is one call for both: the cloud shows what it has done seconds late,
// and who creates first has to wait for that twice. Where only the second half fails,
// the ENI is there, detached.
func (c *Client) CreateENI(ctx context.Context, spec ENISpec) (ENI, string, error) {
	var out struct {
		answer
		NetworkInterface ENI
	}
	err := c.call(ctx, "vpc", "CreateAndAttachNetworkInterface", spec, &out)
	return out.NetworkInterface.plain(), out.RequestId, err
}

// AttachENI starts to attach an ENI to an instance, as AttachExtension or 0, and
// returns the task.
func (c *Client) AttachENI(ctx context.Context, eniID, instanceID string, attachType int, clientToken string) (string, error) {
	in := struct {
		NetworkInterfaceId, InstanceId string
		AttachType                     int `json:",omitempty"`
		ClientToken                    string
	}{eniID, instanceID, attachType, clientToken}
	var out answer
	err := c.call(ctx, "vpc", "AttachNetworkInterface", in, &out)
	return out.RequestId, err
}

// DetachENI starts to detach an ENI from an instance and returns the task.
func (c *Client) DetachENI(ctx context.Context, eniID, instanceID, clientToken string) (string, error) {
	in := struct{ NetworkInterfaceId, InstanceId, ClientToken string }{eniID, instanceID, clientToken}
	var out answer
	err := c.call(ctx, "vpc", "DetachNetworkInterface", in, &out)
	return out.RequestId, err
}

// DeleteENI starts to delete an ENI that is detached, with its addresses, and
// returns the task. The API has no ClientToken here.
func (c *Client) DeleteENI(ctx context.Context, eniID string) (string, error) {
	in := struct{ NetworkInterfaceId string }{eniID}
	var out answer
	err := c.call(ctx, "vpc", "DeleteNetworkInterface", in, &out)
	return out.RequestId, err
}

// AssignIPs assigns n more secondary addresses to an ENI, at most 10 a call, and
// returns them, PENDING, with the task that makes them AVAILABLE.
func (c *Client) AssignIPs(ctx context.Context, eniID string, n int, clientToken string) ([]IP, string, error) {
	in := struct {
		NetworkInterfaceId             string
		SecondaryPrivateIpAddressCount int
		ClientToken                    string
	}{eniID, n, clientToken}
	var out struct {
		answer
		PrivateIpAddressSet []IP
	}
	err := c.call(ctx, "vpc", "AssignPrivateIpAddresses", in, &out)
	return out.PrivateIpAddressSet, out.RequestId, err
}

// UnassignIPs starts to take secondary addresses, at most 10 a call, from an ENI
// and returns the task. The API has no ClientToken here.
func (c *Client) UnassignIPs(ctx context.Context, eniID string, addrs []netip.Addr) (string, error) {
	type ip struct{ PrivateIpAddress netip.Addr }
	in := struct {
		NetworkInterfaceId string
		PrivateIpAddresses []ip
	}{NetworkInterfaceId: eniID}
	for _, a := range addrs {
		in.PrivateIpAddresses = append(in.PrivateIpAddresses, ip{a})
	}
	var out answer
	err := c.call(ctx, "vpc", "UnassignPrivateIpAddresses", in, &out)
	return out.RequestId, err
}

// AssignIP6s assigns n IPv6 addresses to an ENI, at most 10 a call, and returns them,
// PENDING, with the task that makes them AVAILABLE.
func (c *Client) AssignIP6s(ctx context.Context, eniID string, n int, clientToken string) ([]IP6, string, error) {
	in := struct {
		NetworkInterfaceId string
		Ipv6AddressCount   int
		ClientToken        string
	}{eniID, n, clientToken}
	var out struct {
		answer
		Ipv6AddressSet []IP6
	}
	err := c.call(ctx, "vpc", "AssignIpv6Addresses", in, &out)
	return out.Ipv6AddressSet, out.RequestId, err
}

// UnassignIP6s starts to take IPv6 addresses, at most 10 a call, from an ENI and
// returns the task. The API has no ClientToken here.
func (c *Client) UnassignIP6s(ctx context.Context, eniID string, addrs []netip.Addr) (string, error) {
	type ip struct{ Address netip.Addr }
	in := struct {
		NetworkInterfaceId string
		Ipv6Addresses      []ip
	}{NetworkInterfaceId: eniID}
	for _, a := range addrs {
		in.Ipv6Addresses = append(in.Ipv6Addresses, ip{a})
	}
	var out answer
	err := c.call(ctx, "vpc", "UnassignIpv6Addresses", in, &out)
	return out.RequestId, err
}

// ENILimit returns an instance's quota of ENIs and of addresses.
func (c *Client) ENILimit(ctx context.Context, instanceID string) (ENILimit, error) {
	in := struct{ InstanceId string }{instanceID}
	var out ENILimit
	err := c.call(ctx, "vpc", "DescribeNetworkInterfaceLimit", in, &out)
	return out, err
}

// TaskResult returns the state of a task.
func (c *Client) TaskResult(ctx context.Context, taskID string) (Task, error) {
	in := struct{ TaskId string }{taskID}
	var out Task
	err := c.call(ctx, "vpc", "DescribeVpcTaskResult", in, &out)
	return out, err
}

// DescribeSubnets returns subnets by id.
func (c *Client) DescribeSubnets(ctx context.Context, ids []string) ([]Subnet, error) {
	in := struct{ SubnetIds []string }{ids}
	var out struct{ SubnetSet []Subnet }
	err := c.call(ctx, "vpc", "DescribeSubnets", in, &out)
	return out.SubnetSet, err
}
