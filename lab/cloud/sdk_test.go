package cloud_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	cbs "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/cbs/v20170312"
	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common"
	sdkerrors "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/errors"
	sdkhttp "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/http"
	"github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/common/profile"
	cvm "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/cvm/v20170312"
	vpc "github.com/tencentcloud/tencentcloud-sdk-go/tencentcloud/vpc/v20170312"

	"github.com/tkenode/tkenode/lab/cloud"
)

// everything is a policy for the actions that the agent does not call.
const everything = `{"version":"2.0","statement":[{"effect":"allow","action":"*","resource":"*"}]}`

// sdk drives a region with the vendor's own clients.
type sdk struct {
	*lab
	credential *common.Credential
	vpc        *vpc.Client
	cbs        *cbs.Client
	cvm        *cvm.Client
}

func endpoint(service string) *profile.ClientProfile {
	p := profile.NewClientProfile()
	p.HttpProfile.Endpoint = service + ".internal.tencentcloudapi.com"
	return p
}

func newSDK(t *testing.T, config cloud.Config) *sdk {
	t.Helper()
	config.Policy = []byte(everything)
	return newSDKIn(t, newLab(t, config))
}

func newSDKIn(t *testing.T, l *lab) *sdk {
	t.Helper()
	s := &sdk{lab: l}
	keys, err := s.metadata.Credentials(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.credential = common.NewTokenCredential(keys.SecretID, keys.SecretKey.Reveal(), keys.Token.Reveal())
	var err1, err2, err3 error
	const region = "ap-guangzhou"
	s.vpc, err1 = vpc.NewClient(s.credential, region, endpoint("vpc"))
	s.cbs, err2 = cbs.NewClient(s.credential, region, endpoint("cbs"))
	s.cvm, err3 = cvm.NewClient(s.credential, region, endpoint("cvm"))
	if err1 != nil || err2 != nil || err3 != nil {
		t.Fatal(err1, err2, err3)
	}
	s.vpc.WithHttpTransport(s.wire)
	s.cbs.WithHttpTransport(s.wire)
	s.cvm.WithHttpTransport(s.wire)
	return s
}

// create creates an ENI without attaching it, and returns its id, its state and the task.
func (s *sdk) create(token, name string) (eni, state, task string, err error) {
	q := vpc.NewCreateNetworkInterfaceRequest()
	q.VpcId, q.SubnetId, q.NetworkInterfaceName = common.StringPtr("vpc-lab00001"), common.StringPtr("subnet-pods0001"), &name
	q.SecurityGroupIds, q.ClientToken = common.StringPtrs([]string{"sg-lab00001"}), &token
	q.Tags = []*vpc.Tag{{Key: common.StringPtr("tkenode"), Value: common.StringPtr("cls-lab00001")}}
	a, err := s.vpc.CreateNetworkInterface(q)
	if err != nil {
		return "", "", "", err
	}
	return *a.Response.NetworkInterface.NetworkInterfaceId, *a.Response.NetworkInterface.State, *a.Response.RequestId, nil
}

// requests are the SDK's structs for the parameters of the actions that the
// agent's client calls.
var requests = map[string]any{
	"CreateAndAttachNetworkInterface": vpc.CreateAndAttachNetworkInterfaceRequest{},
	"AttachNetworkInterface":          vpc.AttachNetworkInterfaceRequest{},
	"DetachNetworkInterface":          vpc.DetachNetworkInterfaceRequest{},
	"DeleteNetworkInterface":          vpc.DeleteNetworkInterfaceRequest{},
	"AssignPrivateIpAddresses":        vpc.AssignPrivateIpAddressesRequest{},
	"UnassignPrivateIpAddresses":      vpc.UnassignPrivateIpAddressesRequest{},
	"AssignIpv6Addresses":             vpc.AssignIpv6AddressesRequest{},
	"UnassignIpv6Addresses":           vpc.UnassignIpv6AddressesRequest{},
	"DescribeNetworkInterfaces":       vpc.DescribeNetworkInterfacesRequest{},
	"DescribeNetworkInterfaceLimit":   vpc.DescribeNetworkInterfaceLimitRequest{},
	"DescribeSubnets":                 vpc.DescribeSubnetsRequest{},
	"DescribeVpcTaskResult":           vpc.DescribeVpcTaskResultRequest{},
	"DescribeZones":                   cvm.DescribeZonesRequest{},
	"DescribeDisks":                   cbs.DescribeDisksRequest{},
	"DescribeInstancesDiskNum":        cbs.DescribeInstancesDiskNumRequest{},
	"DescribeInstances":               cvm.DescribeInstancesRequest{},
}

// answers are the SDK's structs for what each action answers.
var answers = map[string]any{
	"CreateNetworkInterface":          vpc.CreateNetworkInterfaceResponse{},
	"AttachNetworkInterface":          vpc.AttachNetworkInterfaceResponse{},
	"CreateAndAttachNetworkInterface": vpc.CreateAndAttachNetworkInterfaceResponse{},
	"DetachNetworkInterface":          vpc.DetachNetworkInterfaceResponse{},
	"DeleteNetworkInterface":          vpc.DeleteNetworkInterfaceResponse{},
	"AssignPrivateIpAddresses":        vpc.AssignPrivateIpAddressesResponse{},
	"UnassignPrivateIpAddresses":      vpc.UnassignPrivateIpAddressesResponse{},
	"AssignIpv6Addresses":             vpc.AssignIpv6AddressesResponse{},
	"UnassignIpv6Addresses":           vpc.UnassignIpv6AddressesResponse{},
	"DescribeNetworkInterfaces":       vpc.DescribeNetworkInterfacesResponse{},
	"DescribeNetworkInterfaceLimit":   vpc.DescribeNetworkInterfaceLimitResponse{},
	"DescribeSubnets":                 vpc.DescribeSubnetsResponse{},
	"DescribeVpcTaskResult":           vpc.DescribeVpcTaskResultResponse{},
	"DescribeDisks":                   cbs.DescribeDisksResponse{},
	"AttachDisks":                     cbs.AttachDisksResponse{},
	"DetachDisks":                     cbs.DetachDisksResponse{},
	"CreateDisks":                     cbs.CreateDisksResponse{},
	"ResizeDisk":                      cbs.ResizeDiskResponse{},
	"DescribeInstancesDiskNum":        cbs.DescribeInstancesDiskNumResponse{},
	"DescribeInstances":               cvm.DescribeInstancesResponse{},
	"DescribeZones":                   cvm.DescribeZonesResponse{},
}

// checkFields holds a request of the agent's client, and the answer to any, to the
// fields that the SDK's structs have.
func checkFields(t *testing.T, req *http.Request, params, answer []byte) {
	t.Helper()
	action := req.Header.Get("X-TC-Action")
	var asked map[string]any
	if strings.HasPrefix(req.UserAgent(), "tkenode") {
		if err := json.Unmarshal(params, &asked); err != nil || requests[action] == nil {
			t.Errorf("%s is asked with %s: %v", action, params, err)
			return
		}
		for _, unknown := range unknownFields("", asked, reflect.TypeOf(requests[action])) {
			t.Errorf("%s is asked with the field %s, which the SDK does not have", action, unknown)
		}
	}
	var got struct{ Response map[string]any }
	if err := json.Unmarshal(answer, &got); err != nil {
		t.Errorf("%s answers %s: %v", action, answer, err)
		return
	}
	if got.Response["Error"] != nil {
		return // the SDK's error struct is checked by what it decodes
	}
	if answers[action] == nil {
		t.Errorf("%s has no struct to be held to", action)
		return
	}
	for _, unknown := range unknownFields("", map[string]any{"Response": got.Response}, reflect.TypeOf(answers[action])) {
		t.Errorf("%s answers the field %s, which the SDK does not have", action, unknown)
	}
}

func unknownFields(path string, v any, typ reflect.Type) (unknown []string) {
	for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
		typ = typ.Elem()
	}
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			unknown = append(unknown, unknownFields(path, e, typ)...)
		}
	case map[string]any:
		if typ.Kind() != reflect.Struct {
			return []string{path + " (an object)"}
		}
		fields := map[string]reflect.Type{}
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			fields[name] = f.Type
		}
		for k, e := range v {
			if fields[k] == nil {
				unknown = append(unknown, path+"."+k)
				continue
			}
			unknown = append(unknown, unknownFields(path+"."+k, e, fields[k])...)
		}
	}
	return unknown
}

