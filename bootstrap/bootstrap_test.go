package bootstrap

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/bootstrap/nodeconfig"
)

// stage is a node before its first boot, in a cluster and a cloud where all is
// well. A test breaks what it is about.
type stage struct {
	t *testing.T
	*fakeCluster
	root string

	userData      string
	userDataError func() error
	facts         node.Facts
	factsError    func() error
	zoneError     func() error

	began   time.Time
	console bytes.Buffer
	journal bytes.Buffer
	dial    Options
	err     error
}

const userDataForm = `apiVersion: tkenode.io/v1alpha1
kind: NodeConfig
cluster:
  id: cls-lab00001
  endpoint: https://10.0.0.10:6443
  certificateAuthority: |
%s
  bootstrapToken: abcdef.0123456789abcdef
  dns: [172.16.0.10]
network:
  subnetIDs: [subnet-pods0001]
  securityGroupIDs: [sg-lab00001]
`

// newStage must be called in a synctest bubble.
func newStage(t *testing.T) *stage {
	s := &stage{t: t, fakeCluster: newFakeCluster(t), root: t.TempDir(), facts: labFacts, began: time.Now()}
	s.facts.ZoneID, s.facts.ENIQuota, s.facts.IPQuota = 0, 0, 0
	indented := "    " + strings.ReplaceAll(strings.TrimSpace(s.ca.pem), "\n", "\n    ")
	s.userData = fmt.Sprintf(userDataForm, indented)
	s.dial.Dial = s.serve()
	s.put("/sys/class/dmi/id/product_uuid", "3f2504e0-4f89-11d3-9a0c-0305e82c3301\n")
	return s
}

func (s *stage) put(path, text string) {
	s.t.Helper()
	path = filepath.Join(s.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

func (s *stage) UserData(context.Context) ([]byte, error) {
	if s.userDataError != nil {
		if err := s.userDataError(); err != nil {
			return nil, err
		}
	}
	return []byte(s.userData), nil
}

func (s *stage) Facts(context.Context) (node.Facts, error) {
	if s.factsError != nil {
		if err := s.factsError(); err != nil {
			return node.Facts{}, err
		}
	}
	return s.facts, nil
}

// boot runs bootstrap once, as one boot would: with an empty /run.
func (s *stage) boot(ctx context.Context) error {
	s.t.Helper()
	if err := os.RemoveAll(filepath.Join(s.root, "run")); err != nil {
		s.t.Fatal(err)
	}
	s.err = Run(ctx, Options{
		Metadata: s, Root: s.root, Dial: s.dial.Dial,
		CloudFacts: func(_ context.Context, _ node.Config, f node.Facts) (node.Facts, error) {
			if s.zoneError != nil {
				if err := s.zoneError(); err != nil {
					return node.Facts{}, err
				}
			}
			f.ZoneID, f.ENIQuota, f.IPQuota = labFacts.ZoneID, labFacts.ENIQuota, labFacts.IPQuota
			return f, nil
		},
		Log: slog.New(slog.NewTextHandler(&s.journal, nil)), Console: &s.console,
	})
	s.secrets()
	return s.err
}

// secrets: whatever happened, nothing that anybody reads or that stays on disk
// has the token's secret part.
func (s *stage) secrets() {
	s.t.Helper()
	const secret = "0123456789abcdef"
	for name, text := range map[string]string{"console": s.console.String(), "journal": s.journal.String()} {
		if strings.Contains(text, secret) {
			s.t.Errorf("the %s has the token in it:\n%s", name, text)
		}
	}
	s.walk(func(path string, d fs.DirEntry) {
		if !d.Type().IsRegular() {
			return
		}
		b, err := os.ReadFile(filepath.Join(s.root, path))
		if err != nil {
			s.t.Fatal(err)
		}
		if bytes.Contains(b, []byte(secret)) {
			s.t.Errorf("%s has the token in it", path)
		}
	})
}

func (s *stage) walk(f func(path string, d fs.DirEntry)) {
	s.t.Helper()
	err := fs.WalkDir(os.DirFS(s.root), ".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !strings.HasPrefix(path, "sys") {
			f(path, d)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// tree lists what is on the disk: all that a test did not put there itself.
func (s *stage) tree() string {
	var b strings.Builder
	s.walk(func(path string, d fs.DirEntry) {
		info, err := d.Info()
		if err != nil {
			s.t.Fatal(err)
		}
		switch {
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(filepath.Join(s.root, path))
			if err != nil {
				s.t.Fatal(err)
			}
			fmt.Fprintf(&b, "/%s -> %s\n", path, target)
		case !d.IsDir():
			fmt.Fprintf(&b, "/%s %04o\n", path, info.Mode().Perm())
		}
	})
	return b.String()
}

func (s *stage) report() node.Report {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.root, node.ReportFile))
	if err != nil {
		s.t.Fatal(err)
	}
	var r node.Report
	if err := json.Unmarshal(b, &r); err != nil {
		s.t.Fatal(err)
	}
	return r
}

func (s *stage) sealed() node.Sealed {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.root, node.SealedPath))
	if err != nil {
		s.t.Fatal(err)
	}
	sealed, err := node.DecodeSealed(b)
	if err != nil {
		s.t.Fatal(err)
	}
	return sealed
}

