package tencent

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// service answers as a metadata service does, without a network, so that tests
// run in a synctest bubble.
type service struct {
	answers map[string]string
	calls   int
	// trouble, when not nil, answers first.
	trouble func(call int) (*http.Response, error)
}

func (s *service) RoundTrip(req *http.Request) (*http.Response, error) {
	s.calls++
	if s.trouble != nil {
		if resp, err := s.trouble(s.calls); resp != nil || err != nil {
			return resp, err
		}
	}
	if body, ok := s.answers[strings.TrimPrefix(req.URL.Path, "/latest/")]; ok {
		return response(http.StatusOK, body), nil
	}
	return response(http.StatusNotFound, ""), nil
}

func response(status int, body string) *http.Response {
	return &http.Response{StatusCode: status, Body: io.NopCloser(strings.NewReader(body))}
}

func (s *service) client() *Metadata {
	m := NewMetadata("")
	m.HTTP.Transport = s
	return m
}

func healthy() map[string]string {
	return map[string]string{
		"meta-data/instance-id":                                         "ins-abcd1234",
		"meta-data/instance/instance-type":                              "S5.MEDIUM4",
		"meta-data/placement/region":                                    "ap-guangzhou",
		"meta-data/placement/zone":                                      "ap-guangzhou-3\n",
		"meta-data/mac":                                                 "52:54:00:AA:BB:01",
		"meta-data/local-ipv4":                                          "10.0.0.30",
		"meta-data/network/interfaces/macs/":                            "52:54:00:AA:BB:02/\n52:54:00:AA:BB:01/\n",
		"meta-data/network/interfaces/macs/52:54:00:AA:BB:01/vpc-id":    "vpc-lab00001",
		"meta-data/network/interfaces/macs/52:54:00:AA:BB:01/subnet-id": "subnet-node0001",
		"meta-data/volumes/":                                            "disk-abcd1234/\ndisk-efgh5678/\n",
		"meta-data/cam/security-credentials/":                           "TKENodeRole",
	}
}

func TestFacts(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	want := node.Facts{
		InstanceID: "ins-abcd1234", InstanceType: "S5.MEDIUM4", Region: "ap-guangzhou", Zone: "ap-guangzhou-3",
		VPCID: "vpc-lab00001", SubnetID: "subnet-node0001", MAC: "52:54:00:aa:bb:01",
		PrivateIP: netip.MustParseAddr("10.0.0.30"), Hostname: host, CAMRole: "TKENodeRole",
		DataDisks: []string{"disk-abcd1234", "disk-efgh5678"},
	}
	s := &service{answers: healthy()}
	got, err := s.client().Facts(t.Context())
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Facts = %+v, %v\nwant %+v", got, err, want)
	}
	delete(s.answers, "meta-data/cam/security-credentials/")
	delete(s.answers, "meta-data/volumes/")
	want.CAMRole, want.DataDisks = "", nil
	if got, err = s.client().Facts(t.Context()); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Facts without a role and a disk = %+v, %v", got, err)
	}
	s.answers["meta-data/volumes/"] = "<html>"
	if got, err = s.client().Facts(t.Context()); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("Facts with garbage for disks = %+v, %v", got, err)
	}
}

func TestFactsRefusesGarbage(t *testing.T) {
	for key, garbage := range map[string]string{
		"meta-data/instance-id":              "<html>portal</html>",
		"meta-data/placement/zone":           "",
		"meta-data/mac":                      "52:54:00",
		"meta-data/local-ipv4":               "10.0.0.300",
		"meta-data/network/interfaces/macs/": "52:54:00:AA:BB:02/",
		"meta-data/placement/region":         strings.Repeat("a", maxMetadataBytes+1),
	} {
		s := &service{answers: healthy()}
		s.answers[key] = garbage
		if f, err := s.client().Facts(t.Context()); err == nil {
			t.Errorf("%s = %.40q gives Facts %+v", key, garbage, f)
		}
	}
}

