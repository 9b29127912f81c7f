// Package cni is what the CNI plugin and the agent say to each other: one JSON
// request and one JSON response over a unix stream socket, then the connection
// is closed. It is linked into the plugin, so it is small, and it knows nothing
// of how an answer comes about.
package cni

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
)

const (
	// Socket is where the agent listens. systemd holds it, so that a call waits
	// for an agent that restarts.
	Socket = "/run/tkenode/cni.sock"
	// ConfiguredFile exists from the first time that the node's network was
	// configured since it booted. STATUS asks for nothing else, so that neither
	// an agent that restarts nor an empty pool makes the node NotReady.
	ConfiguredFile = "/run/tkenode/network-configured"
	// Network is the name of the one network, and of the plugin.
	Network = "tke-eni"

	// MaxRequest bounds a request: a GC lists every attachment of a node, some
	// 120 bytes each.
	MaxRequest = 1 << 20
	// MaxResponse bounds a response.
	MaxResponse = 64 << 10
)

// Error codes of CNI, and ours from 100 on. docs/cni.md says what to do about each.
// Source: https://github.com/containernetworking/cni/blob/main/SPEC.md#error
const (
	CodeIncompatibleVersion = 1
	CodeInvalidEnvironment  = 4
	CodeIO                  = 5
	CodeDecode              = 6
	CodeInvalidConfig       = 7
	CodeTryAgain            = 11  // ADD: no free address
	CodeNotAvailable        = 50  // STATUS: the plugin cannot serve an ADD
	CodeNetwork             = 100 // the kernel refused what was asked of it
	CodeDrift               = 101 // CHECK: the pod's network is not as ADD left it
	CodeNoAgent             = 102 // nobody answers on the socket
	CodeLedger              = 103 // the ledger cannot be read or written
	CodeRefused             = 104 // ADD: the NodeConfig does not permit what the pod asks for
)

// The annotations of TKE by which a pod asks for an ENI of its own, and for its
// security groups, with commas between.
// Sources: https://cloud.tencent.com/document/product/457/50360 and
// https://cloud.tencent.com/document/product/457/80587
const (
	AnnotationNetwork = "tke.cloud.tencent.com/networks"
	AnnotationGroups  = "tke.cloud.tencent.com/pod-security-groups"
)

// CapabilityAnnotations has containerd hand a pod's annotations over.
// Source: containerd/v2, internal/cri/annotations, PodAnnotations
const CapabilityAnnotations = "io.kubernetes.cri.pod-annotations"

// Command is a CNI operation that the agent carries out.
type Command string

// The operations that reach the agent; STATUS and VERSION do not.
const (
	Add   Command = "ADD"
	Del   Command = "DEL"
	Check Command = "CHECK"
	GC    Command = "GC"
)

// Attachment is the key of one interface of one container.
type Attachment struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifname"`
}

// Request asks for one operation.
type Request struct {
	Command Command `json:"command"`
	Attachment
	NetNS        string `json:"netns,omitempty"` // path
	PodNamespace string `json:"podNamespace,omitempty"`
	PodName      string `json:"podName,omitempty"`
	// Network and SecurityGroups are what the pod's annotations ask for, of ADD.
	Network        string   `json:"network,omitempty"`
	SecurityGroups []string `json:"securityGroups,omitempty"`
	// Addrs are the addresses of prevResult, which CHECK compares.
	Addrs []netip.Addr `json:"addrs,omitempty"`
	// Valid are the attachments that GC must keep.
	Valid []Attachment `json:"valid,omitempty"`
}

// Response carries the result of an ADD, or an error, or nothing.
type Response struct {
	Result *Result `json:"result,omitempty"`
	Error  *Error  `json:"error,omitempty"`
}

// Result is what an ADD has made.
type Result struct {
	HostName string       `json:"hostName"` // the host's end of the veth
	HostMAC  string       `json:"hostMAC"`
	MAC      string       `json:"mac"` // of the pod's interface
	Addr     netip.Prefix `json:"addr"`
	Gateway  netip.Addr   `json:"gateway"`
	Addr6    netip.Prefix `json:"addr6,omitzero"` // where pods have IPv6 addresses, too
	Gateway6 netip.Addr   `json:"gateway6,omitzero"`
	MTU      int          `json:"mtu"`
	// VethName and VethMAC are of the pod's end of the veth, where the pod's
	// interface is an ENI.
	VethName string `json:"vethName,omitempty"`
	VethMAC  string `json:"vethMAC,omitempty"`
}

// Error is an error as CNI prints it. Msg is short and stable, Details say what
// was found and what to do.
type Error struct {
	Code    int    `json:"code"`
	Msg     string `json:"msg"`
	Details string `json:"details,omitempty"`
}

func (e *Error) Error() string {
	if e.Details == "" {
		return e.Msg
	}
	return e.Msg + ": " + e.Details
}

// Errorf returns an error whose details are formatted.
func Errorf(code int, msg, format string, args ...any) *Error {
	return &Error{Code: code, Msg: msg, Details: fmt.Sprintf(format, args...)}
}

// Read decodes one JSON value of at most limit bytes.
func Read(r io.Reader, limit int64, v any) error {
	bounded := &io.LimitedReader{R: r, N: limit}
	if err := json.NewDecoder(bounded).Decode(v); err != nil {
		if bounded.N <= 0 {
			return fmt.Errorf("longer than %d bytes", limit)
		}
		return err
	}
	return nil
}
