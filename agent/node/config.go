package node

import (
	"net/netip"
	"slices"
	"strings"
)

// The one version of the NodeConfig document so far.
const (
	APIVersion = "tkenode.io/v1alpha1"
	Kind       = "NodeConfig"
)

// Config is the NodeConfig document: what a platform engineer puts in user-data.
// bootstrap decodes it strictly, fills in defaults, validates and seals it; the
// agent only reads the sealed form.
type Config struct {
	APIVersion string        `json:"apiVersion" yaml:"apiVersion"`
	Kind       string        `json:"kind" yaml:"kind"`
	Cluster    ClusterConfig `json:"cluster" yaml:"cluster"`
	Node       NodeSpec      `json:"node" yaml:"node"`
	Network    NetworkConfig `json:"network" yaml:"network"`
	Disks      []DiskConfig  `json:"disks" yaml:"disks"`
	DataDisks  []TKEDataDisk `json:"-" yaml:"dataDisks"` // TKE's way to write Disks, to which they are added
	// MountTarget is where the only data disk is mounted, as TKE's
	// InstanceAdvancedSettings has it: one entry of Disks in short.
	MountTarget string           `json:"-" yaml:"mountTarget"`
	Kubelet     KubeletConfig    `json:"kubelet" yaml:"kubelet"`
	Containerd  ContainerdConfig `json:"containerd" yaml:"containerd"`
	KubeProxy   KubeProxyConfig  `json:"kubeProxy,omitzero" yaml:"kubeProxy"`
	CoreDNS     CoreDNSConfig    `json:"coreDNS,omitzero" yaml:"coreDNS"`
	Metrics     MetricsConfig    `json:"metrics" yaml:"metrics"`
	Cloud       CloudConfig      `json:"cloud" yaml:"cloud"`
}

// ClusterConfig says which cluster the node joins, and how it is trusted.
type ClusterConfig struct {
	ID                   string `json:"id" yaml:"id"`                                     // cls-xxxxxxxx
	Endpoint             string `json:"endpoint" yaml:"endpoint"`                         // https://host:port of the API server
	CertificateAuthority string `json:"certificateAuthority" yaml:"certificateAuthority"` // PEM, or its base64
	// BootstrapToken is used once, for the certificate request, and never sealed.
	BootstrapToken Secret       `json:"-" yaml:"bootstrapToken"`
	DNS            []netip.Addr `json:"dns,omitempty" yaml:"dns"`       // clusterDNS of the pods
	Domain         string       `json:"domain,omitempty" yaml:"domain"` // default cluster.local
	ServiceCIDR    netip.Prefix `json:"serviceCIDR,omitzero" yaml:"serviceCIDR"`
}

// NameFrom says what a Node is named after.
type NameFrom string

// Where a Node's name may come from.
const (
	NameFromPrivateIP  NameFrom = "privateIP" // the default, as TKE does
	NameFromInstanceID NameFrom = "instanceID"
	NameFromHostname   NameFrom = "hostname"
)

// NodeSpec describes the Node object that kubelet registers.
type NodeSpec struct {
	NameFrom NameFrom          `json:"nameFrom" yaml:"nameFrom"`
	Labels   map[string]string `json:"labels,omitempty" yaml:"labels"`
	Taints   []Taint           `json:"taints,omitempty" yaml:"taints"`
}

// Taint is a taint of the Node at registration.
type Taint struct {
	Key    string `json:"key" yaml:"key"`
	Value  string `json:"value,omitempty" yaml:"value"`
	Effect string `json:"effect" yaml:"effect"` // NoSchedule, PreferNoSchedule or NoExecute
}

// Allocator says who attaches ENIs and assigns addresses.
type Allocator string

// The allocators.
const (
	AllocatorNode    Allocator = "node"    // the agent does; the default
	AllocatorObserve Allocator = "observe" // somebody else does: the agent uses what it finds and changes nothing
)

// Layout is how the kernel is told the way of pods' packets.
type Layout string

// The layouts.
const (
	LayoutMark      Layout = "mark"       // a packet costs the same with any number of pods; the default
	LayoutTKECompat Layout = "tke-compat" // two rules for each pod, as TKE's own agent makes them
)

// IPFamily is a version of IP, as Kubernetes writes it.
type IPFamily string

// The families.
const (
	IPv4 IPFamily = "IPv4"
	IPv6 IPFamily = "IPv6"
)

