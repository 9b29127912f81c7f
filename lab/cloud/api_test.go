package cloud_test

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// TestTampering changes a signed request on its way, in every part that the
// signature or the API's rules protect.
func TestTampering(t *testing.T) {
	header := func(k, v string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(k, v) }
	}
	for name, c := range map[string]struct {
		change func(*http.Request)
		want   string
	}{
		"nothing":      {func(*http.Request) {}, "<nil>"},
		"body":         {func(r *http.Request) { r.Body = io.NopCloser(strings.NewReader(`{"InstanceId":"ins-11111111"}`)) }, "AuthFailure.SignatureFailure"},
		"action":       {header("X-TC-Action", "DescribeSubnets"), "AuthFailure.SignatureFailure"},
		"content type": {header("Content-Type", "application/json"), "AuthFailure.SignatureFailure"},
		"host": {func(r *http.Request) {
			r.Host = "cvm.internal.tencentcloudapi.com"
			r.Header.Set("X-TC-Action", "DescribeZones")
		}, "AuthFailure.SignatureFailure"},
		"timestamp":    {header("X-TC-Timestamp", strconv.FormatInt(time.Now().Unix()-60, 10)), "AuthFailure.SignatureFailure"},
		"old":          {header("X-TC-Timestamp", strconv.FormatInt(time.Now().Unix()-301, 10)), "AuthFailure.SignatureExpire"},
		"from ahead":   {header("X-TC-Timestamp", strconv.FormatInt(time.Now().Unix()+310, 10)), "AuthFailure.SignatureExpire"},
		"no number":    {header("X-TC-Timestamp", "now"), "InvalidParameter"},
		"token":        {header("X-TC-Token", "other"), "AuthFailure.TokenFailure"},
		"no token":     {func(r *http.Request) { r.Header.Del("X-TC-Token") }, "AuthFailure.TokenFailure"},
		"unsigned":     {func(r *http.Request) { r.Header.Del("Authorization") }, "AuthFailure.InvalidAuthorization"},
		"one header":   {edit("content-type;host;x-tc-action", "host"), "AuthFailure.InvalidAuthorization"},
		"fewer":        {edit("content-type;host;x-tc-action", "content-type;host"), "AuthFailure.SignatureFailure"},
		"secret id":    {edit("Credential=AKID", "Credential=AKIX"), "AuthFailure.SecretIdNotFound"},
		"service":      {edit("/vpc/tc3_request", "/cvm/tc3_request"), "AuthFailure.SignatureFailure"},
		"region":       {header("X-TC-Region", "ap-beijing"), "UnsupportedRegion"},
		"version":      {header("X-TC-Version", "2018-01-01"), "NoSuchVersion"},
		"no action":    {header("X-TC-Action", "DropAllTables"), "InvalidAction"},
		"product":      {func(r *http.Request) { r.Host = "cam.internal.tencentcloudapi.com" }, "NoSuchProduct"},
		"other domain": {func(r *http.Request) { r.Host = "vpc.example.com" }, "NoSuchProduct"},
		"method":       {func(r *http.Request) { r.Method = http.MethodGet }, "UnsupportedProtocol"},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, instant())
			l.wire.change, l.wire.seen = c.change, nil // what arrives is not what was asked
			_, err := l.api.ENILimit(t.Context(), l.instance.ID)
			if got := code(err); got != c.want {
				t.Errorf("%s is changed: %v, want %s", name, err, c.want)
			}
		})
	}
}

// edit replaces a part of the Authorization header.
func edit(old, with string) func(*http.Request) {
	return func(r *http.Request) {
		r.Header.Set("Authorization", strings.Replace(r.Header.Get("Authorization"), old, with, 1))
	}
}

func TestCAMDenies(t *testing.T) {
	config := instant()
	config.Policy = []byte(`{"version":"2.0","statement":[
		{"effect":"allow","action":["name/vpc:Describe*","cvm:*"],"resource":"*"},
		{"effect":"deny","action":"vpc:DescribeSubnets","resource":["*"]}]}`)
	l := newLab(t, config)
	_, _, err := l.api.CreateENI(t.Context(), l.spec("c"))
	if code(err) != "AuthFailure.UnauthorizedOperation" || node.ClassOf(err) != node.ClassTerminal {
		t.Errorf("what is not allowed: %v", err)
	}
	if _, err = l.api.DescribeSubnets(t.Context(), nil); code(err) != "AuthFailure.UnauthorizedOperation" {
		t.Errorf("what is denied: %v", err)
	}
	if _, err = l.api.DescribeENIs(t.Context(), l.instance.ID); err != nil {
		t.Errorf("what is allowed: %v", err)
	}
	if _, _, _, err = newSDKIn(t, l).create("c", "n"); code(err) != "AuthFailure.UnauthorizedOperation" {
		t.Errorf("the other call that is not allowed: %v", err)
	}
	if s := l.Snapshot(); len(s.ENIs) != 1 || s.Calls["vpc:CreateAndAttachNetworkInterface"]+s.Calls["vpc:CreateNetworkInterface"] != 0 || s.Calls["vpc:DescribeNetworkInterfaces"] != 1 {
		t.Errorf("calls %v", s.Calls)
	}
}