// What differs between runs: key names and fingerprints, and, since pauses are
// jittered, seconds, and how often the same is said again.
var scrubs = []struct{ pattern, with string }{
	{`node-csr-[0-9a-f]{32}`, "node-csr-NAME"},
	{`key [0-9a-f]{8}`, "key HASH"},
	{`\dh\d+m\d+s (ahead|behind)`, "N $1"},
	{`(for|after) (\d+m)?\d+s`, "$1 N"},
	{`(1999|20\d\d)-\d\d-\d\dT[\d:]{8}Z`, "TIME"},
	{`kubelet-client-20[\d-]{17}`, "kubelet-client-DATE"},
	{`sha256:[0-9a-f]{64}`, "sha256:DIGEST"},
	{`(?m)/tmp/\S*/00\d/`, "/"},
}

func scrub(text string) string {
	for _, s := range scrubs {
		text = regexp.MustCompile(s.pattern).ReplaceAllString(text, s.with)
	}
	return strings.Join(slices.Compact(strings.SplitAfter(text, "\n")), "")
}

// story is what a boot looks like from outside.
func (s *stage) story() *txtar.Archive {
	r := s.report()
	var steps strings.Builder
	for _, step := range r.Steps {
		steps.WriteString(" " + step.Name)
		if step.Ended.IsZero() {
			steps.WriteString("…")
		}
	}
	report := fmt.Sprintf("exit %d\nphase %s\ndone %v\nclass %s\nreason %s\nconfirmed %v\nsteps%s\n%s",
		ExitCode(s.err), r.Phase, r.Done, r.Class, r.Reason, r.Digest != "", &steps, r.Message)
	return &txtar.Archive{Files: []txtar.File{
		{Name: "console", Data: []byte(scrub(s.console.String()))},
		{Name: "report", Data: []byte(scrub(report))},
		{Name: "disk", Data: []byte(scrub(s.tree()))},
	}}
}