// NetworkConfig says where the secondary ENIs, and so the pods' addresses, come from.
type NetworkConfig struct {
	Allocator        Allocator `json:"allocator,omitempty" yaml:"allocator"`     // default node
	SubnetIDs        []string  `json:"subnetIDs" yaml:"subnetIDs"`               // subnets of the secondary ENIs, in order of preference
	SecurityGroupIDs []string  `json:"securityGroupIDs" yaml:"securityGroupIDs"` // of the secondary ENIs
	ENIs             int       `json:"enis,omitempty" yaml:"enis"`               // secondary ENIs at most; 0: the instance's quota
	IPsPerENI        int       `json:"ipsPerENI,omitempty" yaml:"ipsPerENI"`     // pod addresses at most on each; 0: the instance's quota
	WarmIPs          WarmIPs   `json:"warmIPs" yaml:"warmIPs"`
	// IPFamilies are those that every pod has an address of, the same ENI's: IPv4, or
	// IPv4 and IPv6. Default IPv4. A pod keeps what it was made with.
	IPFamilies []IPFamily `json:"ipFamilies,omitempty" yaml:"ipFamilies"`
	// ExclusiveENIs is how many ENIs at most are given to pods whole: to those with
	// the annotation tke.cloud.tencent.com/networks: tke-direct-eni. 0, the default:
	// such pods are refused.
	ExclusiveENIs int `json:"exclusiveENIs,omitempty" yaml:"exclusiveENIs"`
	// PodSecurityGroupIDs are the security groups that such a pod may choose for its
	// ENI by the annotation tke.cloud.tencent.com/pod-security-groups; one that does
	// not choose has SecurityGroupIDs.
	PodSecurityGroupIDs []string `json:"podSecurityGroupIDs,omitempty" yaml:"podSecurityGroupIDs"`
	// NonMasqueradeCIDRs are the destinations that see a pod's own address; to all
	// others a pod has the primary ENI's. Default: the private networks.
	NonMasqueradeCIDRs []netip.Prefix `json:"nonMasqueradeCIDRs" yaml:"nonMasqueradeCIDRs"`
	Layout             Layout         `json:"layout" yaml:"layout"`
	// MetadataAccess are the pods, as namespace/name with * for any characters of a
	// name, that may ask the metadata service, which has the CAM role's credentials.
	MetadataAccess []string `json:"metadataAccess,omitempty" yaml:"metadataAccess"`
}

// DualStack reports whether every pod gets an IPv6 address beside the IPv4 one.
func (n NetworkConfig) DualStack() bool { return slices.Contains(n.IPFamilies, IPv6) }

// PrivateNetworks are the destinations that see a pod's own address unless the
// NodeConfig says otherwise: RFC 1918, of which every VPC's, peer's and data
// centre's range is a part, and RFC 6598, which the cloud's load balancers use.
// Only what is beyond them needs the primary ENI, the one that can have a public
// address. A VPC's own range, which only the cloud's API knows, would add nothing
// but a call that can fail. 169.254.0.0/16 is not among them: the services there,
// metadata first, know the instance by its primary address.
// Source of VPCs' ranges: https://cloud.tencent.com/document/product/215/20046
var PrivateNetworks = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"),
}

// WarmIPs says how many addresses are held that no pod uses, as TKE's
// ip-min-warm-target and ip-max-warm-target do.
type WarmIPs struct {
	Min int `json:"min" yaml:"min"` // default 5
	Max int `json:"max" yaml:"max"` // default 5
}

// FileSystem is a file system that a disk may be formatted with.
type FileSystem string

// The file systems.
const (
	Ext4 FileSystem = "ext4"
	XFS  FileSystem = "xfs"
	Ext3 FileSystem = "ext3" // mounted where it is found, and never made
)

// WhenNotBlank says what becomes of a disk that holds a file system which tkenode
// did not make.
type WhenNotBlank string

// What may become of it. Whatever holds anything else is refused.
const (
	RefuseFound WhenNotBlank = "refuse" // it is left alone, and the node waits for an operator; the default
	MountFound  WhenNotBlank = "mount"  // exactly one file system, ext3, ext4 or xfs, is mounted as it is, as TKE does
)

