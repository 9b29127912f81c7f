//go:build node

package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/kube"
)

// badInput is one thing that can be wrong when a node boots for the first time.
type badInput struct {
	name  string
	whole bool // only with -whole
	// userData is made of what the lab's NodeConfig would be; nil: nothing is changed.
	userData func(t *testing.T, l *Lab, v NodeConfigValues) []byte
	disk     func(t *testing.T, path string) // writes what the data disk holds; nil: it is blank
	fault    func(t *testing.T, l *Lab)      // before the launch

	condition node.ConditionType // that is not True; default ConfigSealed
	reason    string             // of it
	// want are lines, exactly; "*" stands for what differs from run to run.
	want []string

	// heal ends the fault, after which the node is to go on by itself; nil: a human
	// must act, and bootstrap has ended.
	heal func(t *testing.T, l *Lab)
}

const (
	missingFix  = "; pass a NodeConfig document as user-data, alone or as a MIME part with Content-Type: application/vnd.tkenode.nodeconfig+yaml"
	tokenFix    = "; it is wrong or has expired: make one with kubeadm token create, and launch with it"
	metadataFix = "; if it lasts: check this node's route and firewall to 169.254.0.23, then ask Tencent Cloud"
	foreignFix  = "name another disk in the NodeConfig; or, once you have saved what you need of it, type: tkenode disk format disk-* --i-have-checked disk-*"
	adoptFix    = "to mount it as it is, type: tkenode disk adopt disk-* --i-have-checked disk-*; or "
)

