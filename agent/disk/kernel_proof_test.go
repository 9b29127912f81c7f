//go:build kernel

package disk

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// truncate makes a file as large as it is to be.
func truncate(t *testing.T, file string, size int64) {
	t.Helper()
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
}

// settle does what the engine does until something other than a proof is in the way.
func (b *bench) settle(t *testing.T) (said []string, err error) {
	t.Helper()
	for range 600 {
		var p node.Plan
		if p, err = b.plan(t); err == nil && p.Empty() {
			return said, nil
		}
		if err == nil {
			err = b.Apply(t.Context(), p)
		}
		if err != nil && node.ReasonOf(err, "") != "Proving" {
			return said, err
		}
		if err != nil {
			said = append(said, err.Error())
			time.Sleep(100 * time.Millisecond)
		}
	}
	t.Fatalf("no end: %v", err)
	return nil, nil
}

// TestKernelByteInTheMiddle: nothing but a full read finds it.
func TestKernelByteInTheMiddle(t *testing.T) {
	b := newBench(t, node.XFS, func(f string) {
		truncate(t, f, 3<<30)
		poke(t, f, 1700<<20+4097, 0x5a)
	})
	_, err := b.settle(t)
	if node.ReasonOf(err, "") != "Foreign" || !strings.Contains(err.Error(), "1782583297: 5a") {
		t.Errorf("error %v", err)
	}
	if b.proof != nil {
		t.Error("the disk is still claimed")
	}
	if p, err := b.plan(t); node.ReasonOf(err, "") != "Foreign" || !p.Empty() {
		t.Errorf("the next plan: %v%v", p, err)
	}
	if st := b.State(); st.State != "Foreign" || len(st.Evidence) < 4 || len(st.Steps) < 2 {
		t.Errorf("state %+v", st)
	}
	poke(t, "/dev/"+b.loop, 1700<<20+4097, 0)
	if _, err := b.settle(t); err != nil {
		t.Errorf("after it was cleared: %v", err)
	}
	if got := b.State(); got.State != Mounted || !strings.Contains(got.Proof, "every block") {
		t.Errorf("state %+v", got)
	}
}

// TestKernelReadingIsGivenUp when the disk is used by somebody, or the agent ends.
func TestKernelReadingIsGivenUp(t *testing.T) {
	for name, end := range map[string]func(*bench){
		"closed":       func(b *bench) { b.Close() },
		"other serial": func(b *bench) { b.setSerial(t, "disk-other000") },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, node.Ext4, func(f string) { truncate(t, f, 64<<30) })
			b.patience = 1100 * time.Millisecond // from a second on, the rate is told
			p, err := b.plan(t)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Apply(t.Context(), p); node.ReasonOf(err, "") != "Proving" || node.ClassOf(err) != node.ClassWaiting {
				t.Fatal(err)
			}
			if p, err := b.plan(t); node.ReasonOf(err, "") != "Proving" || p.Again != progressEvery {
				t.Errorf("plan meanwhile: %v, %v", p.Again, err)
			}
			if st := b.State(); st.State != "Proving" || !strings.Contains(st.Message, "MiB/s") {
				t.Errorf("state %+v", st)
			}
			end(b)
			// A device of which no read has ended for a moment is not asked who it is.
			for n := 0; ; n++ {
				if _, err := b.plan(t); b.proof == nil {
					break
				} else if n == 100 {
					t.Fatalf("still reading: %v", err)
				}
			}
		})
	}
}

// TestKernelWrittenMeanwhile: what was written behind the reader's back is found.
func TestKernelWrittenMeanwhile(t *testing.T) {
	b := newBench(t, node.Ext4, func(f string) { truncate(t, f, 24<<30) })
	b.patience = 0
	p, err := b.plan(t)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Apply(t.Context(), p); node.ReasonOf(err, "") != "Proving" {
		t.Fatal(err)
	}
	for b.proof.read.Load() < 200<<20 {
		time.Sleep(time.Millisecond)
	}
	f, err := os.OpenFile("/dev/"+b.loop, os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("data"), 100<<20) // it has been read already
	f.Close()
	<-b.proof.done
	b.patience = readPatience
	if p, err = b.plan(t); err != nil || p.Empty() {
		t.Fatalf("%v%v", p, err)
	}
	if err := b.Apply(t.Context(), p); err == nil || !strings.Contains(err.Error(), "somebody wrote to") {
		t.Errorf("error %v", err)
	}
}

