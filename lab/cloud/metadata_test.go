package cloud_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// read returns the status and the body of a path below /latest/.
func (l *lab) read(t *testing.T, path string) (int, string) {
	t.Helper()
	resp, err := l.metadata.HTTP.Get(tencent.MetadataURL + "/latest/" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestMetadataFacts(t *testing.T) {
	l := newLab(t, cloud.Default())
	f, err := l.metadata.Facts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if f, err = l.api.Facts(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	want := node.Facts{
		InstanceID: l.instance.ID, InstanceType: "S5.MEDIUM4", Region: "ap-guangzhou", Zone: "ap-guangzhou-3", ZoneID: 100003, ENIQuota: 4, IPQuota: 10, ExtendENIQuota: 10,
		VPCID: "vpc-lab00001", SubnetID: "subnet-node0001", MAC: f.MAC, PrivateIP: l.instance.PrivateIP, Hostname: host, CAMRole: "TKENodeRole",
	}
	for _, d := range l.Snapshot().Disks {
		if !d.System {
			want.DataDisks = append(want.DataDisks, d.ID)
		}
	}
	if len(want.DataDisks) != 1 || !reflect.DeepEqual(f, want) || !strings.HasPrefix(f.MAC, "52:54:00:") || f.PrivateIP.String() != "10.0.0.30" {
		t.Errorf("facts %+v\nwant %+v", f, want)
	}
	if _, err := l.api.ZoneID(t.Context(), "ap-guangzhou-9"); err == nil {
		t.Error("a zone that is not there has an id")
	}
	if b, err := l.metadata.UserData(t.Context()); err != nil || string(b) != "kind: NodeConfig\n" {
		t.Errorf("user-data %q, %v", b, err)
	}
}

func TestMetadataPaths(t *testing.T) {
	l := newLab(t, instant())
	eni := l.attached(t, "eni")
	mac := strings.ToUpper(eni.MAC)
	ip := eni.IPs[0].Addr.String()
	for path, want := range map[string]string{
		"meta-data/instance-id": l.instance.ID,
		"meta-data/instance/":   "image-id\ninstance-type\nsecurity-group",
		"meta-data/placement":   "region\nzone",
		"meta-data/network/":    "interfaces/",
		"meta-data/network/interfaces/macs/" + mac + "/subnet-id":                          "subnet-pods0001",
		"meta-data/network/interfaces/macs/" + mac + "/local-ipv4s/":                       ip + "/",
		"meta-data/network/interfaces/macs/" + mac + "/local-ipv4s/" + ip + "/gateway":     "10.0.16.1",
		"meta-data/network/interfaces/macs/" + mac + "/local-ipv4s/" + ip + "/subnet-mask": "255.255.240.0",
		"meta-data/cam/security-credentials/":                                              "TKENodeRole",
		"user-data":                                                                        "kind: NodeConfig\n",
	} {
		if status, got := l.read(t, path); status != http.StatusOK || got != want {
			t.Errorf("%s is %d %q, want %q", path, status, got, want)
		}
	}
	for _, path := range []string{
		"", "meta-data/Instance-id", "meta-data/instance-id/", "meta-data/hostname", "meta-dataX", "meta-data/network/interfaces/MACS/" + mac + "/mac",
		"meta-data/spot/termination-time", "user-data/", "meta-data/cam/security-credentials/Other",
	} {
		if status, got := l.read(t, path); status != http.StatusNotFound {
			t.Errorf("%q is %d %q, want 404", path, status, got)
		}
	}
	if _, got := l.read(t, "meta-data/volumes/"); !strings.HasPrefix(got, "disk-") || len(got) != len("disk-00000000/") {
		t.Errorf("volumes are %q, want the data disk alone", got)
	}
	at := time.Date(2026, 9, 1, 4, 0, 0, 0, time.UTC)
	if err := l.NoticeSpot(l.instance.ID, at); err != nil {
		t.Fatal(err)
	}
	if _, got := l.read(t, "meta-data/spot/termination-time"); got != "2026-09-01 12:00:00" {
		t.Errorf("termination time %q, want it in UTC+8", got)
	}
}

// TestMetadataSource: an instance sees itself, by any of its addresses, and
// nobody else sees anything.
func TestMetadataSource(t *testing.T) {
	l := newLab(t, instant())
	eni := l.attached(t, "eni")
	other, err := l.Launch(t.Context(), cloud.InstanceSpec{})
	if err != nil {
		t.Fatal(err)
	}
	for source, want := range map[string]string{
		l.instance.PrivateIP.String(): l.instance.ID,
		eni.IPs[0].Addr.String():      l.instance.ID,
		other.PrivateIP.String():      other.ID,
		"10.0.0.99":                   "404 Not Found\n",
	} {
		req := httptest.NewRequest(http.MethodGet, "http://metadata.tencentyun.com/latest/meta-data/instance-id", nil)
		req.RemoteAddr = source + ":1234"
		w := httptest.NewRecorder()
		l.Metadata().ServeHTTP(w, req)
		if w.Body.String() != want {
			t.Errorf("from %s: %q, want %q", source, w.Body, want)
		}
		if in, ok := l.InstanceAt(netip.MustParseAddr(source)); ok != (w.Code == http.StatusOK) || ok && in.ID != want {
			t.Errorf("instance at %s: %s, %t", source, in.ID, ok)
		}
	}
}

func TestMetadataFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, instant())
		start := time.Now()
		took := func(what string, least, most time.Duration) {
			t.Helper()
			if _, err := l.metadata.Facts(t.Context()); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if d := time.Since(start); d < least || d > most {
				t.Errorf("%s: facts are there after %s", what, d)
			}
			start = time.Now()
		}
		took("healthy", 0, 0)
		l.InjectMetadata(cloud.MetadataFault{For: time.Minute, Status: 500})
		took("500 for a minute", time.Minute, 66*time.Second)
		l.InjectMetadata(cloud.MetadataFault{For: time.Minute, Silent: true})
		took("no answer for a minute", time.Minute, 66*time.Second)

		l.InjectMetadata(cloud.MetadataFault{For: time.Hour, Silent: true})
		ctx, cancel := context.WithTimeout(t.Context(), 12*time.Second)
		defer cancel()
		if _, err := l.metadata.UserData(ctx); node.ReasonOf(err, "") != "MetadataLate" {
			t.Errorf("no answer at all: %v", err)
		}
		l.ClearFaults()
		start = time.Now()
		took("cleared", 0, 0)
	})
}

func TestMetadataStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, cloud.Default())
		time.Sleep(time.Minute)
		eni := l.attached(t, "eni")
		macs := func() string {
			_, s := l.read(t, "meta-data/network/interfaces/macs/")
			return s
		}
		mac := strings.ToUpper(eni.MAC)
		if strings.Contains(macs(), mac) {
			t.Error("the ENI is there before changes are visible")
		}
		time.Sleep(2 * time.Second)
		if !strings.Contains(macs(), mac) {
			t.Error("the ENI is not there")
		}
		l.InjectMetadata(cloud.MetadataFault{For: time.Hour, Stale: 30 * time.Second})
		if strings.Contains(macs(), mac) || !strings.Contains(macs(), "52:54:00") {
			t.Errorf("30 s stale: %q", macs())
		}
		time.Sleep(30 * time.Second)
		if !strings.Contains(macs(), mac) {
			t.Error("30 s later the ENI is not there")
		}
	})
}