func TestPolicyIsChecked(t *testing.T) {
	for _, document := range []string{
		"", "{}", `{"version":"1.0","statement":[{"effect":"allow","action":"*","resource":"*"}]}`,
		`{"version":"2.0","statement":[{"effect":"maybe","action":"*","resource":"*"}]}`,
		`{"version":"2.0","statement":[{"effect":"allow","action":[],"resource":"*"}]}`,
		`{"version":"2.0","statement":[{"effect":"allow","action":"*","resource":"qcs::vpc:::eni/*"}]}`,
		`{"version":"2.0","statement":[{"effect":"allow","action":"*","resource":"*","condition":{}}]}`,
	} {
		config := instant()
		config.Policy = []byte(document)
		if _, err := cloud.New(config, nil, nil); err == nil {
			t.Errorf("policy %s is accepted", document)
		}
	}
}

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLab(t, instant())
		refused := 0
		for range 25 {
			_, err := l.api.ENILimit(t.Context(), l.instance.ID)
			if err != nil && code(err) != tencent.CodeThrottled {
				t.Fatal(err)
			}
			if err != nil {
				refused++
			}
		}
		if refused != 5 {
			t.Errorf("%d of 25 requests in a second are refused, want 5", refused)
		}
		time.Sleep(time.Second)
		if _, err := l.api.ENILimit(t.Context(), l.instance.ID); err != nil {
			t.Errorf("a second later: %v", err)
		}
	})
}

// TestClientToken holds the two calls that create an ENI to the same: a token is good
// for one.
func TestClientToken(t *testing.T) {
	type create func(token, name string) (eni, task string, err error)
	for action, of := range map[string]func(*testing.T, *sdk) create{
		"CreateNetworkInterface": func(_ *testing.T, s *sdk) create {
			return func(token, name string) (string, string, error) {
				eni, _, task, err := s.create(token, name)
				return eni, task, err
			}
		},
		"CreateAndAttachNetworkInterface": func(t *testing.T, s *sdk) create {
			return func(token, name string) (string, string, error) {
				spec := s.spec(token)
				spec.Name = name
				eni, task, err := s.api.CreateENI(t.Context(), spec)
				return eni.ID, task, err
			}
		},
	} {
		for what, f := range map[string]func(t *testing.T, s *sdk, create create){
			"same": func(t *testing.T, s *sdk, create create) {
				first, task, err := create("same", "one")
				if err != nil {
					t.Fatal(err)
				}
				again, task2, err := create("same", "one")
				if err != nil || again != first || task2 != task {
					t.Errorf("same token, same parameters: %s (task %s), %v; want %s (task %s)", again, task2, err, first, task)
				}
				if _, _, err = create("same", "other"); code(err) != "UnsupportedOperation.IdempotentParameterMismatch" {
					t.Errorf("same token, other parameters: %v", err)
				}
				s.await(t, task, nil)
				if again, _, err = create("same", "one"); err != nil || again != first {
					t.Errorf("once the task has ended: %s, %v", again, err)
				}
			},
			"long": func(t *testing.T, s *sdk, create create) {
				if _, _, err := create(strings.Repeat("x", 65), "one"); code(err) != "InvalidParameterValue.TooLong" {
					t.Errorf("token of 65 characters: %v", err)
				}
				if _, _, err := create(strings.Repeat("x", 64), "one"); err != nil {
					t.Errorf("token of 64 characters: %v", err)
				}
			},
			// The answer is lost after the work was done: asking again finds it.
			"lost": func(t *testing.T, s *sdk, create create) {
				s.Inject(cloud.Fault{Action: "vpc:" + action, Drop: true})
				if _, _, err := create("lost", "one"); err == nil {
					t.Error("a lost answer arrived")
				}
				found, task, err := create("lost", "one")
				if s.await(t, task, err); s.now(found).State != "AVAILABLE" {
					t.Errorf("asked again: %s, %+v", found, s.now(found))
				}
			},
			"twice at once": func(t *testing.T, s *sdk, create create) {
				s.Inject(cloud.Fault{Action: "vpc:" + action, Delay: time.Second})
				done := make(chan error)
				go func() {
					_, _, err := create("twice", "one")
					done <- err
				}()
				synctest.Wait()
				if _, _, err := create("twice", "one"); code(err) != tencent.CodeIdempotentProcessing {
					t.Errorf("while the first is worked on: %v", err)
				}
				if err := <-done; err != nil {
					t.Error(err)
				}
			},
			// A refusal does not use the token up.
			"refused": func(t *testing.T, s *sdk, create create) {
				s.Inject(cloud.Fault{Action: "vpc:Create*", Code: "ResourceInsufficient.Subnet", Message: "full"})
				if _, _, err := create("later", "one"); code(err) != tencent.CodeSubnetExhausted {
					t.Errorf("injected: %v", err)
				}
				if _, _, err := create("later", "one"); err != nil {
					t.Errorf("after the fault: %v", err)
				}
			},
		} {
			t.Run(action+"/"+what, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s := newSDK(t, instant())
					f(t, s, of(t, s))
					if n := len(s.Snapshot().ENIs); n != 2 {
						t.Errorf("%d ENIs, want the primary one and another", n)
					}
				})
			})
		}
	}
}

