package bench

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"github.com/tkenode/tkenode/bootstrap"
	"github.com/tkenode/tkenode/bootstrap/nodeconfig"
	"github.com/tkenode/tkenode/lab"
	"github.com/tkenode/tkenode/lab/cloud"
)

const (
	// BootPeer is the node that boots are compared with.
	BootPeer = "hand-written node"
	diskGiB  = 20
	// bootLimit is several times what a boot takes without hardware virtualisation.
	bootLimit = 10 * time.Minute
)

// BootOptions say what Boot works with.
type BootOptions struct {
	Lab      *lab.Lab // without any CVM
	Dir      string   // for the peer's image and disk
	Image    string   // the node image
	Pairs    int
	Progress Progress
}

// boot is one measurement.
type boot struct {
	BootOptions
	peer lab.LaunchSpec
}

// launch is one launch that became Ready.
type launch struct {
	ready float64 // seconds since power-on
	steps []step
}

// Boot measures power-on to Node Ready. Ours begins with a blank disk and nothing
// else: it attaches its ENI, formats, joins. The peer is the same image with every
// file written by hand, without our agent: its ENI is attached, its disk formatted
// and its certificate issued beforehand. In figures after the first there are the
// cloud's own delays, which only ours has to wait for, and the ledgers of the
// slowest boots.
func Boot(ctx context.Context, o BootOptions) ([]Figure, error) {
	b := &boot{BootOptions: o}
	if err := b.step("hand-written node", func() error { return b.makePeer(ctx) }); err != nil {
		return nil, err
	}
	var pairs []Pair
	var ours, peer launch // the slowest
	for i := range o.Pairs {
		var l, p launch
		sides := []func() error{
			func() (err error) {
				l, err = b.launch(ctx, "ours", lab.LaunchSpec{DataDisks: []int{diskGiB}}, ourSteps)
				return
			},
			func() (err error) { p, err = b.launch(ctx, BootPeer, b.peer, unitSteps); return },
		}
		for side := range sides {
			if err := sides[(i+side)%2](); err != nil {
				return nil, err
			}
		}
		pairs = append(pairs, Pair{l.ready, p.ready})
		ours, peer = slower(ours, l), slower(peer, p)
		o.Progress.Say("pair %d of %d: ours %.1f s, %s %.1f s, ratio %.2f", i+1, o.Pairs, l.ready, BootPeer, p.ready, l.ready/p.ready)
	}
	delays := cloud.Default().Delays
	figures := []Figure{
		compare("boot.ready", "s", BootPeer, pairs),
		{Name: "boot.cloud.attach", Unit: "s", Ours: delays.Attach.Seconds()},
		{Name: "boot.cloud.visible", Unit: "s", Ours: delays.Visible.Seconds()},
	}
	figures = append(figures, ledger("boot.step.", ours.steps)...)
	return append(figures, ledger("boot.peer_step.", peer.steps)...), nil
}

func slower(a, b launch) launch {
	if a.ready > b.ready {
		return a
	}
	return b
}

func (b *boot) step(name string, do func() error) error {
	b.Progress.Begin(name)
	err := do()
	b.Progress.End(name, err)
	return err
}

// launch boots a CVM, and removes it again when it has been Ready.
func (b *boot) launch(ctx context.Context, name string, spec lab.LaunchSpec, steps readSteps) (l launch, err error) {
	err = b.step(name, func() error {
		ctx, cancel := context.WithTimeout(ctx, bootLimit)
		defer cancel()
		c, err := b.Lab.Launch(ctx, spec)
		if err != nil {
			return err
		}
		ready, err := b.ready(ctx, c)
		if err != nil {
			return err
		}
		l.ready = ready.Took.Seconds()
		if l.steps, err = b.steps(ctx, c, steps, ready); err != nil {
			return err
		}
		if err := b.Lab.Terminate(ctx, c.ID); err != nil {
			return err
		}
		return b.Lab.Cluster.DeleteNode(ctx, c.Name())
	})
	return l, err
}

func (b *boot) ready(ctx context.Context, c *lab.CVM) (lab.Mark, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { // ends with ctx
		select {
		case <-b.Lab.Gone(c):
			cancel(fmt.Errorf("machine %s is off", c.ID))
		case <-ctx.Done():
		}
	}()
	m, err := c.Timeline.Wait(ctx, lab.NodeReady)
	if err != nil {
		return m, fmt.Errorf("wait for node %s: %w; its console ends with:\n%s", c.Name(), err, lab.Tail(c.Console(), 30))
	}
	return m, nil
}

// peerIP is the primary address of the hand-written node. Any would do that the
// region does not give to ours.
var peerIP = netip.MustParseAddr("10.0.0.200")

// makePeer makes what the hand-written node is launched from.
func (b *boot) makePeer(ctx context.Context) error {
	values, err := b.Lab.NodeConfigValues(ctx)
	if err != nil {
		return err
	}
	text, err := values.Text()
	if err != nil {
		return err
	}
	config, err := nodeconfig.FromUserData([]byte(text))
	if err != nil {
		return err
	}
	region := cloud.Default()
	subnet := region.Subnets[1]
	eni, err := b.Lab.Region.CreateENI(subnet.ID)
	if err != nil {
		return err
	}
	h := handmade{
		config:  config,
		machine: bootstrap.Machine{CPUs: 2, MemoryBytes: 4 << 30},
		eni:     netip.PrefixFrom(eni.IPs[0].Addr, subnet.CIDR.Bits()),
		gateway: subnet.Gateway(),
	}
	h.facts.InstanceID, h.facts.InstanceType = "ins-handmade", "S5.MEDIUM4"
	h.facts.Region, h.facts.Zone, h.facts.ZoneID = region.Region, region.Zones[0].Name, region.Zones[0].ID
	h.facts.ENIQuota, h.facts.IPQuota = 4, 10 // S5.MEDIUM4's
	h.facts.PrivateIP = peerIP
	if h.certificate, err = b.Lab.Cluster.IssueNodeCertificate(config.Name(h.facts)); err != nil {
		return err
	}
	files, err := h.files()
	if err != nil {
		return err
	}
	disk, image := filepath.Join(b.Dir, "data.raw"), filepath.Join(b.Dir, "hand-written.qcow2")
	if err := formatDisk(ctx, disk, diskGiB<<30); err != nil {
		return err
	}
	if err := editImage(ctx, b.Image, image, files); err != nil {
		return err
	}
	b.peer = lab.LaunchSpec{
		// cloud-init has as little to do as with our NodeConfig.
		UserData: []byte("#cloud-config\n{}\n"),
		Image:    b.Lab.ImportImage("handmade", image), IP: peerIP, ENIs: []string{eni.ID},
		DataDisks: []int{diskGiB}, DiskContent: disk,
	}
	return nil
}
