package tencent

import (
	"errors"
	"fmt"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

func TestAPIErrorClass(t *testing.T) {
	for code, want := range map[string]struct {
		class  node.Class
		reason string
	}{
		"RequestLimitExceeded":                             {node.ClassTransient, "Throttled"},
		"RequestLimitExceeded.UinLimitExceeded":            {node.ClassTransient, "Throttled"},
		"LimitExceeded.ActionLimited":                      {node.ClassTransient, "Throttled"},
		"LimitExceeded":                                    {node.ClassTerminal, "QuotaExceeded"},
		"LimitExceeded.NetworkInterfaceLimitExceeded":      {node.ClassTerminal, "QuotaExceeded"},
		"UnsupportedOperation.InvalidState":                {node.ClassWaiting, "WrongState"},
		"UnsupportedOperation.MutexOperationTaskRunning":   {node.ClassWaiting, "TaskRunning"},
		"UnsupportedOperation.IdempotentProcessing":        {node.ClassWaiting, "TaskRunning"},
		"UnsupportedOperation.AttachmentAlreadyExists":     {node.ClassTransient, "AlreadyAttached"},
		"UnsupportedOperation.AttachmentNotFound":          {node.ClassTransient, "NotAttached"},
		"UnsupportedOperation.IdempotentParameterMismatch": {node.ClassTransient, "TokenReused"},
		"UnsupportedOperation.ResourceIsInvalidState":      {node.ClassWaiting, "WrongState"},
		"UnsupportedOperation.UnsupportedInstanceFamily":   {node.ClassTerminal, "InstanceFamilyUnsupported"},
		"UnsupportedOperation.VpcMismatch":                 {node.ClassTerminal, "VPCMismatch"},
		"UnsupportedOperation.ZoneMismatch":                {node.ClassTerminal, "ZoneMismatch"},
		"UnsupportedOperation.InstanceAssociateHavip":      {node.ClassTerminal, "HAVIPAssociated"},
		"UnsupportedOperation.UnassignCidrBlock":           {node.ClassTerminal, "IPv6SubnetMissing"},
		"UnauthorizedOperation.AttachmentNotFound":         {node.ClassTransient, "NotAttached"},
		"UnsupportedOperation":                             {node.ClassTerminal, "Unsupported"},
		"LimitExceeded.TagKeyExceeded":                     {node.ClassTerminal, "TagQuotaExceeded"},
		"LimitExceeded.TagNotEnoughQuota":                  {node.ClassTerminal, "TagQuotaExceeded"},
		"ResourceInUse":                                    {node.ClassWaiting, "InUse"},
		"ResourceInsufficient":                             {node.ClassWaiting, "ResourceInsufficient"},
		"ResourceInsufficient.Subnet":                      {node.ClassWaiting, "SubnetExhausted"},
		"AuthFailure.SignatureFailure":                     {node.ClassTerminal, "Unauthorized"},
		"AuthFailure.SignatureExpire":                      {node.ClassWaiting, "ClockSkewed"},
		"AuthFailure.TokenFailure":                         {node.ClassTransient, "CredentialsExpired"},
		"UnauthorizedOperation":                            {node.ClassTerminal, "Unauthorized"},
		"InternalError.ModuleError":                        {node.ClassTransient, "InternalError"},
		"ResourceNotFound":                                 {node.ClassTransient, "ResourceNotFound"},
		"ResourceBusy":                                     {node.ClassWaiting, "DiskBusy"},
		"InvalidDisk.Busy":                                 {node.ClassWaiting, "DiskBusy"},
		"ResourceInUse.DiskMigrating":                      {node.ClassWaiting, "DiskBusy"},
		"ResourceInUse.DiskRollbacking":                    {node.ClassWaiting, "DiskBusy"},
		"ResourceUnavailable.SnapshotCreating":             {node.ClassWaiting, "DiskBusy"},
		"ResourceUnavailable.Attached":                     {node.ClassTransient, "AlreadyAttached"},
		"LimitExceeded.InstanceAttachedDisk":               {node.ClassTerminal, "TooManyDisks"},
		"ResourceUnavailable.ZoneNotMatch":                 {node.ClassTerminal, "DiskZoneMismatch"},
		"InvalidDisk.NotPortable":                          {node.ClassTerminal, "DiskNotPortable"},
		"InvalidDisk.Expire":                               {node.ClassTerminal, "DiskExpired"},
		"ResourceUnavailable.TypeError":                    {node.ClassTerminal, "NotADataDisk"},
		"InvalidDisk.NotSupported":                         {node.ClassTerminal, "Unsupported"},
		"InvalidDiskId.NotFound":                           {node.ClassTerminal, "DiskUnknown"},
		"UnsupportedOperation.DetachPod":                   {node.ClassTerminal, "Unsupported"},
		"TradeDealConflict":                                {node.ClassWaiting, "DiskBusy"},
		"SomethingNew":                                     {node.ClassTransient, "SomethingNew"},
	} {
		e := &APIError{Service: "vpc", Action: "X", Code: code}
		err := fmt.Errorf("wrapped: %w", e.classed())
		if got := node.ClassOf(err); got != want.class || e.Class() != want.class {
			t.Errorf("class of %s = %s, want %s", code, got, want.class)
		}
		if got := node.ReasonOf(err, ""); got != want.reason {
			t.Errorf("reason of %s = %s, want %s", code, got, want.reason)
		}
		if fix := e.verdict().fix; want.class == node.ClassTerminal && fix == "" && want.reason != "Unsupported" && want.reason != "InvalidRequest" {
			t.Errorf("%s does not say what to do", code)
		}
		if as, ok := errors.AsType[*APIError](err); !ok || as != e {
			t.Errorf("%s is not to be found in its error", code)
		}
	}
}

func TestHasCode(t *testing.T) {
	e := &APIError{Code: "LimitExceeded.ActionLimited"}
	if !e.HasCode("LimitExceeded") || !e.HasCode("LimitExceeded.ActionLimited") || e.HasCode("Limit") {
		t.Error("HasCode does not go by the dots of a code")
	}
}