func TestFaultsCount(t *testing.T) {
	l := newLab(t, instant())
	l.Inject(cloud.Fault{Action: "*", Times: 2, Code: "InternalError", Message: "on request"})
	for i := range 3 {
		if _, err := l.api.DescribeENIs(t.Context(), l.instance.ID); (code(err) == "InternalError") != (i < 2) {
			t.Errorf("call %d: %v", i, err)
		}
	}
	l.Inject(cloud.Fault{Action: "vpc:*", Code: "InternalError"})
	l.ClearFaults()
	if _, err := l.api.DescribeENIs(t.Context(), l.instance.ID); err != nil {
		t.Errorf("after ClearFaults: %v", err)
	}
}

func TestCredentialsExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, instant()), t.Context()
		first, err := l.metadata.Credentials(ctx)
		if err != nil {
			t.Fatal(err)
		}
		// For ten hours the client follows the rotation.
		for range 120 {
			time.Sleep(5 * time.Minute)
			if _, err := l.api.DescribeENIs(ctx, l.instance.ID); err != nil {
				t.Fatal(err)
			}
		}
		last, err := l.metadata.Credentials(ctx)
		if err != nil || last.SecretID == first.SecretID {
			t.Errorf("credentials after ten hours: %s, %v", last.SecretID, err)
		}
		// Revoked ones are dropped, and the next call has new ones.
		l.ExpireCredentials()
		_, err = l.api.DescribeENIs(ctx, l.instance.ID)
		if code(err) != "AuthFailure.TokenFailure" || node.ClassOf(err) != node.ClassTransient {
			t.Errorf("revoked credentials: %v", err)
		}
		if _, err = l.api.DescribeENIs(ctx, l.instance.ID); err != nil {
			t.Errorf("after that: %v", err)
		}
	})
}

// TestTLS reaches the API as an agent does: by name, over TLS, trusting the
// configured authority alone.
func TestTLS(t *testing.T) {
	region := instant()
	region.Domain = "example.com" // which the certificate of httptest is for
	l := newLab(t, region)
	server := httptest.NewUnstartedServer(l.API())
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // one client does not trust it
	server.StartTLS()
	defer server.Close()
	call := func(ca string) error {
		client, err := tencent.NewClient(node.CloudConfig{APIDomain: region.Domain, CertificateAuthority: ca}, region.Region, l.metadata)
		if err != nil {
			return err
		}
		defer client.HTTP.CloseIdleConnections()
		client.HTTP.Transport.(*http.Transport).DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, server.Listener.Addr().String())
		}
		_, err = client.DescribeENIs(t.Context(), l.instance.ID)
		return err
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := call(string(ca)); err != nil {
		t.Errorf("with the authority: %v", err)
	}
	if _, unknown := errors.AsType[*tls.CertificateVerificationError](call("")); !unknown {
		t.Error("without the authority the certificate is trusted")
	}
	if err := call("not PEM"); node.ClassOf(err) != node.ClassTerminal {
		t.Errorf("an authority that is none: %v", err)
	}
}
