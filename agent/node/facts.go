package node

import (
	"net/netip"
	"strconv"
)

// Facts is what the metadata service says about this instance. It is read once
// by bootstrap and sealed beside the Config, since none of it changes during the
// life of an instance.
// Source: https://cloud.tencent.com/document/product/213/4934
type Facts struct {
	InstanceID   string     `json:"instanceID"`   // ins-xxxxxxxx
	InstanceType string     `json:"instanceType"` // S5.MEDIUM4
	Region       string     `json:"region"`       // ap-guangzhou
	Zone         string     `json:"zone"`         // ap-guangzhou-3
	ZoneID       int        `json:"zoneID"`       // 100003, as provider ids carry it
	VPCID        string     `json:"vpcID"`
	SubnetID     string     `json:"subnetID"` // of the primary ENI
	MAC          string     `json:"mac"`      // of the primary ENI, lower case
	PrivateIP    netip.Addr `json:"privateIP"`
	Hostname     string     `json:"hostname"`
	CAMRole      string     `json:"camRole,omitempty"`  // empty: the instance has none
	ENIQuota     int        `json:"eniQuota,omitempty"` // ENIs, the primary one included; 0: not known
	IPQuota      int        `json:"ipQuota,omitempty"`  // addresses of an ENI, the primary one included; 0: not known
	// ExtendENIQuota is how many extension ENIs there may be beside those; 0: none, or not known.
	ExtendENIQuota int `json:"extendENIQuota,omitempty"`
	// DataDisks are the ids of the CBS data disks that were attached then. It is the
	// one fact that may change: a disk that is used once is in the ledger of disks.
	DataDisks []string `json:"dataDisks,omitempty"`
}

// ProviderID is the Node's spec.providerID in the form of Tencent's cloud
// controller manager.
func (f Facts) ProviderID() string {
	return "qcloud:///" + strconv.Itoa(f.ZoneID) + "/" + f.InstanceID
}
