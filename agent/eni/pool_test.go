package eni

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// idle is a hypervisor and a fabric: nothing here looks at packets or devices.
type idle struct{}

func (idle) Run(context.Context, cloud.Machine) error               { return nil }
func (idle) Destroy(context.Context, string) error                  { return nil }
func (idle) PlugNIC(context.Context, string, cloud.NIC) error       { return nil }
func (idle) UnplugNIC(context.Context, string, string) error        { return nil }
func (idle) PlugDisk(context.Context, string, cloud.Volume) error   { return nil }
func (idle) UnplugDisk(context.Context, string, string) error       { return nil }
func (idle) ResizeDisk(context.Context, string, cloud.Volume) error { return nil }
func (idle) Attach(cloud.Port) error                                { return nil }
func (idle) SetAddrs(string, []netip.Addr) error                    { return nil }
func (idle) Detach(string) error                                    { return nil }

// direct calls the lab's cloud in place, so that tests run in a synctest bubble.
type direct struct {
	handler http.Handler
	remote  string
}

func (d direct) RoundTrip(req *http.Request) (resp *http.Response, err error) {
	req = req.Clone(req.Context())
	req.Host, req.RemoteAddr = req.URL.Host, d.remote+":40000"
	if req.Body == nil {
		req.Body = http.NoBody
	}
	defer func() {
		if v := recover(); v == http.ErrAbortHandler {
			err = io.ErrUnexpectedEOF // the cloud has hung up
		} else if v != nil {
			panic(v)
		}
	}()
	w := httptest.NewRecorder()
	d.handler.ServeHTTP(w, req)
	return w.Result(), nil
}

// poolNode is an instance of the lab's region, seen by the pool.
type poolNode struct {
	t      *testing.T
	region *cloud.Region
	api    *tencent.Client
	sealed node.Sealed
	dir    string
	net    *Network
	cloud  Cloud         // what the pool is given
	pause  time.Duration // the longest of the engine's; default a minute
}

func newPoolNode(t *testing.T) *poolNode { return newPoolNodeIn(t, cloud.Default()) }

