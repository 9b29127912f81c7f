package tencent

import (
	"fmt"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// APIError is a refusal by the cloud API. Client returns it inside a
// *node.Error, so node.ClassOf and errors.As both see it.
type APIError struct {
	Service   string // vpc
	Action    string // AttachNetworkInterface
	Code      string // UnsupportedOperation.InvalidState
	Message   string
	RequestID string
}

func (e *APIError) Error() string {
	return fmt.Sprintf("%s %s: %s: %s (request %s)", e.Service, e.Action, e.Code, e.Message, e.RequestID)
}

// Codes that a caller branches on.
const (
	CodeAttachmentAlreadyExists = "UnsupportedOperation.AttachmentAlreadyExists"
	CodeAttachmentNotFound      = "UnsupportedOperation.AttachmentNotFound"
	CodeIdempotentProcessing    = "UnsupportedOperation.IdempotentProcessing"
	CodeMutexTaskRunning        = "UnsupportedOperation.MutexOperationTaskRunning"
	CodeNotFound                = "ResourceNotFound"
	CodeSubnetExhausted         = "ResourceInsufficient.Subnet"
	CodeThrottled               = "RequestLimitExceeded"
)

// FixIPv6Subnet is what to do about a subnet without an IPv6 range.
const FixIPv6Subnet = "give the subnet an IPv6 range, write subnets that have one into network.subnetIDs, or leave IPv6 out of network.ipFamilies"

// What to do about a disk that cannot be attached.
const (
	fixNotPortable = "name an elastic disk: this one cannot be attached or detached"
	fixExpired     = "renew the disk in the console, or name another in the NodeConfig"
	fixNotData     = "name a data disk in the NodeConfig"
)

// HasCode reports whether the code is code or a more exact form of it, as
// LimitExceeded.ActionLimited is of LimitExceeded.
func (e *APIError) HasCode(code string) bool {
	return e.Code == code || strings.HasPrefix(e.Code, code+".")
}

// verdict says what codes that start with a prefix mean for the agent.
type verdict struct {
	code   string // the code, or what it starts with before a "."
	class  node.Class
	reason string
	fix    string
}

// verdicts is searched from the top: an exact code stands before the code that
// it refines. A code that is not listed is transient.
// Source: the error codes that tencentcloud-sdk-go lists at each action
// (v20170312/client.go of vpc, cvm and cbs), and the common ones of
// https://cloud.tencent.com/document/api/215/15693
var verdicts = []verdict{
	{"RequestLimitExceeded", node.ClassTransient, "Throttled", ""},
	{"LimitExceeded.ActionLimited", node.ClassTransient, "Throttled", ""},
	{"UnsupportedOperation.MutexOperationTaskRunning", node.ClassWaiting, "TaskRunning", ""},
	{"OperationDenied.MutexTaskRunning", node.ClassWaiting, "TaskRunning", ""},
	{"UnsupportedOperation.IdempotentProcessing", node.ClassWaiting, "TaskRunning", ""},
	// The token is another call's: the intent is taken back, and the next has its own.
	{"UnsupportedOperation.IdempotentParameterMismatch", node.ClassTransient, "TokenReused", ""},
	{"UnsupportedOperation.InvalidState", node.ClassWaiting, "WrongState", ""},
	{"UnsupportedOperation.ResourceIsInvalidState", node.ClassWaiting, "WrongState", ""},
	{"ResourceInsufficient.Subnet", node.ClassWaiting, "SubnetExhausted", "add a subnet to network.subnetIDs, or free addresses of this one"},
	{"ResourceInsufficient", node.ClassWaiting, "ResourceInsufficient", ""},
	// Something else is done to the disk.
	{"ResourceBusy", node.ClassWaiting, "DiskBusy", ""},
	{"InvalidDisk.Busy", node.ClassWaiting, "DiskBusy", ""},
	{"InvalidDisk.SnapshotCreating", node.ClassWaiting, "DiskBusy", ""},
	{"ResourceUnavailable.SnapshotCreating", node.ClassWaiting, "DiskBusy", ""},
	{"ResourceInUse.DiskMigrating", node.ClassWaiting, "DiskBusy", ""},
	{"ResourceInUse.DiskRollbacking", node.ClassWaiting, "DiskBusy", ""},
	{"UnsupportedOperation.StateError", node.ClassWaiting, "DiskBusy", ""},
	{"TradeDealConflict", node.ClassWaiting, "DiskBusy", ""},
	{"LimitExceeded.InstanceAttachedDisk", node.ClassTerminal, "TooManyDisks", "the instance has as many disks as it may have: detach one, or take the disk out of the NodeConfig"},
	{"ResourceUnavailable.ZoneNotMatch", node.ClassTerminal, "DiskZoneMismatch", "name a disk of the instance's zone, or make one there of a snapshot"},
	{"InvalidDisk.NotPortable", node.ClassTerminal, "DiskNotPortable", fixNotPortable},
	{"ResourceUnavailable.NotPortable", node.ClassTerminal, "DiskNotPortable", fixNotPortable},
	{"InvalidDisk.Expire", node.ClassTerminal, "DiskExpired", fixExpired},
	{"ResourceUnavailable.Expire", node.ClassTerminal, "DiskExpired", fixExpired},
	{"InvalidDisk.TypeError", node.ClassTerminal, "NotADataDisk", fixNotData},
	{"ResourceUnavailable.TypeError", node.ClassTerminal, "NotADataDisk", fixNotData},
	{"InvalidDisk.NotSupported", node.ClassTerminal, "Unsupported", ""},
	{"ResourceUnavailable.NotSupported", node.ClassTerminal, "Unsupported", ""},
	{"InvalidInstance.NotSupported", node.ClassTerminal, "Unsupported", ""},
	{"InvalidDiskId", node.ClassTerminal, "DiskUnknown", "correct disks[].diskID in the NodeConfig: the region has no such disk"},
	// What is already so, or no longer there, is seen by the next plan.
	{"UnsupportedOperation.AttachmentAlreadyExists", node.ClassTransient, "AlreadyAttached", ""},
	{"ResourceUnavailable.Attached", node.ClassTransient, "AlreadyAttached", ""},
	{"UnsupportedOperation.AttachmentNotFound", node.ClassTransient, "NotAttached", ""},
	{"ResourceInUse", node.ClassWaiting, "InUse", ""},
	// The credentials have rotated under the request; Client has dropped them.
	{"AuthFailure.TokenFailure", node.ClassTransient, "CredentialsExpired", ""},
	{"AuthFailure.InvalidSecretId", node.ClassTransient, "CredentialsExpired", ""},
	{"AuthFailure.SecretIdNotFound", node.ClassTransient, "CredentialsExpired", ""},
	{"AuthFailure.SignatureExpire", node.ClassWaiting, "ClockSkewed", "the clock of this node differs from the cloud's by more than 5 min: check NTP (timedatectl)"},
	{"AuthFailure", node.ClassTerminal, "Unauthorized", "give the instance's CAM role the policy of tkenode"},
	{"UnauthorizedOperation.AttachmentNotFound", node.ClassTransient, "NotAttached", ""}, // of UnassignIpv6Addresses
	{"UnauthorizedOperation.PrimaryIp", node.ClassTerminal, "Unsupported", ""},
	{"UnauthorizedOperation", node.ClassTerminal, "Unauthorized", "give the instance's CAM role the policy of tkenode"},
	{"LimitExceeded.NetworkInterfaceLimitExceeded", node.ClassTerminal, "QuotaExceeded", "the VPC has as many ENIs as it may have: delete some, or have the quota raised"},
	{"LimitExceeded.TagKeyExceeded", node.ClassTerminal, "TagQuotaExceeded", "the account has as many tags as it may have: delete some, or have the quota raised"},
	{"LimitExceeded.TagKeyPerResourceExceeded", node.ClassTerminal, "TagQuotaExceeded", "an ENI gets more tags than it may have: look for a tag policy that adds some"},
	{"LimitExceeded.TagNotEnoughQuota", node.ClassTerminal, "TagQuotaExceeded", "the account has as many tags as it may have: delete some, or have the quota raised"},
	{"LimitExceeded.TagQuota", node.ClassTerminal, "TagQuotaExceeded", "the account has as many tags as it may have: delete some, or have the quota raised"},
	{"LimitExceeded.TagTagsExceeded", node.ClassTerminal, "TagQuotaExceeded", "an ENI gets more tags than it may have: look for a tag policy that adds some"},
	{"LimitExceeded", node.ClassTerminal, "QuotaExceeded", "raise the quota, or hold fewer in the NodeConfig"},
	{"UnsupportedOperation.UnsupportedInstanceFamily", node.ClassTerminal, "InstanceFamilyUnsupported", "take an instance type whose family can have secondary ENIs"},
	{"UnsupportedOperation.VpcMismatch", node.ClassTerminal, "VPCMismatch", "write subnets of the instance's VPC into network.subnetIDs"},
	{"UnsupportedOperation.ZoneMismatch", node.ClassTerminal, "ZoneMismatch", "write subnets of the instance's zone into network.subnetIDs"},
	{"UnsupportedOperation.InstanceAssociateHavip", node.ClassTerminal, "HAVIPAssociated", "release the HAVIP that is bound to the instance"},
	{"UnsupportedOperation.UnassignCidrBlock", node.ClassTerminal, "IPv6SubnetMissing", FixIPv6Subnet},
	{"UnsupportedOperation", node.ClassTerminal, "Unsupported", ""},
	{"InvalidParameter", node.ClassTerminal, "InvalidRequest", ""},
	{"InvalidParameterValue", node.ClassTerminal, "InvalidRequest", ""},
	{"MissingParameter", node.ClassTerminal, "InvalidRequest", ""},
	{"UnknownParameter", node.ClassTerminal, "InvalidRequest", ""},
	{"InvalidAction", node.ClassTerminal, "InvalidRequest", ""},
	{"InvalidAccount", node.ClassTerminal, "InvalidAccount", "check the account's balance"},
}

func (e *APIError) verdict() verdict {
	for _, v := range verdicts {
		if e.HasCode(v.code) {
			return v
		}
	}
	reason, _, _ := strings.Cut(e.Code, ".")
	return verdict{class: node.ClassTransient, reason: reason}
}

// Class says what to do about the refusal.
func (e *APIError) Class() node.Class { return e.verdict().class }

// classed wraps e with its class, reason and advice.
func (e *APIError) classed() error {
	v := e.verdict()
	return &node.Error{Class: v.class, Reason: v.reason, Fix: v.fix, Err: e}
}
