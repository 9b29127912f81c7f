package lab

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/cvm"
	"github.com/tkenode/tkenode/lab/vpc"
)

var (
	vpcCIDR  = netip.MustParsePrefix("10.0.0.0/16")
	vpcCIDR6 = netip.MustParsePrefix("2001:db8::/56") // as large as Tencent's
)

func subnets(config cloud.Config) []vpc.Subnet {
	var out []vpc.Subnet
	for _, s := range config.Subnets {
		out = append(out, vpc.Subnet{ID: s.ID, CIDR: s.CIDR, CIDR6: s.CIDR6})
	}
	return out
}

//go:embed nodeconfig.yaml
var nodeConfigText string

var nodeConfigTemplate = template.Must(template.New("nodeconfig.yaml").Funcs(template.FuncMap{
	"indent": func(n int, s string) string {
		return strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n"+strings.Repeat(" ", n))
	},
}).Parse(nodeConfigText))

// NodeConfigValues are what differs between the NodeConfigs of the lab's CVMs.
// Tests change them to see what a wrong one leads to.
type NodeConfigValues struct {
	Endpoint         string // of the API server
	ClusterCA        string // PEM
	Token            string // bootstrap token
	MetricsEndpoint  string
	APIDomain        string
	CloudCA          string // PEM
	SubnetIDs        []string
	SecurityGroupIDs []string
	PodGroupIDs      []string // security groups that pods may choose
}

// NodeConfigValues returns the values with which a CVM becomes a node, with a
// bootstrap token of its own.
func (l *Lab) NodeConfigValues(ctx context.Context) (NodeConfigValues, error) {
	token, err := l.Cluster.NewBootstrapToken(ctx, 10*time.Minute)
	if err != nil {
		return NodeConfigValues{}, err
	}
	config := cloud.Default()
	return NodeConfigValues{
		Endpoint:         "https://" + apiServerAddr.String(),
		ClusterCA:        string(l.Cluster.CACert()),
		Token:            token.Reveal(),
		MetricsEndpoint:  "http://" + monitorAddr.String() + "/api/v1/write",
		APIDomain:        config.Domain,
		CloudCA:          l.ca.pem,
		SubnetIDs:        []string{config.Subnets[1].ID},
		SecurityGroupIDs: config.SecurityGroups[:1],
		PodGroupIDs:      config.SecurityGroups[1:],
	}, nil
}

// Text returns the NodeConfig document.
func (v NodeConfigValues) Text() (string, error) {
	var b bytes.Buffer
	if err := nodeConfigTemplate.Execute(&b, v); err != nil {
		return "", fmt.Errorf("render NodeConfig: %w", err)
	}
	return b.String(), nil
}

// LaunchSpec says what to launch.
type LaunchSpec struct {
	UserData   []byte // nil: the lab's own NodeConfig
	NoUserData bool   // not even that
	// DataDisks are the sizes, in GiB, of CBS disks.
	DataDisks []int
	// Disks are more of them, where something else than the size matters.
	Disks []cloud.DiskSpec
	// DiskContent is a raw file that each of them begins as; empty: they are blank.
	DiskContent string
	Image       string     // id, as ImportImage returned it; default: the lab's node image
	IP          netip.Addr // of the primary ENI; default: any
	ENIs        []string   // ids of secondary ENIs that are attached from the start
}

// ImportImage makes a file an image that CVMs can be launched from, and returns
// its id. Its disk format is told by its name: .qcow2, or else raw.
func (l *Lab) ImportImage(name, file string) (id string) {
	id = "img-" + name
	l.host.addImage(id, file)
	l.Region.ImportImage(id)
	return id
}

// CVM is an instance that was launched.
type CVM struct {
	ID       string
	IP       netip.Addr
	Timeline *Timeline
	console  string
}

// Name is the name of the Node that the lab's own NodeConfig makes of it.
func (c *CVM) Name() string { return c.IP.String() }

// Console is the file with what the machine prints to its serial console.
func (c *CVM) Console() string { return c.console }

// Launch launches a CVM and returns as soon as it is powered on.
func (l *Lab) Launch(ctx context.Context, s LaunchSpec) (*CVM, error) {
	if s.UserData == nil && !s.NoUserData {
		v, err := l.NodeConfigValues(ctx)
		if err != nil {
			return nil, err
		}
		text, err := v.Text()
		if err != nil {
			return nil, err
		}
		s.UserData = []byte(text)
	}
	spec := cloud.InstanceSpec{UserData: s.UserData, Image: s.Image, PrivateIP: s.IP, ENIs: s.ENIs}
	for _, size := range s.DataDisks {
		spec.DataDisks = append(spec.DataDisks, cloud.DiskSpec{SizeGiB: size, Content: s.DiskContent})
	}
	spec.DataDisks = append(spec.DataDisks, s.Disks...)
	in, err := l.Region.Launch(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	c := &CVM{ID: in.ID, IP: in.PrivateIP, Timeline: l.host.timeline(in.ID), console: l.host.console(in.ID)}
	l.servers.Go(func() { l.watchReady(c) })
	return c, nil
}

// FromSnapshot makes CVMs that are launched from now on go on from a snapshot of
// one that has booted without a network, and waits for it, instead of booting. It
// costs a boot where Options.Cache has none of this image.
//
// They know of their instance only what the metadata service says: cloud-init has
// run before, with the user-data of nobody, and has brought the login key. They have cpus
// processors, whatever their type: more of them in all machines than the host has wait for
// each other, since one that holds a lock may have none of the host's.
func (l *Lab) FromSnapshot(ctx context.Context, cpus int) error {
	spec := cvm.Spec{Image: l.options.Image, CPUs: cpus, Config: &cvm.ConfigDrive{
		InstanceID: "ins-snapshot", Hostname: "snapshot", PublicKeys: []string{l.key.public},
	}}
	// The last words of cloud-init's last stage; bootstrap waits for metadata long before.
	const booted = "Datasource DataSourceConfigDrive"
	path, err := cvm.Cached(ctx, filepath.Join(l.options.Cache, "snapshots"), fmt.Sprintf("node-%d-cpus", cpus), spec, booted)
	if err != nil {
		return err
	}
	l.host.mu.Lock()
	defer l.host.mu.Unlock()
	l.host.snapshot, l.host.cpus = path, cpus
	return nil
}

// watchReady marks the moment at which the API server calls the Node Ready.
func (l *Lab) watchReady(c *CVM) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	l.servers.Go(func() {
		defer cancel()
		select {
		case <-l.Gone(c):
		case <-ctx.Done():
		}
	})
	for {
		_, err := l.Cluster.WaitNodeReady(ctx, c.Name())
		if err == nil {
			c.Timeline.mark(NodeReady)
			return
		}
		// One request that fails is no reason to look away.
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
			l.log.Warn("watch for Ready goes on", "node", c.Name(), "err", err)
		}
	}
}

// Gone is closed when the CVM's machine is off, whatever the reason.
func (l *Lab) Gone(c *CVM) <-chan struct{} {
	m, err := l.host.machine(c.ID)
	if err != nil {
		off := make(chan struct{})
		close(off)
		return off
	}
	return m.Done()
}

// Terminate ends the instance and everything that was made with it.
func (l *Lab) Terminate(ctx context.Context, id string) error { return l.Region.Terminate(ctx, id) }

func (h *host) console(instance string) string {
	return filepath.Join(h.machineDir(instance), "console.log")
}

// LoginKey is the file with the private key that opens the CVMs to LoginUser.
func (l *Lab) LoginKey() string { return l.key.path }