// direct carries requests to a server in this process, from an address.
type direct struct {
	handler http.Handler
	remote  string
}

func (d direct) RoundTrip(req *http.Request) (*http.Response, error) {
	req = req.Clone(req.Context())
	req.RemoteAddr = d.remote + ":1"
	w := httptest.NewRecorder()
	d.handler.ServeHTTP(w, req)
	return w.Result(), nil
}

// idle is a hypervisor and a network of which nothing is asked.
type idle struct{}

func (idle) Run(context.Context, cloud.Machine) error               { return nil }
func (idle) Destroy(context.Context, string) error                  { return nil }
func (idle) PlugNIC(context.Context, string, cloud.NIC) error       { return nil }
func (idle) UnplugNIC(context.Context, string, string) error        { return nil }
func (idle) PlugDisk(context.Context, string, cloud.Volume) error   { return nil }
func (idle) ResizeDisk(context.Context, string, cloud.Volume) error { return nil }
func (idle) UnplugDisk(context.Context, string, string) error       { return nil }
func (idle) Attach(cloud.Port) error                                { return nil }
func (idle) SetAddrs(string, []netip.Addr) error                    { return nil }
func (idle) Detach(string) error                                    { return nil }

// TestKernelVouched: a disk of 20 GiB that came with its instance is formatted at
// once; where the role may not ask, all of it is read, and the reason said.
func TestKernelVouched(t *testing.T) {
	for name, policy := range map[string]string{"": string(tencent.Policy), "denied": `{"version":"2.0","statement":[{"effect":"allow","action":["name/vpc:DescribeSubnets"],"resource":["*"]}]}`} {
		t.Run(name, func(t *testing.T) {
			config := cloud.Default()
			config.Delays, config.Log, config.Policy = cloud.Delays{}, slog.New(slog.DiscardHandler), []byte(policy)
			region, err := cloud.New(config, idle{}, idle{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(region.Close)
			in, err := region.Launch(t.Context(), cloud.InstanceSpec{DataDisks: []cloud.DiskSpec{{SizeGiB: 20}}})
			if err != nil {
				t.Fatal(err)
			}
			metadata := tencent.NewMetadata("")
			metadata.HTTP.Transport = direct{region.Metadata(), in.PrivateIP.String()}
			client, err := tencent.NewClient(node.CloudConfig{APIDomain: config.Domain}, config.Region, metadata)
			if err != nil {
				t.Fatal(err)
			}
			client.HTTP.Transport = direct{region.API(), in.PrivateIP.String()}

			b := newBench(t, node.Ext4, func(f string) { truncate(t, f, 20<<30) })
			b.patience = 0
			b.sealed.Generation, b.firstBoot, b.cloud = 1, true, client
			if b.sealed.Facts, err = metadata.Facts(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.want.DiskID = "" // the only one
			b.setSerial(t, b.sealed.Facts.DataDisks[0])
			if name == "" {
				if got := b.converge(t); strings.Count(got, "\n") != 2 {
					t.Errorf("plan %q", got)
				}
				if st := b.State(); st.State != Mounted || !strings.HasPrefix(st.Proof, "new, as the cloud says") {
					t.Errorf("state %+v", st)
				}
				return
			}
			p, err := b.plan(t)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Apply(t.Context(), p); node.ReasonOf(err, "") != "Proving" || !strings.Contains(err.Error(), "cloud API: cannot be asked: cbs DescribeDisks: AuthFailure.UnauthorizedOperation") {
				t.Errorf("error %v", err)
			}
		})
	}
}
