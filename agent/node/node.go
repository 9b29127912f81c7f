// Package node is the vocabulary that every part of tkenode shares: the sealed
// configuration of a node, the facts its cloud tells about it, plans and the
// changes they list, conditions, and the three classes of errors.
//
// It holds no behaviour beyond printing and comparing itself, performs no I/O,
// reads no clock and imports no other package of this module.
package node

import "time"

// ConditionType names one thing that is either so or not so on this node.
// RUNBOOK.md has a section for each.
type ConditionType string

// The conditions of a node, in the order in which a launch meets them.
const (
	ConfigSealed ConditionType = "ConfigSealed" // bootstrap accepted and sealed a NodeConfig
	DisksReady   ConditionType = "DisksReady"   // every disk of the NodeConfig is mounted
	RuntimeReady ConditionType = "RuntimeReady" // containerd runs and holds the baked images
	NetworkReady ConditionType = "NetworkReady" // pods can be given VPC addresses
	NodeJoined   ConditionType = "NodeJoined"   // kubelet's client certificate is on disk
	KubeletReady ConditionType = "KubeletReady" // kubelet runs and answers its health check
	NodeReady    ConditionType = "NodeReady"    // the API server reports the Node as Ready
	// The Node is Ready without these two, and they may be another's to provide.
	ServicesReady ConditionType = "ServicesReady" // kube-proxy runs and answers its health check
	DNSReady      ConditionType = "DNSReady"      // CoreDNS runs and answers for the cluster's domain
)

// PoolExhausted warns: no address is left for another pod. The node is Ready all
// the same, so it is not among ConditionTypes.
const PoolExhausted ConditionType = "PoolExhausted"

// DiskNotGrown warns: a disk is larger than what is used of it.
const DiskNotGrown ConditionType = "DiskNotGrown"

// VolumeMismatch warns: a pod's volume is not the disk that it should be.
const VolumeMismatch ConditionType = "VolumeMismatch"

// RepairsUndone warns: something keeps undoing what the agent makes in the kernel.
const RepairsUndone ConditionType = "RepairsUndone"

// What can be wrong with a disk that is mounted. They warn, and are conditions of the
// Node as well, under the names that TKE's node problem detector gives them; True is
// bad.
const (
	ReadonlyFilesystem ConditionType = "ReadonlyFilesystem" // its file system takes no writes any more
	IOError            ConditionType = "IOError"            // its requests fail, or do not end, or it is gone
	Ext4Error          ConditionType = "Ext4Error"          // ext4 has noted damage, which e2fsck has to repair
)

// DiskConditionTypes lists them.
var DiskConditionTypes = [...]ConditionType{ReadonlyFilesystem, IOError, Ext4Error}

// ConditionTypes lists every condition in launch order; the first one that is
// not True is the one to look at.
var ConditionTypes = [...]ConditionType{
	ConfigSealed, DisksReady, RuntimeReady, NetworkReady, NodeJoined, KubeletReady, NodeReady,
	ServicesReady, DNSReady,
}

// Status is the state of a condition, spelt as Kubernetes spells it.
type Status string

// The three states of a condition.
const (
	True    Status = "True"
	False   Status = "False"
	Unknown Status = "Unknown"
)

// Condition says whether one thing is so, since when, and why.
type Condition struct {
	Type    ConditionType `json:"type"`
	Status  Status        `json:"status"`
	Reason  string        `json:"reason"`  // CamelCase, stable, for machines
	Message string        `json:"message"` // what is wrong, the evidence, what to do
	Since   time.Time     `json:"since"`   // of Status, not of Reason or Message
}