func TestUnknownFieldsAreFound(t *testing.T) {
	got := unknownFields("", map[string]any{"Response": map[string]any{
		"NetworkInterfaceSet": []any{map[string]any{"NetworkInterfaceId": "x", "Invented": 1.0}},
	}}, reflect.TypeOf(vpc.DescribeNetworkInterfacesResponse{}))
	if len(got) != 1 || got[0] != ".Response.NetworkInterfaceSet.Invented" {
		t.Errorf("unknown fields %v", got)
	}
}

func must[T any](t *testing.T, v T, err error) T {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func sdkCode(err error) string {
	if e, ok := errors.AsType[*sdkerrors.TencentCloudSDKError](err); ok {
		return e.Code
	}
	return ""
}

// TestSDKENI calls every ENI action with the SDK.
func TestSDKENI(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSDK(t, instant())
		str, num := common.StringPtr, common.Uint64Ptr
		done := func(task *string) {
			t.Helper()
			synctest.Wait()
			q := vpc.NewDescribeVpcTaskResultRequest()
			q.TaskId = task
			a, err := s.vpc.DescribeVpcTaskResult(q)
			if err != nil || *a.Response.Status != "SUCCESS" {
				t.Fatalf("task %s: %+v, %v", *task, a, err)
			}
		}
		create := vpc.NewCreateNetworkInterfaceRequest()
		create.VpcId, create.SubnetId, create.NetworkInterfaceName = str("vpc-lab00001"), str("subnet-pods0001"), str("eni")
		create.SecurityGroupIds, create.SecondaryPrivateIpAddressCount = common.StringPtrs([]string{"sg-lab00001"}), num(2)
		create.PrivateIpAddresses = []*vpc.PrivateIpAddressSpecification{{PrivateIpAddress: str("10.0.16.9"), Primary: common.BoolPtr(true)}}
		create.Tags = []*vpc.Tag{{Key: str("k"), Value: str("v")}}
		made, err := s.vpc.CreateNetworkInterface(create)
		eni := must(t, made, err).Response.NetworkInterface
		if len(eni.PrivateIpAddressSet) != 3 || *eni.PrivateIpAddressSet[0].PrivateIpAddress != "10.0.16.9" || *eni.TagSet[0].Value != "v" {
			t.Errorf("created %s", made.ToJsonString())
		}
		done(made.Response.RequestId)
		create.SubnetId = str("subnet-00000000")
		if _, err = s.vpc.CreateNetworkInterface(create); sdkCode(err) != "ResourceNotFound" {
			t.Errorf("created in no subnet: %v", err)
		}
		create.SubnetId = str("subnet-pods0001")

		attach := vpc.NewAttachNetworkInterfaceRequest()
		attach.NetworkInterfaceId, attach.InstanceId = eni.NetworkInterfaceId, str(s.instance.ID)
		a1, err := s.vpc.AttachNetworkInterface(attach)
		done(must(t, a1, err).Response.RequestId)

		assign := vpc.NewAssignPrivateIpAddressesRequest()
		assign.NetworkInterfaceId = eni.NetworkInterfaceId
		assign.PrivateIpAddresses = []*vpc.PrivateIpAddressSpecification{{PrivateIpAddress: str("10.0.16.77")}}
		a2, err := s.vpc.AssignPrivateIpAddresses(assign)
		done(must(t, a2, err).Response.RequestId)

		describe := vpc.NewDescribeNetworkInterfacesRequest()
		describe.Filters = []*vpc.Filter{{Name: str("address-ip"), Values: common.StringPtrs([]string{"10.0.16.77"})}, {Name: str("tag:k"), Values: common.StringPtrs([]string{"v"})}}
		a3, err := s.vpc.DescribeNetworkInterfaces(describe)
		if must(t, a3, err); *a3.Response.TotalCount != 1 || len(a3.Response.NetworkInterfaceSet[0].PrivateIpAddressSet) != 4 {
			t.Errorf("described %s", a3.ToJsonString())
		}
		describe.Filters[0].Name = str("colour")
		if _, err = s.vpc.DescribeNetworkInterfaces(describe); sdkCode(err) != "InvalidParameter.FilterInvalidKey" {
			t.Errorf("unknown filter: %v", err)
		}

		unassign := vpc.NewUnassignPrivateIpAddressesRequest()
		unassign.NetworkInterfaceId, unassign.PrivateIpAddresses = eni.NetworkInterfaceId, assign.PrivateIpAddresses
		a4, err := s.vpc.UnassignPrivateIpAddresses(unassign)
		done(must(t, a4, err).Response.RequestId)

		detach := vpc.NewDetachNetworkInterfaceRequest()
		detach.NetworkInterfaceId, detach.InstanceId = eni.NetworkInterfaceId, str(s.instance.ID)
		a5, err := s.vpc.DetachNetworkInterface(detach)
		done(must(t, a5, err).Response.RequestId)

		remove := vpc.NewDeleteNetworkInterfaceRequest()
		remove.NetworkInterfaceId = eni.NetworkInterfaceId
		a6, err := s.vpc.DeleteNetworkInterface(remove)
		done(must(t, a6, err).Response.RequestId)

		both := vpc.NewCreateAndAttachNetworkInterfaceRequest()
		both.VpcId, both.SubnetId, both.NetworkInterfaceName = create.VpcId, create.SubnetId, create.NetworkInterfaceName
		both.SecurityGroupIds, both.InstanceId = create.SecurityGroupIds, str(s.instance.ID)
		a7, err := s.vpc.CreateAndAttachNetworkInterface(both)
		done(must(t, a7, err).Response.RequestId)
		if id := *a7.Response.NetworkInterface.NetworkInterfaceId; s.machines.holds(id) != s.instance.ID {
			t.Errorf("ENI %s is not plugged", id)
		}

		limit := vpc.NewDescribeNetworkInterfaceLimitRequest()
		limit.InstanceId = a7.Response.NetworkInterface.NetworkInterfaceId
		a8, err := s.vpc.DescribeNetworkInterfaceLimit(limit)
		if must(t, a8, err); *a8.Response.EniQuantity != 4 || *a8.Response.ExtendEniQuantity != 10 {
			t.Errorf("limit %s", a8.ToJsonString())
		}
		subnets := vpc.NewDescribeSubnetsRequest()
		subnets.Filters = []*vpc.Filter{{Name: str("zone"), Values: common.StringPtrs([]string{"ap-guangzhou-3"})}}
		subnets.Offset, subnets.Limit = str("1"), str("1")
		a9, err := s.vpc.DescribeSubnets(subnets)
		if must(t, a9, err); *a9.Response.TotalCount != 2 || len(a9.Response.SubnetSet) != 1 || *a9.Response.SubnetSet[0].CidrBlock != "10.0.16.0/20" {
			t.Errorf("subnets %s", a9.ToJsonString())
		}
	})
}