// DiskConfig binds one CBS data disk, or several as one, to a directory.
type DiskConfig struct {
	DiskID string `json:"diskID,omitempty" yaml:"diskID"` // disk-xxxxxxxx, the disk's live serial; empty: the only data disk of the instance
	// DiskIDs are the disks of a stripe (RAID 0), 2 to 20, in this order for ever. They
	// take the place of DiskID.
	DiskIDs []string `json:"diskIDs,omitempty" yaml:"diskIDs"`
	// Selector finds the disk where DiskID is empty, once. What it has found is kept.
	Selector DiskSelector `json:"selector,omitzero" yaml:"selector"`
	// Attach says that the agent attaches what DiskID or DiskIDs name, and detaches
	// it again once a later generation no longer lists it.
	Attach     bool       `json:"attach,omitempty" yaml:"attach"`
	FileSystem FileSystem `json:"fileSystem" yaml:"fileSystem"` // default ext4
	MountPoint string     `json:"mountPoint" yaml:"mountPoint"` // absolute
	// WhenNotBlank says whether a file system that tkenode did not make is mounted. A
	// disk is formatted only if it is proven blank, whatever this says.
	WhenNotBlank WhenNotBlank `json:"whenNotBlank,omitempty" yaml:"whenNotBlank"`
	// Encryption, if it is there, puts LUKS2 under the file system.
	Encryption *DiskEncryption `json:"encryption,omitempty" yaml:"encryption"`
}

// DiskEncryption says where the key of an encrypted disk comes from: exactly one of
// the two is set.
type DiskEncryption struct {
	// KeyFile holds the key, 32 to 512 random bytes, all of them counted. It has to
	// belong to root and be closed to others.
	KeyFile string  `json:"keyFile,omitempty" yaml:"keyFile"`
	KeyFrom KeyFrom `json:"keyFrom,omitempty" yaml:"keyFrom"`
}

// KeyFrom says what the key of an encrypted disk is derived from.
type KeyFrom string

// KeyFromInstance is the instance id and a random value that is made once and kept
// on the system disk. It protects a disk that leaves the instance, not one that is
// in it, and is lost with the system disk.
const KeyFromInstance KeyFrom = "instance"

// Layered reports whether anything stands between the disk and its file system.
func (d DiskConfig) Layered() bool { return len(d.DiskIDs) > 0 || d.Encryption != nil }

// IDs returns the ids of the disks that are named: none where a selector finds the disk,
// or where the only one of the instance is meant.
func (d DiskConfig) IDs() []string {
	if d.DiskID != "" {
		return []string{d.DiskID}
	}
	return d.DiskIDs
}

// DiskSelector says which of the instance's data disks is meant, by what the cloud
// says of them. At least one of its fields is set.
type DiskSelector struct {
	Type    string `json:"type,omitempty" yaml:"type"`       // CLOUD_PREMIUM
	SizeGiB int    `json:"sizeGiB,omitempty" yaml:"sizeGiB"` // that the cloud says
	// Order is the place among the disks of this type and size, counted from 1 in the
	// order in which cvm DescribeInstances lists them. 0: there is only one.
	Order int `json:"order,omitempty" yaml:"order"`
}

// TKEDataDisk is a data disk as TKE's API writes it. A nodepool's can be copied.
// Source: tencentcloud-sdk-go tke/v20180525, DataDisk
type TKEDataDisk struct {
	DiskType           string     `json:"DiskType" yaml:"DiskType"`
	FileSystem         FileSystem `json:"FileSystem" yaml:"FileSystem"`
	DiskSize           int        `json:"DiskSize" yaml:"DiskSize"` // GiB
	AutoFormatAndMount bool       `json:"AutoFormatAndMount" yaml:"AutoFormatAndMount"`
	MountTarget        string     `json:"MountTarget" yaml:"MountTarget"`
	DiskPartition      string     `json:"DiskPartition" yaml:"DiskPartition"` // refused: the name of a device
}

// KubeletConfig overrides settings of kubelet.
type KubeletConfig struct {
	MaxPods int `json:"maxPods,omitempty" yaml:"maxPods"` // at most; 0: as many as have addresses, see Config.MaxPods
	// Config is merged over ours; fields that tkenode must own are refused.
	Config map[string]any `json:"config,omitempty" yaml:"config"`
}

// ContainerdConfig overrides settings of containerd.
type ContainerdConfig struct {
	Registries []Registry `json:"registries,omitempty" yaml:"registries"`
}

// Registry names the mirrors of an image registry, tried in order before it.
type Registry struct {
	Host    string   `json:"host" yaml:"host"` // ccr.ccs.tencentyun.com
	Mirrors []string `json:"mirrors" yaml:"mirrors"`
}

// KubeProxyConfig says whether the node runs kube-proxy itself. It demands
// cluster.serviceCIDR, and a cluster role binding: docs/services.md.
type KubeProxyConfig struct {
	Enabled bool `json:"enabled" yaml:"enabled"` // default false: a DaemonSet of the cluster's does, as in TKE
}

