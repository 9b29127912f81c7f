package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

const conf = `{"cniVersion":"1.1.0","name":"tke-eni","type":"tke-eni"}`

// testCall is one call of the plugin.
type testCall struct {
	env  map[string]string
	conf string
}

// run runs the call against a socket and returns what is printed.
func (c testCall) run(t *testing.T, socket string, limit time.Duration) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	var out bytes.Buffer
	dir := filepath.Dir(socket)
	p := plugin{
		env: func(k string) string { return c.env[k] }, socket: socket, configured: filepath.Join(dir, "configured"),
		queue: cni.Queue(filepath.Join(dir, "del")), patience: limit / 2,
	}
	code := p.run(ctx, strings.NewReader(c.conf), &out)
	return strings.TrimSpace(out.String()), code
}

func env(command string) map[string]string {
	return map[string]string{
		"CNI_COMMAND": command, "CNI_CONTAINERID": "c0ffee", "CNI_IFNAME": "eth0", "CNI_NETNS": "/run/netns/a",
		"CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;junk;K8S_POD_UID=1",
	}
}

// agent answers calls: each with the next of answers, or with nothing.
func agent(t *testing.T, answers ...string) (socket string, requests chan cni.Request) {
	socket = filepath.Join(t.TempDir(), "cni.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	requests = make(chan cni.Request, len(answers))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, a := range answers {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			var req cni.Request
			if err := cni.Read(conn, cni.MaxRequest, &req); err == nil {
				requests <- req
			}
			conn.Write([]byte(a))
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return socket, requests
}

const added = `{"result":{"hostName":"eni0","hostMAC":"0a:00:00:00:00:01","mac":"0e:00:00:00:00:01","addr":"10.0.16.5/32","gateway":"169.254.1.1","mtu":1500}}`

func TestAdd(t *testing.T) {
	for version, want := range map[string]string{
		"0.3.1": `{"cniVersion":"0.3.1","interfaces":[{"name":"eni0","mac":"0a:00:00:00:00:01"},{"name":"eth0","mac":"0e:00:00:00:00:01","sandbox":"/run/netns/a"}],"ips":[{"version":"4","address":"10.0.16.5/32","gateway":"169.254.1.1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"}],"dns":{}}`,
		"1.0.0": `{"cniVersion":"1.0.0","interfaces":[{"name":"eni0","mac":"0a:00:00:00:00:01"},{"name":"eth0","mac":"0e:00:00:00:00:01","sandbox":"/run/netns/a"}],"ips":[{"address":"10.0.16.5/32","gateway":"169.254.1.1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"}],"dns":{}}`,
		"1.1.0": `{"cniVersion":"1.1.0","interfaces":[{"name":"eni0","mac":"0a:00:00:00:00:01","mtu":1500},{"name":"eth0","mac":"0e:00:00:00:00:01","mtu":1500,"sandbox":"/run/netns/a"}],"ips":[{"address":"10.0.16.5/32","gateway":"169.254.1.1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"}],"dns":{}}`,
	} {
		socket, requests := agent(t, added)
		got, code := testCall{env("ADD"), strings.ReplaceAll(conf, "1.1.0", version)}.run(t, socket, 5*time.Second)
		if got != want || code != 0 {
			t.Errorf("%s: exit status %d:\n%s\nwant\n%s", version, code, got, want)
		}
		if req := <-requests; req.PodName != "web" || req.PodNamespace != "default" || req.NetNS != "/run/netns/a" || req.ContainerID != "c0ffee" {
			t.Errorf("request %+v", req)
		}
	}
}

// TestAddDualStack holds how addresses of both families are printed.
func TestAddDualStack(t *testing.T) {
	dual := strings.Replace(added, `,"mtu"`, `,"addr6":"2402:4e00::5/128","gateway6":"fe80::1","mtu"`, 1)
	for version, want := range map[string]string{
		"0.3.1": `"ips":[{"version":"4","address":"10.0.16.5/32","gateway":"169.254.1.1","interface":1},{"version":"6","address":"2402:4e00::5/128","gateway":"fe80::1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}]`,
		"1.1.0": `"ips":[{"address":"10.0.16.5/32","gateway":"169.254.1.1","interface":1},{"address":"2402:4e00::5/128","gateway":"fe80::1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}]`,
	} {
		socket, _ := agent(t, dual)
		if got, code := (testCall{env("ADD"), strings.ReplaceAll(conf, "1.1.0", version)}).run(t, socket, 5*time.Second); !strings.Contains(got, want) || code != 0 {
			t.Errorf("%s: exit status %d:\n%s\nwant\n%s", version, code, got, want)
		}
	}
}

// TestAddWhole: the annotations that ask for an ENI are handed on, and the result has
// the ENI and the veth beside it.
func TestAddWhole(t *testing.T) {
	const whole = `{"result":{"hostName":"eni0","hostMAC":"0a:00:00:00:00:01","mac":"52:54:00:00:00:03","addr":"10.0.16.20/32","gateway":"10.0.16.1","mtu":1500,"vethName":"tke0","vethMAC":"0e:00:00:00:00:01"}}`
	want := `{"cniVersion":"1.1.0","interfaces":[{"name":"eni0","mac":"0a:00:00:00:00:01","mtu":1500},{"name":"eth0","mac":"52:54:00:00:00:03","mtu":1500,"sandbox":"/run/netns/a"},{"name":"tke0","mac":"0e:00:00:00:00:01","mtu":1500,"sandbox":"/run/netns/a"}],"ips":[{"address":"10.0.16.20/32","gateway":"10.0.16.1","interface":1}],"routes":[{"dst":"0.0.0.0/0","gw":"10.0.16.1"}],"dns":{}}`
	annotated := strings.Replace(conf, "{", `{"runtimeConfig":{"io.kubernetes.cri.pod-annotations":{"other":"x","tke.cloud.tencent.com/networks":" tke-direct-eni","tke.cloud.tencent.com/pod-security-groups":"sg-aaaaaa11, sg-bbbbbb22,"}},`, 1)
	socket, requests := agent(t, whole, "{}")
	got, code := testCall{env("ADD"), annotated}.run(t, socket, 5*time.Second)
	if got != want || code != 0 {
		t.Errorf("exit status %d:\n%s\nwant\n%s", code, got, want)
	}
	if req := <-requests; req.Network != "tke-direct-eni" || !slices.Equal(req.SecurityGroups, []string{"sg-aaaaaa11", "sg-bbbbbb22"}) {
		t.Errorf("request %+v", req)
	}
	testCall{env("DEL"), annotated}.run(t, socket, 5*time.Second)
	if req := <-requests; req.Network != "" || req.SecurityGroups != nil {
		t.Errorf("request of DEL %+v", req)
	}
}

// TestAgentRestarts holds that a call survives an agent that goes away before it
// has read the request, and one that goes away before it has answered.
func TestAgentRestarts(t *testing.T) {
	socket, _ := agent(t, "", `{"resu`, added)
	got, code := testCall{env("ADD"), conf}.run(t, socket, 5*time.Second)
	if code != 0 || !strings.Contains(got, "10.0.16.5/32") {
		t.Errorf("exit status %d: %s", code, got)
	}
}

func TestNoAgent(t *testing.T) {
	got, code := testCall{env("ADD"), conf}.run(t, filepath.Join(t.TempDir(), "cni.sock"), 200*time.Millisecond)
	if code != 1 || !strings.Contains(got, `"code":102`) || !strings.Contains(got, "systemctl status tkenode-agent") {
		t.Errorf("exit status %d: %s", code, got)
	}
}

// TestDelIsQueued has nobody listen, then systemd hold the socket while nobody
// answers, and then nowhere to keep the DEL.
func TestDelIsQueued(t *testing.T) {
	for _, held := range []bool{false, true} {
		socket := filepath.Join(t.TempDir(), "cni.sock")
		if held {
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		queue := cni.Queue(filepath.Join(filepath.Dir(socket), "del"))
		before := time.Now()
		for range 2 {
			if got, code := (testCall{env("DEL"), conf}).run(t, socket, 400*time.Millisecond); got != "" || code != 0 {
				t.Fatalf("held %v: exit status %d: %s", held, code, got)
			}
		}
		var all []cni.Deletion
		err := queue.Drain(func(d cni.Deletion) error {
			all = append(all, d)
			return nil
		})
		if err != nil || len(all) != 1 || all[0].Attachment != (cni.Attachment{ContainerID: "c0ffee", IfName: "eth0"}) || all[0].At.Before(before) {
			t.Errorf("held %v: queued %+v, %v", held, all, err)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "del"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got, code := testCall{env("DEL"), conf}.run(t, filepath.Join(dir, "cni.sock"), 400*time.Millisecond)
	if code != 1 || !strings.Contains(got, `"code":102`) || !strings.Contains(got, "nor can the DEL be queued") {
		t.Errorf("no room: exit status %d: %s", code, got)
	}
}

func TestErrors(t *testing.T) {
	check := `{"cniVersion":"1.1.0","name":"tke-eni","prevResult":{"ips":[{"address":"10.0.16.5/32"}]}}`
	for _, c := range []struct {
		name, command, conf, answer, want string
	}{
		{"agent's error", "ADD", conf, `{"error":{"code":11,"msg":"no free VPC address","details":"8 of 8 addresses in use"}}`,
			`{"cniVersion":"1.1.0","code":11,"msg":"no free VPC address","details":"8 of 8 addresses in use"}`},
		{"drift", "CHECK", check, `{"error":{"code":101,"msg":"drift"}}`, `{"cniVersion":"1.1.0","code":101,"msg":"drift"}`},
		{"no JSON", "ADD", "{", "", `"code":6`},
		{"wrong type", "ADD", `{"cniVersion":1}`, "", `"code":6`},
		{"too long", "ADD", `{"name":"` + strings.Repeat("x", maxConfig) + `"}`, "", `longer than 1048576 bytes`},
		{"old version", "ADD", `{"cniVersion":"0.2.0","name":"n"}`, "", `"code":1,`},
		{"new version", "ADD", `{"cniVersion":"2.0.0","name":"n"}`, "", `"code":1,`},
		{"no name", "ADD", `{"cniVersion":"1.1.0"}`, "", `"code":7,`},
		{"CHECK in 0.3.1", "CHECK", `{"cniVersion":"0.3.1","name":"n"}`, "", "CHECK needs cniVersion 0.4.0"},
		{"GC in 1.0.0", "GC", `{"cniVersion":"1.0.0","name":"n"}`, "", "GC needs cniVersion 1.1.0"},
		{"GC without a list", "GC", conf, "", `"code":7`},
		{"CHECK without prevResult", "CHECK", conf, "", `"code":7`},
		{"unknown command", "RUN", conf, "", `"code":4`},
		{"not configured", "STATUS", conf, "", `"code":50`},
	} {
		t.Run(c.name, func(t *testing.T) {
			socket, _ := agent(t, c.answer)
			got, code := testCall{env(c.command), c.conf}.run(t, socket, 5*time.Second)
			if code != 1 || !strings.Contains(got, c.want) {
				t.Errorf("exit status %d: %.300s\nwant %s in it", code, got, c.want)
			}
		})
	}
}

func TestWithoutResult(t *testing.T) {
	gc := `{"cniVersion":"1.1.0","name":"tke-eni","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]}`
	check := `{"cniVersion":"1.1.0","name":"tke-eni","prevResult":{"ips":[{"address":"10.0.16.5/32"}]}}`
	for command, conf := range map[string]string{"DEL": conf, "CHECK": check, "GC": gc} {
		socket, requests := agent(t, "{}")
		if got, code := (testCall{env(command), conf}).run(t, socket, 5*time.Second); got != "" || code != 0 {
			t.Errorf("%s: exit status %d: %s", command, code, got)
		}
		req := <-requests
		if command == "CHECK" && (len(req.Addrs) != 1 || req.Addrs[0] != netip.MustParseAddr("10.0.16.5")) || command == "GC" && len(req.Valid) != 1 {
			t.Errorf("%s: request %+v", command, req)
		}
	}
}

// TestStatus holds that STATUS asks nobody: there is no agent here.
func TestStatus(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "configured"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if got, code := (testCall{env("STATUS"), conf}).run(t, filepath.Join(dir, "cni.sock"), time.Second); got != "" || code != 0 {
		t.Errorf("exit status %d: %s", code, got)
	}
}

func TestVersion(t *testing.T) {
	got, code := testCall{env("VERSION"), ""}.run(t, "/nowhere", time.Second)
	if want := `{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}`; got != want || code != 0 {
		t.Errorf("exit status %d: %s", code, got)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(conf), "ADD", "K8S_POD_NAME=a")
	f.Fuzz(func(t *testing.T, b []byte, command, arguments string) {
		var c config
		if json.Unmarshal(b, &c) != nil || c.check(command) != nil {
			return
		}
		p := plugin{env: func(string) string { return arguments }}
		if req, err := p.request(cni.Command(command), c); err == nil && command == "GC" && req.Valid == nil {
			t.Error("GC of everything without a list")
		}
	})
}