func TestUserData(t *testing.T) {
	s := &service{answers: map[string]string{"user-data": "apiVersion: x\n"}}
	if b, err := s.client().UserData(t.Context()); err != nil || string(b) != "apiVersion: x\n" {
		t.Errorf("UserData = %q, %v", b, err)
	}
	s.answers = nil
	if _, err := s.client().UserData(t.Context()); !errors.Is(err, ErrNotFound) || !errors.Is(err, fs.ErrNotExist) || s.calls != 2 {
		t.Errorf("UserData of none: %v after %d calls, want ErrNotFound at the first", err, s.calls-1)
	}
	s.answers = map[string]string{"user-data": strings.Repeat("x", maxUserDataBytes+1)}
	if _, err := s.client().UserData(t.Context()); node.ClassOf(err) != node.ClassTerminal || !strings.Contains(err.Error(), "more than 65536 bytes; shorten it") {
		t.Errorf("UserData of 64 KiB + 1: %v", err)
	}
}

func TestMetadataLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		s := &service{answers: healthy(), trouble: func(int) (*http.Response, error) {
			if time.Since(start) < time.Minute {
				return response(http.StatusInternalServerError, "oops"), nil
			}
			return nil, nil
		}}
		if _, err := s.client().Facts(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d > 66*time.Second || s.calls > 60 {
			t.Errorf("a service that is late by 1 min was read after %s and %d calls", d, s.calls)
		}
	})
}

func TestMetadataNeverAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		s := &service{trouble: func(int) (*http.Response, error) { return response(http.StatusInternalServerError, ""), nil }}
		_, err := s.client().UserData(ctx)
		if node.ClassOf(err) != node.ClassWaiting || node.ReasonOf(err, "") != "MetadataLate" {
			t.Fatalf("error %v is %s", err, node.ClassOf(err))
		}
		for _, part := range []string{MetadataURL, "/latest/user-data", "HTTP 500"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("message lacks %q: %v", part, err)
			}
		}
	})
}

// What cuts the last try off is not what is wrong.
func TestMetadataLastTryCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		s := &service{trouble: func(call int) (*http.Response, error) {
			if call == 1 {
				return nil, errors.New("no route")
			}
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		_, err := s.client().UserData(ctx)
		if want := "metadata service " + MetadataURL + " gives no /latest/user-data: no route"; err == nil || err.Error() != want {
			t.Errorf("error %v, want %s", err, want)
		}
	})
}

// credentials is the service's answer; the key is not to show up in any error.
func credentials(id string, expires time.Time) string {
	return `{"TmpSecretId":"` + id + `","TmpSecretKey":"topsecret","Token":"tok","ExpiredTime":` +
		strconv.FormatInt(expires.Unix(), 10) + `,"Expiration":"` + expires.UTC().Format(time.RFC3339) + `","Code":"Success"}`
}

func TestCredentialsRotate(t *testing.T) {
	const key = "meta-data/cam/security-credentials/TKENodeRole"
	synctest.Test(t, func(t *testing.T) {
		s := &service{answers: healthy()}
		m := s.client()
		want := func(id string, calls int) {
			t.Helper()
			before := s.calls
			c, err := m.Credentials(t.Context())
			if err != nil || c.SecretID != id || s.calls-before != calls {
				t.Errorf("Credentials = %s, %v with %d calls; want %s with %d", c.SecretID, err, s.calls-before, id, calls)
			}
		}
		expires := time.Now().Add(time.Hour)
		s.answers[key] = credentials("AKID1", expires)
		want("AKID1", 2)
		want("AKID1", 0)
		time.Sleep(55 * time.Minute)
		want("AKID1", 2) // asked for newer ones, there are none yet
		want("AKID1", 0)
		time.Sleep(credentialsRetry)
		s.answers[key] = credentials("AKID2", expires.Add(time.Hour))
		want("AKID2", 2)
		m.forgetCredentials(t.Context(), "AKID1")
		want("AKID2", 0)
		m.forgetCredentials(t.Context(), "AKID2")
		want("AKID2", 2)

		// Expired ones are never given out.
		time.Sleep(2 * time.Hour)
		if _, err := m.Credentials(t.Context()); node.ReasonOf(err, "") != "CredentialsExpired" {
			t.Errorf("expired credentials: %v", err)
		}
	})
}

func TestCredentialsSurviveAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &service{answers: healthy()}
		s.answers["meta-data/cam/security-credentials/TKENodeRole"] = credentials("AKID1", time.Now().Add(time.Hour))
		m := s.client()
		if _, err := m.Credentials(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(56 * time.Minute)
		s.trouble = func(int) (*http.Response, error) { return nil, errors.New("no route") }
		start := time.Now()
		c, err := m.Credentials(t.Context())
		if err != nil || c.SecretID != "AKID1" || time.Since(start) > metadataTimeout {
			t.Errorf("Credentials in an outage = %s, %v after %s", c.SecretID, err, time.Since(start))
		}
	})
}

func TestNoCAMRole(t *testing.T) {
	s := &service{}
	_, err := s.client().Credentials(t.Context())
	if node.ClassOf(err) != node.ClassTerminal || node.ReasonOf(err, "") != "NoCAMRole" {
		t.Errorf("Credentials without a role: %v", err)
	}
}

func FuzzMetadata(f *testing.F) {
	f.Add("ins-abcd1234", "52:54:00:AA:BB:01", "52:54:00:AA:BB:01/\n", credentials("AKID1", time.Unix(1, 0)))
	f.Add("", "\x00", "../", "{}")
	f.Add("<html>", "52:54:00:aa:bb:01", "52:54:00:aa:bb:01", `{"TmpSecretKey":"topsecret","Code":3}`)
	f.Fuzz(func(t *testing.T, id, mac, macs, creds string) {
		s := &service{answers: healthy()}
		s.answers["meta-data/instance-id"] = id
		s.answers["meta-data/mac"] = mac
		s.answers["meta-data/network/interfaces/macs/"] = macs
		got, err := s.client().Facts(t.Context())
		if err == nil && (got.InstanceID == "" || strings.ContainsAny(got.InstanceID, " /\n<") || got.MAC != strings.ToLower(got.MAC)) {
			t.Errorf("Facts %+v from %q, %q, %q", got, id, mac, macs)
		}
		c, err := decodeCredentials("r", []byte(creds))
		if err == nil && (c.SecretID == "" || !isHeaderText(c.Token.Reveal())) {
			t.Errorf("credentials %+v from %q", c, creds)
		}
		if err != nil && strings.Contains(err.Error(), "topsecret") {
			t.Errorf("error quotes the secret: %v", err)
		}
	})
}

func FuzzDecodeAnswer(f *testing.F) {
	f.Add([]byte(`{"Response":{"Error":{"Code":"ResourceNotFound","Message":"m"},"RequestId":"r"}}`))
	f.Add([]byte(`{"Response":{"NetworkInterfaceSet":[{"NetworkInterfaceId":"eni-1","PrivateIpAddressSet":[{"PrivateIpAddress":"10.0.0.1"}],"Attachment":null}],"TotalCount":1}}`))
	f.Add([]byte(`{"Response":null}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var out struct {
			NetworkInterfaceSet []ENI
			TotalCount          int
		}
		apiErr, err := decodeAnswer(body, &out)
		if apiErr != nil && (err != nil || apiErr.Code == "") {
			t.Errorf("decodeAnswer(%q) = %v, %v", body, apiErr, err)
		}
		for _, e := range out.NetworkInterfaceSet {
			e.AttachedTo("ins-1")
		}
	})
}

// TestNoRouteIsAskedAgainSoon: the address of the first boot is waited for, and
// noticed as soon as it is there.
func TestNoRouteIsAskedAgainSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		m := NewMetadata("")
		m.HTTP.Transport = &service{answers: map[string]string{"user-data": "x"}, trouble: func(int) (*http.Response, error) {
			if time.Since(began) < 4*time.Second {
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ENETUNREACH)}
			}
			return nil, nil
		}}
		if b, err := m.UserData(t.Context()); err != nil || string(b) != "x" {
			t.Fatalf("%q, %v", b, err)
		}
		if late := time.Since(began) - 4*time.Second; late > metadataNoRoute {
			t.Errorf("noticed after %s", late)
		}
	})
}
