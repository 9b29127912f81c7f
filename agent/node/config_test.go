package node_test

import (
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// TestMaxPods: TKE's formula from the quota, and no more than the configuration says.
func TestMaxPods(t *testing.T) {
	for name, c := range map[string]struct {
		enis, ips, maxPods int
		eniQuota, ipQuota  int
		want               int
	}{
		"TKE's sample S5.MEDIUM2":           {0, 0, 0, 4, 10, 27},
		"TKE's sample SA2.12XLARGE96":       {0, 0, 0, 8, 40, 273},
		"one ENI is enough":                 {1, 0, 0, 4, 10, 9},
		"fewer addresses":                   {0, 4, 0, 4, 10, 12},
		"more than the quota":               {19, 50, 900, 4, 10, 27},
		"fewer pods":                        {0, 0, 20, 4, 10, 20},
		"a large instance":                  {0, 0, 0, 64, 64, node.MaxPodsLimit},
		"no secondary ENI":                  {0, 0, 0, 1, 10, 1},
		"unknown quota, bounds":             {2, 9, 0, 0, 0, 18},
		"unknown quota, sealed before":      {0, 0, 12, 0, 0, 12},
		"unknown quota, nothing is known":   {0, 0, 0, 0, 0, 8},
		"unknown quota, bounds and a limit": {2, 9, 10, 0, 0, 10},
	} {
		var cfg node.Config
		cfg.Network.ENIs, cfg.Network.IPsPerENI, cfg.Kubelet.MaxPods = c.enis, c.ips, c.maxPods
		if got := cfg.MaxPods(node.Facts{ENIQuota: c.eniQuota, IPQuota: c.ipQuota}); got != c.want {
			t.Errorf("%s: %d pods, want %d", name, got, c.want)
		}
	}
}

// TestExclusivePods: a pod for each ENI that is given away whole, of a quota of its
// own where the instance has one, and else of the others', which keep at least one.
func TestExclusivePods(t *testing.T) {
	for name, c := range map[string]struct {
		exclusive, eniQuota, extend int
		allocator                   node.Allocator
		shared, whole, pods         int
	}{
		"none":                         {0, 4, 10, "", 3, 0, 27},
		"extension ENIs":               {5, 4, 10, "", 3, 5, 32},
		"more than the extension ENIs": {20, 4, 10, "", 3, 10, 37},
		"of one quota":                 {2, 4, 0, "", 1, 2, 11},
		"more than the quota":          {20, 4, 0, "", 1, 2, 11},
		"one secondary ENI":            {1, 2, 0, "", 1, 0, 9},
		"no secondary ENI":             {1, 1, 0, "", 0, 0, 1},
		"observed":                     {5, 4, 10, node.AllocatorObserve, 3, 0, 27},
	} {
		var cfg node.Config
		cfg.Network.ExclusiveENIs, cfg.Network.Allocator = c.exclusive, c.allocator
		shared, whole := cfg.Network.ShareENIs(c.eniQuota, c.extend)
		pods := cfg.MaxPods(node.Facts{ENIQuota: c.eniQuota, IPQuota: 10, ExtendENIQuota: c.extend})
		if shared != c.shared || whole != c.whole || pods != c.pods {
			t.Errorf("%s: %d and %d ENIs, %d pods; want %d, %d, %d", name, shared, whole, pods, c.shared, c.whole, c.pods)
		}
	}
}
