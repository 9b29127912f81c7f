// What the sweep of faults compares agent/disk with. Its version is pinned here,
// away from what runs on a node.
module github.com/tkenode/tkenode/lab/bench/mountutils

go 1.26.8

require (
	k8s.io/mount-utils v0.36.3
	k8s.io/utils v0.0.0-20260626114624-be93311217bd
)

require (
	github.com/go-logr/logr v1.4.3 // indirect
	github.com/moby/sys/mountinfo v0.7.2 // indirect
	golang.org/x/sys v0.40.0 // indirect
	k8s.io/klog/v2 v2.140.0 // indirect
)