func TestSDKDisks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSDK(t, cloud.Default())
		time.Sleep(10 * time.Second) // the launch is visible
		str := common.StringPtr
		state := func(id string) string {
			q := cbs.NewDescribeDisksRequest()
			q.DiskIds = common.StringPtrs([]string{id})
			a, err := s.cbs.DescribeDisks(q)
			if must(t, a, err); *a.Response.TotalCount == 0 {
				return "none"
			}
			return *a.Response.DiskSet[0].DiskState
		}
		create := cbs.NewCreateDisksRequest()
		create.Placement = &cbs.Placement{Zone: str("ap-guangzhou-3")}
		create.DiskChargeType, create.DiskType, create.DiskSize = str("POSTPAID_BY_HOUR"), str("CLOUD_PREMIUM"), common.Uint64Ptr(20)
		create.ClientToken = str("one")
		a1, err := s.cbs.CreateDisks(create)
		id := *must(t, a1, err).Response.DiskIdSet[0]
		if a, err := s.cbs.CreateDisks(create); err != nil || *a.Response.DiskIdSet[0] != id {
			t.Errorf("same token: %v, %v", a, err)
		}
		if got := state(id); got != "none" {
			t.Errorf("disk is %s at once", got)
		}
		time.Sleep(3 * time.Second)
		if got := state(id); got != "UNATTACHED" {
			t.Errorf("disk is %s after 3 s", got)
		}

		attach := cbs.NewAttachDisksRequest()
		attach.InstanceId, attach.DiskIds = str(s.instance.ID), common.StringPtrs([]string{id})
		if _, err := s.cbs.AttachDisks(attach); err != nil {
			t.Fatal(err)
		}
		if _, err := s.cbs.AttachDisks(attach); sdkCode(err) != "ResourceBusy" {
			t.Errorf("attach while attaching: %v", err)
		}
		time.Sleep(3100 * time.Millisecond)
		if got := state(id); got != "ATTACHING" || s.machines.holds(id) != s.instance.ID {
			t.Errorf("disk is %s after 3.1 s, in %q", got, s.machines.holds(id))
		}
		time.Sleep(2 * time.Second)
		if got := state(id); got != "ATTACHED" {
			t.Errorf("disk is %s after 5.1 s", got)
		}
		if _, err := s.cbs.AttachDisks(attach); sdkCode(err) != "ResourceUnavailable.Attached" {
			t.Errorf("attach again: %v", err)
		}

		detach := cbs.NewDetachDisksRequest()
		detach.DiskIds, detach.InstanceId = attach.DiskIds, str("ins-00000000")
		if _, err := s.cbs.DetachDisks(detach); sdkCode(err) != "InvalidParameterValue" {
			t.Errorf("detach from another instance: %v", err)
		}
		detach.InstanceId = attach.InstanceId
		if _, err := s.cbs.DetachDisks(detach); err != nil {
			t.Fatal(err)
		}
		time.Sleep(6 * time.Second)
		if got := state(id); got != "UNATTACHED" || s.machines.holds(id) != "" {
			t.Errorf("disk is %s after the detach, in %q", got, s.machines.holds(id))
		}
		if _, err := s.cbs.DetachDisks(detach); sdkCode(err) != "InvalidDisk.NotSupported" {
			t.Errorf("detach again: %v", err)
		}

		q := cbs.NewDescribeDisksRequest()
		q.Filters = []*cbs.Filter{{Name: str("instance-id"), Values: common.StringPtrs([]string{s.instance.ID})}}
		a2, err := s.cbs.DescribeDisks(q)
		disks := must(t, a2, err).Response.DiskSet
		if len(disks) != 2 || *disks[0].DiskUsage == *disks[1].DiskUsage || *disks[0].LastAttachInsId != s.instance.ID {
			t.Errorf("the instance's disks: %s", a2.ToJsonString())
		}
	})
}

func TestSDKResizeDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSDK(t, cloud.Default())
		time.Sleep(10 * time.Second) // the launch is visible
		disk := func() *cbs.Disk {
			q := cbs.NewDescribeDisksRequest()
			q.Filters = []*cbs.Filter{{Name: common.StringPtr("disk-usage"), Values: common.StringPtrs([]string{"DATA_DISK"})}}
			a, err := s.cbs.DescribeDisks(q)
			return must(t, a, err).Response.DiskSet[0]
		}
		q := cbs.NewResizeDiskRequest()
		q.DiskId, q.DiskSize = disk().DiskId, common.Uint64Ptr(20)
		if _, err := s.cbs.ResizeDisk(q); sdkCode(err) != "InvalidParameterValue" {
			t.Errorf("as large as it is: %v", err)
		}
		*q.DiskSize = 40
		if _, err := s.cbs.ResizeDisk(q); err != nil {
			t.Fatal(err)
		}
		if _, err := s.cbs.ResizeDisk(q); sdkCode(err) != "ResourceBusy" {
			t.Errorf("again at once: %v", err)
		}
		time.Sleep(2100 * time.Millisecond)
		if d := disk(); *d.DiskState != "EXPANDING" || *d.DiskSize != 20 {
			t.Errorf("after 2.1 s it is %s with %d GiB", *d.DiskState, *d.DiskSize)
		}
		time.Sleep(time.Second)
		if d := disk(); *d.DiskState != "ATTACHED" || *d.DiskSize != 40 || *d.InstanceId != s.instance.ID || *d.Encrypt {
			t.Errorf("after 3.1 s it is %s with %d GiB", *d.DiskState, *d.DiskSize)
		}

		n := cbs.NewDescribeInstancesDiskNumRequest()
		n.InstanceIds = common.StringPtrs([]string{s.instance.ID})
		a, err := s.cbs.DescribeInstancesDiskNum(n)
		if d := must(t, a, err).Response.AttachDetail; len(d) != 1 || *d[0].InstanceId != s.instance.ID || *d[0].AttachedDiskCount != 1 || *d[0].MaxAttachCount != 20 {
			t.Errorf("disks of the instance: %s", a.ToJsonString())
		}
		if ours, err := s.api.CountDisks(t.Context(), s.instance.ID); err != nil || ours.Attached != 1 || ours.Max != 20 {
			t.Errorf("as the agent has it: %+v, %v", ours, err)
		}
		if _, err := s.api.CountDisks(t.Context(), "ins-00000000"); err == nil {
			t.Error("another's instance was counted")
		}
	})
}