func newPoolNodeIn(t *testing.T, config cloud.Config) *poolNode {
	config.Log = slog.New(slog.DiscardHandler)
	region, err := cloud.New(config, idle{}, idle{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(region.Close)
	in, err := region.Launch(t.Context(), cloud.InstanceSpec{UserData: []byte("kind: NodeConfig\n")})
	if err != nil {
		t.Fatal(err)
	}
	metadata := tencent.NewMetadata(tencent.MetadataURL)
	metadata.HTTP.Transport = direct{region.Metadata(), in.PrivateIP.String()}
	api, err := tencent.NewClient(node.CloudConfig{APIDomain: config.Domain}, config.Region, metadata)
	if err != nil {
		t.Fatal(err)
	}
	api.HTTP.Transport = direct{region.API(), in.PrivateIP.String()}
	n := &poolNode{t: t, region: region, api: api, cloud: api, dir: t.TempDir()}
	n.sealed.Facts = node.Facts{InstanceID: in.ID, VPCID: config.VPCID}
	n.sealed.Config.Cluster.ID = "cls-lab00001"
	n.sealed.Config.Network = node.NetworkConfig{SubnetIDs: []string{"subnet-pods0001"}, SecurityGroupIDs: []string{"sg-lab00001"}, ENIs: 1, IPsPerENI: 8, WarmIPs: node.WarmIPs{Min: 8, Max: 8}}
	n.start()
	t.Cleanup(func() { n.net.Close() })
	return n
}

func (n *poolNode) start() {
	n.net = New(Options{
		Sealed: func() (node.Sealed, bool) { return n.sealed, true }, Cloud: n.cloud, Dir: n.dir,
		Log: slog.New(slog.NewTextHandler(n.t.Output(), nil)),
	})
}

func (n *poolNode) restart() {
	if err := n.net.Close(); err != nil {
		n.t.Fatal(err)
	}
	n.start()
}

// run does what the engine does until the pool has converged, a terminal error
// stands in the way, or the time is over. It returns everything that was applied,
// and the last error.
func (n *poolNode) run(limit time.Duration) (applied []string, err error) {
	n.t.Helper()
	end := time.Now().Add(limit)
	for time.Now().Before(end) {
		var plan node.Plan
		plan, err = n.net.Pool().Plan(n.t.Context())
		if err == nil && plan.Empty() && plan.Again > pollPeriod && n.net.blocked == nil {
			return applied, nil
		}
		if err == nil {
			for _, c := range plan.Changes {
				applied = append(applied, c.Text)
			}
			err = n.net.Pool().Apply(n.t.Context(), plan)
		}
		switch {
		case errors.Is(err, errKilled) || node.ClassOf(err) == node.ClassTerminal && err != nil:
			return applied, err
		case err != nil || plan.Empty():
			time.Sleep(time.Second)
		}
	}
	return applied, fmt.Errorf("not converged after %s: %w", limit, err)
}

// holds checks that the cloud has one secondary ENI with so many addresses, that
// it is attached, and that the pool uses exactly those.
func (n *poolNode) holds(addresses int) {
	n.t.Helper()
	var secondary []cloud.ENI
	for _, e := range n.region.Snapshot().ENIs {
		if !e.Primary {
			secondary = append(secondary, e)
		}
	}
	if len(secondary) != 1 || secondary[0].Instance != n.sealed.Facts.InstanceID || len(secondary[0].IPs) != addresses+1 {
		n.t.Fatalf("secondary ENIs: %+v; want one, attached, with %d addresses", secondary, addresses)
	}
	s, err := n.net.ledger.state()
	if err != nil {
		n.t.Fatal(err)
	}
	slot := s.Slots[0]
	if slot.ENI != secondary[0].ID || slot.Primary != secondary[0].IPs[0].Addr || len(slot.Addrs) != addresses || slot.Intent != "" {
		n.t.Fatalf("slot %+v; the ENI is %+v", slot, secondary[0])
	}
	if err := n.paired(slot, secondary[0]); err != nil {
		n.t.Fatal(err)
	}
}

func TestPoolConverges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPoolNode(t)
		began := time.Now()
		applied, err := n.run(time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("after %s:\n%s", time.Since(began), strings.Join(applied, "\n"))
		n.holds(8)
		// 3.5 s until it is attached, 2 s until that shows, and one poll.
		if took := time.Since(began); took > 6500*time.Millisecond {
			t.Errorf("took %s with the lab's delays", took)
		}

		n.sealed.Config.Network.IPsPerENI, n.sealed.Config.Network.WarmIPs = 9, node.WarmIPs{Min: 9, Max: 9}
		if _, err := n.run(time.Minute); err != nil {
			t.Fatal(err)
		}
		n.holds(9)
		n.restart()
		if applied, err := n.run(time.Minute); err != nil || len(applied) != 0 {
			t.Errorf("after a restart: %v, applied %q", err, applied)
		}
		want := map[string]int{"vpc:CreateAndAttachNetworkInterface": 1, "vpc:AssignPrivateIpAddresses": 1}
		if calls := n.mutations(); !maps.Equal(calls, want) {
			t.Errorf("calls: %v, want %v", calls, want)
		}
	})
}

var errKilled = errors.New("killed")

// killer kills the agent at the nth mutating call, before or after it.
type killer struct {
	Cloud
	at    int
	after bool
	calls int
}

func (k *killer) call(f func() error) error {
	k.calls++
	if k.calls != k.at {
		return f()
	}
	if k.after {
		f()
	}
	return errKilled
}

func (k *killer) CreateENI(ctx context.Context, spec tencent.ENISpec) (e tencent.ENI, task string, err error) {
	err = k.call(func() error { e, task, err = k.Cloud.CreateENI(ctx, spec); return err })
	return e, task, err
}

func (k *killer) AttachENI(ctx context.Context, eni, instance string, attachType int, token string) (task string, err error) {
	err = k.call(func() error { task, err = k.Cloud.AttachENI(ctx, eni, instance, attachType, token); return err })
	return task, err
}