// CoreDNSConfig says whether the node runs a CoreDNS of its own for its pods. It
// listens on the link-local addresses of cluster.dns, of which it demands one, such
// as 169.254.20.10, and needs a cluster role binding: docs/services.md.
type CoreDNSConfig struct {
	Enabled bool `json:"enabled" yaml:"enabled"` // default false: a Deployment of the cluster's does, as in TKE
}

// LocalDNS returns the addresses of cluster.dns that the node's own CoreDNS
// listens on; nil: it has none. The others are Services'.
func (c Config) LocalDNS() (local []netip.Addr) {
	for _, a := range c.Cluster.DNS {
		if c.CoreDNS.Enabled && a.IsLinkLocalUnicast() {
			local = append(local, a)
		}
	}
	return local
}

// MetricsConfig says where metrics are pushed. Without an endpoint none are.
type MetricsConfig struct {
	Endpoint       string            `json:"endpoint,omitempty" yaml:"endpoint"` // remote write URL
	Interval       Duration          `json:"interval" yaml:"interval"`           // default 15s
	ExternalLabels map[string]string `json:"externalLabels,omitempty" yaml:"externalLabels"`
}

// CloudConfig says how to reach the cloud API. The defaults fit the public cloud.
type CloudConfig struct {
	// APIDomain is the domain under which each service's API lives, as in
	// vpc.<APIDomain>; default internal.tencentcloudapi.com, which is reached
	// from inside a VPC without a public address.
	APIDomain            string `json:"apiDomain" yaml:"apiDomain"`
	CertificateAuthority string `json:"certificateAuthority,omitempty" yaml:"certificateAuthority"` // PEM; empty: the system's
}

// unknownMaxPods is how many pods a node has whose quota is not known. It was
// sealed before the quota was asked for, or is none of ours; the smallest
// instance type with as much memory as a node needs has addresses for as many.
const unknownMaxPods = 8

// MaxPodsLimit bounds the pods: Kubernetes is tested with far fewer on a node.
const MaxPodsLimit = 1000

// MaxExclusiveENIs bounds network.exclusiveENIs. How many an instance may have is
// asked of the cloud; no type has more.
const MaxExclusiveENIs = 100

// ShareENIs divides the secondary ENIs of an instance that may have so many ENIs,
// the primary one included, and so many extension ENIs: into those whose addresses
// pods share, and those that pods get whole. Extension ENIs are only for the latter;
// without them the two share one quota, of which the former keep at least one.
func (n NetworkConfig) ShareENIs(enis, extend int) (shared, exclusive int) {
	shared = max(enis-1, 0)
	switch {
	case n.Allocator == AllocatorObserve:
		return shared, 0
	case extend > 0:
		return shared, min(n.ExclusiveENIs, extend)
	}
	exclusive = max(min(n.ExclusiveENIs, shared-1), 0)
	return shared - exclusive, exclusive
}

// MaxPods returns how many pods kubelet may be given: by TKE's formula as many as
// the secondary ENIs have addresses beside their primary one, and one for each ENI
// that is given to a pod whole, and no more than the configuration says.
// Source: https://cloud.tencent.com/document/product/457/64919
func (c Config) MaxPods(f Facts) int {
	pods, enis, ips := unknownMaxPods, c.Network.ENIs, c.Network.IPsPerENI
	switch {
	case f.ENIQuota > 0 && f.IPQuota > 0:
		shared, exclusive := c.Network.ShareENIs(f.ENIQuota, f.ExtendENIQuota)
		pods = bounded(shared, enis)*bounded(f.IPQuota-1, ips) + exclusive
	case enis > 0 && ips > 0:
		pods = enis * ips
	case c.Kubelet.MaxPods > 0:
		pods = c.Kubelet.MaxPods
	}
	return min(max(bounded(pods, c.Kubelet.MaxPods), 1), MaxPodsLimit)
}

// bounded returns n, or the limit if there is one and it is lower.
func bounded(n, limit int) int {
	if limit > 0 {
		return min(n, limit)
	}
	return n
}

// Name returns the Node's name.
func (c Config) Name(f Facts) string {
	switch c.Node.NameFrom {
	case NameFromInstanceID:
		return f.InstanceID
	case NameFromHostname:
		return strings.ToLower(f.Hostname) // as kubelet does
	default:
		return f.PrivateIP.String()
	}
}
