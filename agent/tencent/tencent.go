// Package tencent is the agent's side of Tencent Cloud: the instance metadata
// service, the short-lived credentials of the instance's CAM role, and the few
// actions of the signed cloud API that the agent makes.
//
// It decides nothing: it neither waits for asynchronous tasks nor repeats a
// request that the cloud has refused. It classes every error, so that the
// caller's loop can. It does not use the vendor's SDK: a service's package is
// megabytes of structs with methods that stay linked once reflection is in the
// binary, and signing takes a page (sign.go). The SDK's own client proves, in
// the tests of lab/cloud, that both ends speak its protocol.
package tencent

import _ "embed"

// Policy is the CAM policy document that the instance's role needs: the actions
// that Client calls, and no other. A test holds it to Client's source, and the
// lab's cloud denies everything else.
//
//go:embed policy.json
var Policy []byte

// PolicyObserve is what the role needs where network.allocator is observe: of
// Policy the actions that change nothing.
//
//go:embed policy-observe.json
var PolicyObserve []byte