func (k *killer) UnassignIPs(ctx context.Context, eni string, addrs []netip.Addr) (task string, err error) {
	err = k.call(func() error { task, err = k.Cloud.UnassignIPs(ctx, eni, addrs); return err })
	return task, err
}

func (k *killer) DetachENI(ctx context.Context, eni, instance, token string) (task string, err error) {
	err = k.call(func() error { task, err = k.Cloud.DetachENI(ctx, eni, instance, token); return err })
	return task, err
}

func (k *killer) DeleteENI(ctx context.Context, eni string) (task string, err error) {
	err = k.call(func() error { task, err = k.Cloud.DeleteENI(ctx, eni); return err })
	return task, err
}

func (k *killer) AssignIPs(ctx context.Context, eni string, count int, token string) (ips []tencent.IP, task string, err error) {
	err = k.call(func() error { ips, task, err = k.Cloud.AssignIPs(ctx, eni, count, token); return err })
	return ips, task, err
}

// TestPoolSurvivesKills kills the agent before and after every call, with the
// ledger and without it; there is one ENI in the end.
func TestPoolSurvivesKills(t *testing.T) {
	for name, c := range map[string]struct {
		at     int               // which call of its life
		fault  cloud.Fault       // in the launch
		change func(n *poolNode) // after it; nil: killed in the launch
	}{
		"create":                    {at: 1},
		"attach what creation left": {at: 2, fault: cloud.Fault{Action: "vpc:CreateAndAttachNetworkInterface", Fail: true}},
		"attach what is torn out":   {at: 2, change: (*poolNode).tearOut},
		"assign":                    {at: 2, change: (*poolNode).takeAddress},
	} {
		for _, after := range []bool{false, true} {
			for _, lost := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s,after=%v,ledger lost=%v", name, after, lost), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						n := newPoolNode(t)
						if c.fault != (cloud.Fault{}) {
							n.region.Inject(c.fault)
						}
						n.net.pool.cloud = &killer{Cloud: n.api, at: c.at, after: after}
						_, err := n.run(time.Minute)
						if c.change != nil {
							if err != nil {
								t.Fatal(err)
							}
							c.change(n)
							_, err = n.run(3 * time.Minute)
						}
						if !errors.Is(err, errKilled) {
							t.Fatalf("not killed: %v", err)
						}
						if lost {
							time.Sleep(3 * time.Second) // as long as the cloud shows nothing, nobody can know
							n.net.Close()
							if err := os.RemoveAll(n.dir); err != nil {
								t.Fatal(err)
							}
						}
						n.restart()
						if _, err := n.run(2 * time.Minute); err != nil {
							t.Fatal(err)
						}
						n.holds(8)
					})
				})
			}
		}
	}
}