func (s *stage) golden(name string) {
	s.t.Helper()
	file := filepath.Join("testdata", "boot", name+".txtar")
	got := txtar.Format(s.story())
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			s.t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		s.t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

// after returns an error source that fails for d after the stage was set.
func (s *stage) until(d time.Duration, err error) func() error {
	return func() error {
		if time.Since(s.began) < d {
			return err
		}
		return nil
	}
}

// TestFirstBoot: one golden a scenario, with everything that is to be seen.
func TestFirstBoot(t *testing.T) {
	refused := os.NewSyscallError("connect", syscall.ECONNREFUSED)
	for name, c := range map[string]struct {
		set  func(s *stage)
		took [2]time.Duration // between these; zero: at once
	}{
		"joins": {set: func(*stage) {}},

		"user-data-none":  {set: func(s *stage) { s.userDataError = s.until(time.Hour, fmt.Errorf("no: %w", fs.ErrNotExist)) }},
		"user-data-empty": {set: func(s *stage) { s.userData = "" }},
		"user-data-invalid": {set: func(s *stage) {
			s.userData = strings.Replace(s.userData, "endpoint:", "endpont:", 1) + "  enis: many\n"
		}},
		"node-name-invalid": {set: func(s *stage) { s.userData += "node: {nameFrom: hostname}\n"; s.facts.Hostname = "VM_0_5" }},

		"metadata-late": {
			set: func(s *stage) {
				s.userDataError = s.until(time.Minute, fmt.Errorf("Get \"http://169.254.0.23/latest/user-data\": %w", refused))
			},
			took: [2]time.Duration{time.Minute, 63 * time.Second},
		},
		// What was waited for has changed: the console says so at once, not when the
		// wait has doubled.
		"metadata-late-then-500": {
			set: func(s *stage) {
				first, second := s.until(45*time.Second, refused), s.until(time.Minute, errors.New("HTTP 500"))
				s.userDataError = func() error { return cmp.Or(first(), second()) }
			},
			took: [2]time.Duration{time.Minute, 63 * time.Second},
		},
		"metadata-500": {
			set:  func(s *stage) { s.factsError = s.until(30*time.Second, errors.New("read metadata mac: HTTP 500")) },
			took: [2]time.Duration{30 * time.Second, 33 * time.Second},
		},

		"apiserver-unreachable": {
			set:  func(s *stage) { s.refuseDial = s.until(90*time.Second, refused) },
			took: [2]time.Duration{90 * time.Second, 90*time.Second + laterPause},
		},
		"apiserver-slow": {
			set: func(s *stage) {
				s.delay = 12 * time.Second
				time.AfterFunc(time.Minute, func() { s.mu.Lock(); s.delay = 0; s.mu.Unlock() })
			},
			took: [2]time.Duration{50 * time.Second, 80 * time.Second},
		},
		"apiserver-503": {
			set: func(s *stage) {
				s.answer = func() (int, any) {
					if s.until(20*time.Second, refused)() != nil {
						return 503, map[string]string{"message": "the server is currently unable to handle the request"}
					}
					return 0, nil
				}
			},
			took: [2]time.Duration{20 * time.Second, 23 * time.Second},
		},
		"wrong-ca":           {set: func(s *stage) { s.serverCA = newCA(s.t, "another") }},
		"wrong-ca-same-name": {set: func(s *stage) { s.serverCA = newCA(s.t, "kubernetes") }},
		"wrong-name":         {set: func(s *stage) { s.serverName = "kubernetes.default.svc" }},
		"clock-behind": {
			set: func(s *stage) {
				s.clockSkew = func() time.Duration {
					if s.until(20*time.Second, refused)() != nil {
						return 2 * time.Hour
					}
					return 0
				}
				s.serverFrom = time.Now().Add(2*time.Hour - time.Minute) // made just now, by the right clock
				time.AfterFunc(20*time.Second, func() { s.mu.Lock(); s.serverFrom = time.Time{}; s.mu.Unlock() })
			},
			took: [2]time.Duration{20 * time.Second, 23 * time.Second},
		},
		"clock-ahead": {
			set: func(s *stage) {
				s.clockSkew = func() time.Duration {
					if s.until(time.Minute, refused)() != nil {
						return -2 * time.Hour
					}
					return 4 * time.Minute // which is near enough
				}
			},
			took: [2]time.Duration{time.Minute, 63 * time.Second},
		},

		"zone-late": {
			set: func(s *stage) {
				s.zoneError = s.until(10*time.Second, node.Waiting("CredentialsMissing", "the CAM role has no credentials yet"))
			},
			took: [2]time.Duration{10 * time.Second, 13 * time.Second},
		},
		"zone-denied": {set: func(s *stage) {
			s.zoneError = s.until(time.Hour, node.Terminal("Unauthorized", "give the instance's CAM role the policy of tkenode", errors.New("cvm DescribeZones: UnauthorizedOperation")))
		}},

		"token-wrong": {
			set:  func(s *stage) { s.token = "abcdef.fedcba9876543210" },
			took: [2]time.Duration{refusalGrace, refusalGrace + 2*time.Second},
		},
		"token-not-known-yet": {
			set:  func(s *stage) { s.warm = s.began.Add(7 * time.Second) },
			took: [2]time.Duration{7 * time.Second, 10 * time.Second},
		},
		"forbidden": {
			set: func(s *stage) {
				s.answer = func() (int, any) {
					return 403, map[string]string{"message": `certificatesigningrequests.certificates.k8s.io is forbidden: User "system:bootstrap:abcdef" cannot create resource`}
				}
			},
			took: [2]time.Duration{refusalGrace, refusalGrace + 2*time.Second},
		},
		"refused": {set: func(s *stage) {
			s.answer = func() (int, any) { return 422, map[string]string{"message": "spec.usages: Invalid value"} }
		}},
		"answer-lost": {set: func(s *stage) { s.loseAnswers = 1 }, took: [2]time.Duration{0, time.Second}},

		"approved-late": {set: func(s *stage) { s.approveIn = time.Minute }, took: [2]time.Duration{time.Minute, 63 * time.Second}},
		"denied":        {set: func(s *stage) { s.condition = "Denied" }},
		"failed":        {set: func(s *stage) { s.condition = "Failed" }},
		"foreign-ca":    {set: func(s *stage) { s.clientCA = newCA(s.t, "another") }},
		"foreign-name":  {set: func(s *stage) { s.commonName = "system:node:other" }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(t)
				c.set(s)
				s.boot(t.Context())
				s.golden(name)
				if took := time.Since(s.began); took < c.took[0] || took > max(c.took[1], 250*time.Millisecond) {
					t.Errorf("it took %v, want %v to %v", took, c.took[0], c.took[1])
				}
				if s.err == nil {
					s.joined()
				}
			})
		})
	}
}

// joined checks what must be so on a node that has joined, whatever the way.
func (s *stage) joined() {
	s.t.Helper()
	sealed := s.sealed()
	cfg, err := nodeconfig.FromUserData([]byte(s.userData))
	if err != nil {
		s.t.Fatal(err)
	}
	facts := s.facts
	facts.ZoneID, facts.ENIQuota, facts.IPQuota = labFacts.ZoneID, labFacts.ENIQuota, labFacts.IPQuota
	want, err := node.Seal(sealed.Generation, cfg, facts, sealed.SealedAt)
	if err != nil {
		s.t.Fatal(err)
	}
	if sealed.Digest != want.Digest || s.report().Digest != sealed.Digest {
		s.t.Errorf("sealed %+v\nwant %+v", sealed, want)
	}
	pair, err := os.ReadFile(filepath.Join(s.root, node.ClientCertPath))
	if err != nil {
		s.t.Fatal(err)
	}
	if err := checkPair(pair, "system:node:10.0.0.5", parseAuthority(s.ca.pem), time.Now()); err != nil {
		s.t.Error(err)
	}
}
