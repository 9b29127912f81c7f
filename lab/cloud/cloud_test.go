package cloud_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// machines is a hypervisor and a fabric that keep books. Both refuse what the
// real ones would.
type machines struct {
	mu      sync.Mutex
	running map[string]cloud.Machine
	devices map[string]string // device -> instance
	ports   map[string][]netip.Addr
	fail    error // returned by the next call, once
	slow    time.Duration
}

func newMachines() *machines {
	return &machines{running: map[string]cloud.Machine{}, devices: map[string]string{}, ports: map[string][]netip.Addr{}}
}

func (m *machines) lock() (func(), error) {
	time.Sleep(m.slow)
	m.mu.Lock()
	err := m.fail
	m.fail = nil
	return m.mu.Unlock, err
}

func (m *machines) Run(_ context.Context, in cloud.Machine) error {
	unlock, err := m.lock()
	defer unlock()
	if err == nil {
		m.running[in.Instance] = in
		for _, n := range in.NICs {
			if m.ports[n.ENI] == nil {
				return fmt.Errorf("NIC %s has no port", n.ENI)
			}
			m.devices[n.ENI] = in.Instance
		}
		for _, v := range in.Volumes {
			m.devices[v.Disk] = in.Instance
		}
	}
	return err
}

func (m *machines) Destroy(_ context.Context, instance string) error {
	unlock, err := m.lock()
	defer unlock()
	for d, i := range m.devices {
		if i == instance {
			delete(m.devices, d)
		}
	}
	delete(m.running, instance)
	return err
}

func (m *machines) plug(instance, device string) error {
	unlock, err := m.lock()
	defer unlock()
	switch {
	case err != nil:
		return err
	case m.running[instance].Instance == "":
		return fmt.Errorf("instance %s does not run", instance)
	case m.devices[device] != "":
		return fmt.Errorf("device %s is in %s", device, m.devices[device])
	}
	m.devices[device] = instance
	return nil
}

func (m *machines) unplug(instance, device string) error {
	unlock, err := m.lock()
	defer unlock()
	if err == nil && m.devices[device] != instance {
		err = fmt.Errorf("device %s is not in %s", device, instance)
	}
	if err == nil {
		delete(m.devices, device)
	}
	return err
}

func (m *machines) PlugNIC(_ context.Context, instance string, n cloud.NIC) error {
	return m.plug(instance, n.ENI)
}
func (m *machines) UnplugNIC(_ context.Context, instance, eni string) error {
	return m.unplug(instance, eni)
}
func (m *machines) PlugDisk(_ context.Context, instance string, v cloud.Volume) error {
	return m.plug(instance, v.Disk)
}
func (m *machines) ResizeDisk(_ context.Context, instance string, v cloud.Volume) error {
	unlock, err := m.lock()
	defer unlock()
	if err == nil && m.devices[v.Disk] != instance {
		err = fmt.Errorf("disk %s is not in %q", v.Disk, instance)
	}
	return err
}
func (m *machines) UnplugDisk(_ context.Context, instance, disk string) error {
	return m.unplug(instance, disk)
}

func (m *machines) Attach(p cloud.Port) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ports[p.ENI] != nil {
		return fmt.Errorf("port %s is attached", p.ENI)
	}
	m.ports[p.ENI] = p.Addrs
	return nil
}

func (m *machines) SetAddrs(eni string, addrs []netip.Addr) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ports[eni] == nil {
		return fmt.Errorf("port %s is not attached", eni)
	}
	m.ports[eni] = slices.Clone(addrs)
	return nil
}

func (m *machines) Detach(eni string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ports[eni] == nil {
		return fmt.Errorf("port %s is not attached", eni)
	}
	if m.devices[eni] != "" {
		return fmt.Errorf("port %s still has its NIC", eni)
	}
	delete(m.ports, eni)
	return nil
}

func (m *machines) holds(device string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.devices[device]
}

func (m *machines) addrs(eni string) []netip.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ports[eni]
}

// direct calls a handler in place, so that tests can run in a synctest bubble.
type direct struct {
	handler http.Handler
	remote  string // the source address
	seen    func(req *http.Request, params, answer []byte)
	change  func(req *http.Request)
}