func TestSDKInstances(t *testing.T) {
	s := newSDK(t, instant())
	q := cvm.NewDescribeInstancesRequest()
	q.Filters = []*cvm.Filter{{Name: common.StringPtr("private-ip-address"), Values: common.StringPtrs([]string{"10.0.0.30"})}}
	a, err := s.cvm.DescribeInstances(q)
	if must(t, a, err); *a.Response.TotalCount != 1 || *a.Response.InstanceSet[0].InstanceId != s.instance.ID || len(a.Response.InstanceSet[0].DataDisks) != 1 {
		t.Errorf("instances %s", a.ToJsonString())
	}
	z, err := s.cvm.DescribeZones(cvm.NewDescribeZonesRequest())
	if must(t, z, err); *z.Response.ZoneSet[0].ZoneId != "100003" {
		t.Errorf("zones %s", z.ToJsonString())
	}
}

// TestSDKSignatures: the SDK's signature is right, and a wrong key, an expired
// token and a parameter that no SDK has are refused with the codes it decodes.
func TestSDKSignatures(t *testing.T) {
	s := newSDK(t, instant())
	zones := cvm.NewDescribeZonesRequest()
	if _, err := s.cvm.DescribeZones(zones); err != nil {
		t.Fatal(err)
	}
	key := s.credential.SecretKey
	s.credential.SecretKey = "wrong"
	if _, err := s.cvm.DescribeZones(zones); sdkCode(err) != "AuthFailure.SignatureFailure" {
		t.Errorf("wrong key: %v", err)
	}
	s.credential.SecretKey = key

	q := sdkhttp.NewCommonRequest("vpc", "2017-03-12", "DescribeSubnets")
	if err := q.SetActionParameters(map[string]any{"SubnetIDs": []string{"subnet-pods0001"}, "Colour": "red"}); err != nil {
		t.Fatal(err)
	}
	q.SetDomain("vpc.internal.tencentcloudapi.com")
	client := common.NewCommonClient(s.credential, "ap-guangzhou", endpoint("vpc"))
	client.WithHttpTransport(s.wire)
	if err := client.Send(q, sdkhttp.NewCommonResponse()); sdkCode(err) != "UnknownParameter" {
		t.Errorf("unknown parameter: %v", err)
	}
	s.ExpireCredentials()
	if _, err := s.cvm.DescribeZones(zones); sdkCode(err) != "AuthFailure.TokenFailure" {
		t.Errorf("expired token: %v", err)
	}
}