// takeAddress takes an address of the ENI away, behind the pool's back.
func (n *poolNode) takeAddress() {
	n.t.Helper()
	s, err := n.net.ledger.state()
	if err != nil {
		n.t.Fatal(err)
	}
	slot := s.Slots[0]
	if _, err := n.api.UnassignIPs(n.t.Context(), slot.ENI, slot.Addrs[:1]); err != nil {
		n.t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
}

// tearOut detaches the ENI, behind the pool's back.
func (n *poolNode) tearOut() {
	n.t.Helper()
	for _, slot := range n.state().slots() {
		if !slot.taken() {
			continue
		}
		if _, err := n.api.DetachENI(n.t.Context(), slot.ENI, n.sealed.Facts.InstanceID, rand.Text()); err != nil {
			n.t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		if e := n.eni(slot.ENI); e.Instance != "" || e.State != tencent.StateAvailable {
			n.t.Fatalf("torn out, and %+v", e)
		}
		return
	}
	n.t.Fatal("no ENI to tear out")
}

// eni returns an ENI as the cloud has it.
func (n *poolNode) eni(id string) cloud.ENI {
	for _, e := range n.region.Snapshot().ENIs {
		if e.ID == id {
			return e
		}
	}
	return cloud.ENI{}
}

// TestPoolFaults makes the cloud refuse and hang up; the pool says why, and gets
// there when the cloud does.
func TestPoolFaults(t *testing.T) {
	const create, attach = "vpc:CreateAndAttachNetworkInterface", "vpc:AttachNetworkInterface"
	for _, f := range []struct {
		name  string
		fault cloud.Fault // of attach: after the ENI is torn out
		want  string      // of the error while the fault lasts
	}{
		{"throttled", cloud.Fault{Action: create, Code: "RequestLimitExceeded", Times: 3}, "transient Throttled"},
		{"subnet exhausted", cloud.Fault{Action: create, Code: "ResourceInsufficient.Subnet", Times: 3}, "waiting SubnetExhausted"},
		{"quota reached", cloud.Fault{Action: create, Code: "LimitExceeded"}, "terminal QuotaExceeded"},
		{"unauthorized", cloud.Fault{Action: create, Code: "UnauthorizedOperation", Times: 1}, "terminal Unauthorized"},
		{"attach mutex", cloud.Fault{Action: attach, Code: tencent.CodeMutexTaskRunning, Times: 3}, "waiting TaskRunning"},
		{"attach wrong state", cloud.Fault{Action: attach, Code: "UnsupportedOperation.InvalidState", Times: 3}, "waiting WrongState"},
		{"describe fails", cloud.Fault{Action: "vpc:DescribeNetworkInterfaces", Code: "InternalError", Times: 3}, "DescribeNetworkInterfaces: InternalError"},
		{"creation's answer lost", cloud.Fault{Action: create, Drop: true}, "CreateAndAttachNetworkInterface: Post"},
		{"attachment's answer lost", cloud.Fault{Action: attach, Drop: true}, "AttachNetworkInterface: Post"},
		{"creation fails inside", cloud.Fault{Action: create, Code: "InternalError"}, "CreateAndAttachNetworkInterface: InternalError"},
	} {
		t.Run(f.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newPoolNode(t)
				if f.fault.Action == attach {
					if _, err := n.run(time.Minute); err != nil {
						t.Fatal(err)
					}
					n.tearOut()
				}
				n.region.Inject(f.fault)
				var seen []string
				for range 120 {
					_, err := n.run(time.Millisecond)
					if err == nil {
						break
					}
					seen = append(seen, fmt.Sprintf("%s %s: %v", node.ClassOf(err), node.ReasonOf(err, ""), err))
				}
				if !strings.Contains(strings.Join(seen, "\n"), f.want) {
					t.Errorf("errors\n%s\nwant %q among them", strings.Join(seen, "\n"), f.want)
				}
				if _, err := n.run(time.Minute); err != nil {
					t.Fatal(err)
				}
				n.holds(8)
			})
		})
	}
}