func (d *direct) RoundTrip(req *http.Request) (resp *http.Response, err error) {
	req = req.Clone(req.Context())
	if req.Host == "" {
		req.Host = req.URL.Host
	}
	var params []byte
	if req.Body != nil {
		if params, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
	}
	req.Body = io.NopCloser(bytes.NewReader(params))
	req.RemoteAddr = d.remote + ":40000"
	if d.change != nil {
		d.change(req)
	}
	defer func() {
		if v := recover(); v != nil {
			if v != http.ErrAbortHandler {
				panic(v)
			}
			err = io.ErrUnexpectedEOF
			if req.Context().Err() != nil {
				err = req.Context().Err()
			}
		}
	}()
	w := httptest.NewRecorder()
	d.handler.ServeHTTP(w, req)
	if d.seen != nil {
		d.seen(req, params, w.Body.Bytes())
	}
	return w.Result(), nil
}

// lab is a region with one instance, and the clients of that instance.
type lab struct {
	*cloud.Region
	machines *machines
	instance cloud.Instance
	metadata *tencent.Metadata
	api      *tencent.Client
	wire     *direct // of the API
}

// instant is the default region without delays.
func instant() cloud.Config {
	c := cloud.Default()
	c.Delays = cloud.Delays{}
	return c
}

func newLab(t *testing.T, config cloud.Config) *lab {
	t.Helper()
	config.Log = slog.New(slog.DiscardHandler)
	l := &lab{machines: newMachines()}
	var err error
	if l.Region, err = cloud.New(config, l.machines, l.machines); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	l.instance, err = l.Launch(t.Context(), cloud.InstanceSpec{UserData: []byte("kind: NodeConfig\n"), DataDisks: []cloud.DiskSpec{{SizeGiB: 20}}})
	if err != nil {
		t.Fatal(err)
	}
	source := l.instance.PrivateIP.String()
	l.metadata = tencent.NewMetadata(tencent.MetadataURL)
	l.metadata.HTTP.Transport = &direct{handler: l.Metadata(), remote: source}
	l.wire = &direct{handler: l.API(), remote: source}
	l.wire.seen = func(req *http.Request, params, answer []byte) { checkFields(t, req, params, answer) }
	l.api, err = tencent.NewClient(node.CloudConfig{APIDomain: config.Domain}, config.Region, l.metadata)
	if err != nil {
		t.Fatal(err)
	}
	l.api.HTTP.Transport = l.wire
	return l
}

// spec is an ENI that the region accepts, for the instance.
func (l *lab) spec(token string) tencent.ENISpec {
	return tencent.ENISpec{
		VPCID: "vpc-lab00001", SubnetID: "subnet-pods0001", Name: "tkenode", SecurityGroupIDs: []string{"sg-lab00001"},
		Tags: []tencent.Tag{{Key: "tkenode", Value: "cls-lab00001"}}, InstanceID: l.instance.ID, ClientToken: token,
	}
}

// code returns the code of the API's refusal, to whichever client.
func code(err error) string {
	if c := sdkCode(err); c != "" {
		return c
	}
	if e, ok := errors.AsType[*tencent.APIError](err); ok {
		return e.Code
	}
	return fmt.Sprint(err)
}

// await polls a task until it has ended, and wants that to be well.
func (l *lab) await(t *testing.T, task string, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	for {
		got, err := l.api.TaskResult(t.Context(), task)
		if err != nil {
			t.Fatal(err)
		}
		switch got.Status {
		case tencent.TaskSuccess:
			return
		case tencent.TaskFailed:
			t.Fatalf("task %s failed: %s", task, got.Output)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// attached creates an ENI that is attached.
func (l *lab) attached(t *testing.T, token string) tencent.ENI {
	t.Helper()
	eni, task, err := l.api.CreateENI(t.Context(), l.spec(token))
	l.await(t, task, err)
	return eni
}

// detached creates an ENI that is attached to nothing.
func (l *lab) detached(t *testing.T) cloud.ENI {
	t.Helper()
	eni, err := l.CreateENI("subnet-pods0001", cloud.Tag{Key: "tkenode", Value: "cls-lab00001"})
	if err != nil {
		t.Fatal(err)
	}
	return eni
}

// now returns an ENI as it is, not as it is described.
func (l *lab) now(eni string) cloud.ENI {
	for _, e := range l.Snapshot().ENIs {
		if e.ID == eni {
			return e
		}
	}
	return cloud.ENI{}
}