var badInputs = []badInput{
	{
		name: "user-data absent", whole: true,
		userData: func(*testing.T, *Lab, NodeConfigValues) []byte { return nil },
		reason:   "NodeConfigMissing",
		want:     []string{"the instance has no user-data; launch the instance with a NodeConfig document as its user-data"},
	},
	{
		name: "user-data empty", whole: true,
		userData: func(*testing.T, *Lab, NodeConfigValues) []byte { return []byte{} },
		reason:   "NodeConfigMissing",
		want:     []string{"user-data is empty" + missingFix},
	},
	{
		name: "user-data truncated",
		userData: func(t *testing.T, _ *Lab, v NodeConfigValues) []byte {
			head, _, _ := strings.Cut(text(t, v), "-----END CERTIFICATE-----")
			return []byte(head)
		},
		reason: "NodeConfigInvalid",
		want: []string{
			"NodeConfig line 1: network.subnetIDs: missing; write the VPC subnets that pods get their addresses from",
			"NodeConfig line 3: cluster.bootstrapToken: missing; make one with: kubeadm token create",
			"NodeConfig line 6: cluster.certificateAuthority: certificate 1 is cut off: it has a BEGIN line and no END line",
		},
	},
	{
		name: "user-data not YAML", whole: true,
		userData: replace("  id: cls-lab00001\n", "  id: cls-lab00001\n id: cls-lab00001\n"),
		reason:   "NodeConfigInvalid",
		want:     []string{"NodeConfig line 5: not YAML from here on: did not find expected key; check indentation and quotes"},
	},
	{
		name: "unknown field", whole: true,
		userData: replace("  endpoint: https://10.", "  endpont: https://10."),
		reason:   "NodeConfigInvalid",
		want:     []string{"NodeConfig line 5: cluster.endpont: no such field; did you mean endpoint?"},
	},
	{
		name: "wrong type", whole: true,
		userData: replace("network:\n", "network:\n  enis: many\n"),
		reason:   "NodeConfigInvalid",
		want:     []string{`NodeConfig line *: network.enis: found the text "many", expected a whole number`},
	},
	{
		name: "two NodeConfig parts", whole: true,
		userData: func(t *testing.T, _ *Lab, v NodeConfigValues) []byte {
			part := "--b\r\nContent-Type: application/vnd.tkenode.nodeconfig+yaml\r\n\r\n" + text(t, v) + "\r\n"
			return []byte("MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=\"b\"\r\n\r\n" + part + part + "--b--\r\n")
		},
		reason: "NodeConfigInvalid",
		want:   []string{"user-data parts 1 and 2 are both a NodeConfig; keep one of them"},
	},
	{
		name: "wrong CA", whole: true,
		userData: func(t *testing.T, l *Lab, v NodeConfigValues) []byte {
			v.ClusterCA = l.ca.pem
			return []byte(text(t, v))
		},
		reason: "APIServerUntrusted",
		want: []string{`API server https://10.0.0.10:6443: its certificate is issued by "CN=*", not by cluster.certificateAuthority "CN=tkelab cloud API CA" (key *)` +
			"; cluster.certificateAuthority must be the CA of the cluster that cluster.endpoint belongs to"},
	},
	{
		name: "expired token", whole: true,
		userData: func(t *testing.T, l *Lab, v NodeConfigValues) []byte {
			token, err := l.Cluster.NewBootstrapToken(t.Context(), -time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			v.Token = token.Reveal()
			return []byte(text(t, v))
		},
		reason: "TokenRefused",
		want:   []string{"API server https://10.0.0.10:6443 does not accept bootstrap token *.…: 401 Unauthorized" + tokenFix},
	},
	{
		name: "wrong token",
		userData: func(t *testing.T, _ *Lab, v NodeConfigValues) []byte {
			v.Token = "abcdef.0123456789abcdef"
			return []byte(text(t, v))
		},
		reason: "TokenRefused",
		want:   []string{"API server https://10.0.0.10:6443 does not accept bootstrap token abcdef.…: 401 Unauthorized" + tokenFix},
	},
	{
		name: "API server unreachable",
		fault: func(t *testing.T, l *Lab) {
			if err := l.cutAPIServer(); err != nil {
				t.Fatal(err)
			}
		},
		reason: "APIServerUnreachable",
		want: []string{"API server https://10.0.0.10:6443 does not answer: dial tcp 10.0.0.10:6443: connect: connection refused" +
			"; check the route, the security groups and the load balancer between this node and it"},
		heal: func(t *testing.T, l *Lab) {
			if err := l.forwardAPIServer(); err != nil {
				t.Fatal(err)
			}
		},
	},
	{
		name: "metadata late", whole: true,
		fault: func(_ *testing.T, l *Lab) {
			l.Region.InjectMetadata(cloud.MetadataFault{For: time.Minute, Silent: true})
		},
		reason: "MetadataSilent",
		want:   []string{"metadata service http://169.254.0.23 gives no /latest/user-data: no answer in time" + metadataFix},
		heal:   func(*testing.T, *Lab) {}, // after a minute
	},
	{
		name: "metadata answers 500", whole: true,
		fault: func(_ *testing.T, l *Lab) {
			l.Region.InjectMetadata(cloud.MetadataFault{For: time.Hour, Status: http.StatusInternalServerError})
		},
		reason: "MetadataSilent",
		want:   []string{"metadata service http://169.254.0.23 gives no /latest/user-data: HTTP 500" + metadataFix},
		heal:   func(_ *testing.T, l *Lab) { l.Region.ClearFaults() },
	},
	{
		name: "disk with a file system", whole: true,
		disk:      makeExt4,
		condition: node.DisksReady, reason: "Foreign",
		want: []string{`disk-* (/dev/vd*, 1 GiB) is not blank and not tkenode's: it holds ext4 (uuid *, label "precious"); nothing was written; ` + adoptFix + foreignFix},
	},
	{
		name: "disk with data",
		disk: func(t *testing.T, path string) {
			if err := os.WriteFile(path, append(make([]byte, 37<<20+5), "a table space"...), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, 64<<20); err != nil {
				t.Fatal(err)
			}
		},
		condition: node.DisksReady, reason: "Foreign",
		want: []string{"disk-* (/dev/vd*, 1 GiB) is not blank and not tkenode's: it holds data that no known signature explains, non-zero bytes at 38797317: 61207461626c65207370616365000000; nothing was written; " + foreignFix},
	},
	{
		name:   "clock two hours ahead",
		fault:  func(_ *testing.T, l *Lab) { l.Net.SetClock(2*time.Hour, true) },
		reason: "ClockSkewed",
		want: []string{"this node's clock says *, API server https://10.0.0.10:6443's says *: *h*m*s ahead" +
			"; check time synchronisation (timedatectl timesync-status) and who may reach the NTP server"},
		heal: func(_ *testing.T, l *Lab) { l.Net.SetClock(0, true) },
	},
	{
		name: "clock two hours behind", whole: true,
		fault:  func(_ *testing.T, l *Lab) { l.Net.SetClock(-2*time.Hour, true) },
		reason: "ClockSkewed",
		want: []string{"this node's clock says *, API server https://10.0.0.10:6443's says *: *h*m*s behind" +
			"; check time synchronisation (timedatectl timesync-status) and who may reach the NTP server"},
		heal: func(_ *testing.T, l *Lab) { l.Net.SetClock(0, true) },
	},
}

func text(t *testing.T, v NodeConfigValues) string {
	t.Helper()
	s, err := v.Text()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// replace changes what stands in the NodeConfig once.
func replace(old, by string) func(*testing.T, *Lab, NodeConfigValues) []byte {
	return func(t *testing.T, _ *Lab, v NodeConfigValues) []byte {
		s := text(t, v)
		if strings.Count(s, old) != 1 {
			t.Fatalf("%q stands in the NodeConfig %d times", old, strings.Count(s, old))
		}
		return []byte(strings.Replace(s, old, by, 1))
	}
}

func makeExt4(t *testing.T, path string) {
	tree := t.TempDir()
	if err := os.WriteFile(filepath.Join(tree, "ledger.csv"), []byte("years of work"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Debian keeps it where the PATH of ordinary users does not reach.
	out, err := exec.CommandContext(t.Context(), "/usr/sbin/mke2fs", "-q", "-t", "ext4", "-L", "precious", "-d", tree, path, "64M").CombinedOutput()
	if err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
}

// TestNodeBadInput gives nodes what they cannot become a node with. Each is a
// machine of its own that goes on from the same snapshot.
func TestNodeBadInput(t *testing.T) {
	l := startLab(t)
	if err := l.FromSnapshot(within(t, 8*time.Minute), 2); err != nil {
		t.Fatal(err)
	}
	for _, c := range badInputs {
		if c.whole && !*whole {
			continue
		}
		t.Run(c.name, func(t *testing.T) { c.run(t, l) })
	}
}

func (b badInput) run(t *testing.T, l *Lab) {
	if b.condition == "" {
		b.condition = node.ConfigSealed
	}
	spec := b.launchSpec(t, l)
	before := requests(t, l)
	if b.fault != nil {
		b.fault(t, l)
	}
	healed := b.heal == nil
	heal := func() {
		if !healed {
			healed = true
			b.heal(t, l)
		}
	}
	defer heal() // the next case is not to suffer when this one fails
	began := time.Now()
	mark := func(what string) { t.Logf("%5.1fs %s", time.Since(began).Seconds(), what) }
	c, err := l.Launch(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	defer b.terminate(t, l, c)
	mark("launched")
	// The first login starts sshd and the user's manager, which takes long: it is
	// made beside what the test waits for.
	login := make(chan error, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	wg.Go(func() {
		_, err := l.SSH(ctx, c.IP, "true")
		login <- err
	})
	for _, want := range b.want {
		waitLine(t, c, want)
	}
	if b.heal == nil && b.condition == node.ConfigSealed {
		waitLine(t, c, "NOT JOINED, stopped at *: "+b.reason) // a token is refused for a while before
	}
	mark("said")
	if err := <-login; err != nil {
		t.Fatal(err)
	}
	b.told(t, l, c)
	mark("told everywhere")
	calm(t, l, c)
	b.untouched(t, l, c, spec.DiskContent)
	if b.condition == node.ConfigSealed {
		if after := requests(t, l); after != before {
			t.Errorf("the API server had %d certificate requests and has %d", before, after)
		}
	}
	if b.heal == nil {
		return
	}
	heal()
	mark("healed")
	waitLine(t, c, "ConfigSealed is True")
	waitLine(t, c, "NodeJoined is True")
	mark("joined")
}

func (b badInput) launchSpec(t *testing.T, l *Lab) LaunchSpec {
	v, err := l.NodeConfigValues(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	spec := LaunchSpec{DataDisks: []int{1}, UserData: []byte(text(t, v))}
	if b.userData != nil {
		spec.UserData = b.userData(t, l, v)
		spec.NoUserData = spec.UserData == nil
	}
	if b.disk != nil {
		spec.DiskContent = filepath.Join(t.TempDir(), "disk")
		b.disk(t, spec.DiskContent)
	}
	return spec
}

// terminate ends the machine, and forgets the Node that it has become.
func (b badInput) terminate(t *testing.T, l *Lab, c *CVM) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if t.Failed() {
		t.Logf("console:\n%s", Tail(c.Console(), 40))
	}
	if err := l.Terminate(ctx, c.ID); err != nil {
		t.Error(err)
	}
	if err := l.Cluster.Do(ctx, http.MethodDelete, "/api/v1/nodes/"+c.Name(), nil, nil); err != nil && !kube.NotFound(err) {
		t.Error(err)
	}
}

// pattern matches a line that says want.
func pattern(want string) *regexp.Regexp {
	return regexp.MustCompile(strings.ReplaceAll(regexp.QuoteMeta(want), `\*`, `[^\n]*?`))
}

// waitLine waits until a line of ours on the serial console ends in want.
func waitLine(t *testing.T, c *CVM, want string) {
	t.Helper()
	ctx, re := within(t, 2*time.Minute), regexp.MustCompile(`(?m)tkenode: [^\n]*`+pattern(want).String()+`\r?$`)
	for {
		b, err := os.ReadFile(c.Console())
		if err != nil {
			t.Fatal(err)
		}
		if re.Match(b) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not on the console: %s", want)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// told looks at what a human finds who logs in.
func (b badInput) told(t *testing.T, l *Lab, c *CVM) {
	t.Helper()
	out := l.mustRun(t, c, `tkenode status; echo "exit $?"; echo ==journal
		journalctl -b -o cat -u tkenode-bootstrap -u tkenode-agent; echo ==units
		systemctl show -P ActiveState kubelet containerd tkenode-bootstrap; systemctl show -P NRestarts tkenode-bootstrap; echo ==files
		ls -A /var/lib/tkenode/config /var/lib/tkenode/pki /etc/kubernetes 2>/dev/null | grep -v : || true`)
	status, rest, _ := strings.Cut(out, "==journal")
	t.Logf("\n%s", status)
	journal, rest, _ := strings.Cut(rest, "==units")
	units, files, _ := strings.Cut(rest, "==files")
	status = strings.Join(strings.Fields(status), " ") // it is wrapped
	for _, want := range b.want {
		if !pattern(want).MatchString(status) {
			t.Errorf("tkenode status lacks %q:\n%s", want, status)
		}
		if !pattern(want).MatchString(journal) {
			t.Errorf("the journal lacks %q:\n%s", want, journal)
		}
	}
	if want := fmt.Sprintf("%s is False", b.condition); !strings.Contains(status, want) || !strings.Contains(status, b.reason) {
		t.Errorf("tkenode status lacks %q and %s:\n%s", want, b.reason, status)
	}
	if !strings.HasSuffix(status, "exit 3") {
		t.Errorf("tkenode status ends in %q, not in exit 3", status[max(0, len(status)-10):])
	}
	bootstrap := "activating" // waits
	switch {
	case b.condition != node.ConfigSealed:
		bootstrap = "active" // done
	case b.heal == nil:
		bootstrap = "failed"
	}
	if got, want := strings.Fields(units), []string{"inactive", "inactive", bootstrap, "0"}; fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("kubelet, containerd, tkenode-bootstrap and its restarts: %v, want %v", got, want)
	}
	if files = strings.TrimSpace(files); b.condition == node.ConfigSealed && files != "" {
		t.Errorf("files of a node: %s", files)
	}
}

// calm makes sure that what is wrong is not tried again and again: a try is some
// ten packets, and the pauses between them grow to a second or two.
func calm(t *testing.T, l *Lab, c *CVM) {
	t.Helper()
	const watch, packets = 2 * time.Second, 100
	before := sent(t, l, c)
	time.Sleep(watch)
	if n := sent(t, l, c) - before; n > packets {
		t.Errorf("%d packets in %s", n, watch)
	}
}

// sent returns how many packets the primary ENI has sent.
func sent(t *testing.T, l *Lab, c *CVM) uint64 {
	t.Helper()
	for _, e := range l.Region.Snapshot().ENIs {
		if e.Instance == c.ID && e.Primary {
			return l.Net.Counters()[e.ID].Tx.Packets
		}
	}
	t.Fatalf("%s has no primary ENI", c.ID)
	return 0
}

// untouched makes sure that nothing has been written to the data disk, and that
// there is no Node.
func (b badInput) untouched(t *testing.T, l *Lab, c *CVM, content string) {
	t.Helper()
	if _, err := l.Cluster.Node(t.Context(), c.Name()); !kube.NotFound(err) {
		t.Errorf("there is a Node %s (%v)", c.Name(), err)
	}
	for _, d := range l.Region.Snapshot().Disks {
		if d.Instance != c.ID || d.System {
			continue
		}
		path := l.host.diskPath(d.ID)
		if content == "" {
			st, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if n := st.Sys().(*syscall.Stat_t).Blocks; n != 0 {
				t.Errorf("%d blocks of the blank disk were written", n)
			}
			return
		}
		if was, is := digest(t, content, int64(d.SizeGiB)<<30), digest(t, path, 0); !bytes.Equal(was, is) {
			t.Error("the disk is not what it was")
		}
		return
	}
	t.Errorf("%s has no data disk", c.ID)
}

// digest hashes a file as if it were of at least that size, with zeros at its end.
func digest(t *testing.T, path string, size int64) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		t.Fatal(err)
	}
	for zeros := make([]byte, 1<<20); n < size; n += int64(len(zeros)) {
		h.Write(zeros[:min(int64(len(zeros)), size-n)])
	}
	return h.Sum(nil)
}

// requests counts the certificate requests that the API server has taken.
func requests(t *testing.T, l *Lab) int {
	t.Helper()
	var list struct{ Items []struct{} }
	if err := l.Cluster.Do(t.Context(), http.MethodGet, "/apis/certificates.k8s.io/v1/certificatesigningrequests", nil, &list); err != nil {
		t.Fatal(err)
	}
	return len(list.Items)
}