// TestPoolAttachesWhatCreationLeft: an ENI that its creation has not attached is
// attached by a call of its own: at once where the task says that it has failed, and
// otherwise once nothing is to be expected any more.
func TestPoolAttachesWhatCreationLeft(t *testing.T) {
	const create, attach = "vpc:CreateAndAttachNetworkInterface", "vpc:AttachNetworkInterface"
	for name, c := range map[string]struct {
		faults   []cloud.Fault
		restart  bool // when the answer is there
		least    time.Duration
		most     time.Duration
		attaches int
	}{
		"failed":             {[]cloud.Fault{{Action: create, Fail: true}}, false, 0, 10 * time.Second, 1},
		"failed, restarted":  {[]cloud.Fault{{Action: create, Fail: true}}, true, 0, 10 * time.Second, 1},
		"failed, not told":   {[]cloud.Fault{{Action: create, Fail: true}, {Action: "vpc:DescribeVpcTaskResult", Code: "InternalError", Times: 1000}}, false, patience, patience + 10*time.Second, 1},
		"failed, lost":       {[]cloud.Fault{{Action: create, Fail: true, Drop: true}}, false, patience, patience + 10*time.Second, 1},
		"vanished":           {[]cloud.Fault{{Action: create, Vanish: true}}, false, patience, patience + 10*time.Second, 1},
		"failed twice":       {[]cloud.Fault{{Action: create, Fail: true}, {Action: attach, Fail: true}}, false, patience, patience + 15*time.Second, 2},
		"failed and refused": {[]cloud.Fault{{Action: create, Fail: true}, {Action: attach, Code: tencent.CodeMutexTaskRunning, Times: 2}}, false, 0, 15 * time.Second, 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newPoolNode(t)
				for _, f := range c.faults {
					n.region.Inject(f)
				}
				began := time.Now()
				if c.restart {
					for len(n.state().Slots) == 0 {
						n.run(time.Millisecond)
					}
					n.restart()
				}
				applied, err := n.run(2 * time.Minute)
				if err != nil {
					t.Fatal(err)
				}
				n.holds(8)
				if took := time.Since(began); took < c.least || took > c.most {
					t.Errorf("took %s, want %s to %s:\n%s", took, c.least, c.most, strings.Join(applied, "\n"))
				}
				if calls := n.mutations(); calls[create] != 1 || calls[attach] != c.attaches {
					t.Errorf("calls: %v", calls)
				}
			})
		})
	}
}

// early shows an ENI that is being created and attached as AVAILABLE and attached to
// nothing, which the cloud may do between the two.
type early struct {
	Cloud
	shown int
}

func (c *early) DescribeTaggedENIs(ctx context.Context, tags map[string]string) ([]tencent.ENI, error) {
	enis, err := c.Cloud.DescribeTaggedENIs(ctx, tags)
	for i, e := range enis {
		if e.State == tencent.StatePending || e.State == tencent.StateAttaching {
			enis[i].State, enis[i].Attachment = tencent.StateAvailable, nil
			c.shown++
		}
	}
	return enis, err
}

// TestPoolWaitsForCreation: an ENI that is shown before it is attached is waited for,
// whether the creation's answer has said that it is ours or only its tags do.
func TestPoolWaitsForCreation(t *testing.T) {
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprintf("answer lost=%v", lost), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newPoolNode(t)
				if lost {
					n.region.Inject(cloud.Fault{Action: "vpc:CreateAndAttachNetworkInterface", Drop: true})
				}
				c := &early{Cloud: n.api}
				n.net.pool.cloud = c
				if _, err := n.run(time.Minute); err != nil {
					t.Fatal(err)
				}
				n.holds(8)
				if calls := n.mutations(); calls["vpc:CreateAndAttachNetworkInterface"] != 1 || calls["vpc:AttachNetworkInterface"] != 0 || c.shown == 0 {
					t.Errorf("shown %d times; calls: %v", c.shown, calls)
				}
			})
		})
	}
}

// TestPoolFollowsTheCloud changes the cloud behind the pool's back.
func TestPoolFollowsTheCloud(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPoolNode(t)
		if _, err := n.run(time.Minute); err != nil {
			t.Fatal(err)
		}
		n.takeAddress()
		applied, err := n.run(time.Minute)
		if err != nil || !strings.HasPrefix(applied[0], "stop using address") {
			t.Fatalf("%v, applied %q", err, applied)
		}
		n.holds(8)

		s, _ := n.net.ledger.state()
		first := s.Slots[0].ENI
		n.tearOut()
		if _, err := n.run(time.Minute); err != nil {
			t.Fatal(err)
		}
		n.holds(8)
		if s, _ = n.net.ledger.state(); s.Slots[0].ENI != first {
			t.Errorf("%s was detached, and %s attached", first, s.Slots[0].ENI)
		}

		n.tearOut()
		if _, err := n.api.DeleteENI(t.Context(), first); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		if _, err := n.run(2 * time.Minute); err != nil {
			t.Fatal(err)
		}
		n.holds(8)
		if s, _ = n.net.ledger.state(); s.Slots[0].ENI == first || s.Slots[0].Generation != 1 {
			t.Errorf("slot %+v", s.Slots[0])
		}
	})
}
