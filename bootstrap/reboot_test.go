package bootstrap

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// posts counts the certificate requests that the API server was sent.
func (s *stage) posts() (n int) {
	for _, l := range s.log {
		if strings.HasPrefix(l, "POST ") {
			n++
		}
	}
	return n
}

func (s *stage) remove(path string) {
	s.t.Helper()
	if err := os.Remove(filepath.Join(s.root, path)); err != nil {
		s.t.Fatal(err)
	}
}

// TestReboot: what a second boot finds, and what it makes of it.
func TestReboot(t *testing.T) {
	for name, c := range map[string]struct {
		between func(s *stage)
		want    string // on the console, or in the error
		fails   bool
		posts   int
	}{
		"all is well": {between: func(*stage) {}, posts: 1},
		"no certificate": {
			between: func(s *stage) { s.remove(node.ClientCertPath) },
			want:    "without a certificate: asking for one", posts: 2,
		},
		// What is sealed stays, and the agent may go on by it.
		"no certificate, and user-data that is none": {
			between: func(s *stage) { s.remove(node.ClientCertPath); s.userData = "" },
			want:    "user-data is empty", posts: 1, fails: true,
		},
		"no certificate, and an old token": {
			between: func(s *stage) { s.remove(node.ClientCertPath); s.token = "abcdef.fedcba9876543210" },
			want:    "does not accept bootstrap token", posts: 2, fails: true,
		},
		"no certificate, and other user-data": {
			between: func(s *stage) { s.remove(node.ClientCertPath); s.userData += "  enis: 2\n" },
			want:    "asking for one", posts: 2,
		},
		// The clock is behind, so that the certificate is not valid yet.
		"a wrong clock": {
			between: func(s *stage) {
				right := time.Now().Add(20 * time.Minute)
				s.clockSkew = func() time.Duration { return max(0, time.Until(right)) }
				s.recertify(right.Add(-10*time.Minute), right.Add(time.Hour))
			},
			want: "ClockSkewed is over", posts: 1,
		},
		"an expired certificate": {
			between: func(s *stage) { s.recertify(time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)) },
			want:    "kubelet's certificate cannot be used, asking for another: valid ", posts: 2,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(t)
				if err := s.boot(t.Context()); err != nil {
					t.Fatal(err)
				}
				first := s.sealed()
				c.between(s)
				err := s.boot(t.Context())
				if said := fmt.Sprint(s.console.String(), err); (err != nil) != c.fails || !strings.Contains(said, c.want) {
					t.Errorf("%v, want failure %v and %q:\n%s", err, c.fails, c.want, said)
				}
				if err != nil && node.ClassOf(err) != node.ClassTerminal {
					t.Errorf("not terminal: %v", err)
				}
				if got := s.sealed(); got.Digest != first.Digest || got.Generation != 1 || s.report().Digest != first.Digest {
					t.Errorf("sealed %+v, confirmed %s; was %+v", got, s.report().Digest, first)
				}
				if n := s.posts(); n < c.posts || c.posts == 1 && n > 1 {
					t.Errorf("%d certificate requests, want %d", n, c.posts)
				}
			})
		})
	}
}

// recertify replaces kubelet's certificate by one with other dates.
func (s *stage) recertify(from, to time.Time) {
	s.t.Helper()
	key := newKey(s.t)
	cert := s.ca.sign(s.t, &x509.Certificate{
		Subject:   pkix.Name{CommonName: "system:node:10.0.0.5", Organization: []string{"system:nodes"}},
		NotBefore: from, NotAfter: to, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, key.Public())
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		s.t.Fatal(err)
	}
	s.put(node.ClientCertPath, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))+
		string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})))
}

// TestImageOfAnother: what another node kept is moved aside, be its seal good or
// damaged.
func TestImageOfAnother(t *testing.T) {
	for _, damage := range []string{"", `"digest": "x`} {
		synctest.Test(t, func(t *testing.T) {
			s := newStage(t)
			if err := s.boot(t.Context()); err != nil {
				t.Fatal(err)
			}
			if damage != "" {
				b, err := os.ReadFile(filepath.Join(s.root, node.SealedPath))
				if err != nil {
					t.Fatal(err)
				}
				s.put(node.SealedPath, strings.Replace(string(b), `"digest": "`, damage, 1))
			}
			s.put("/var/lib/tkenode/eni/journal.json", "{}")
			s.put(node.KubeletRoot+"/cpu_manager_state", "{}")
			mountPoint := filepath.Join(s.root, "/var/lib/tkenode/disk") // whatever is empty stays
			if err := os.MkdirAll(mountPoint, 0o755); err != nil {
				t.Fatal(err)
			}
			s.facts.InstanceID = "ins-lab00002"
			if err := s.boot(t.Context()); err != nil {
				t.Fatal(err)
			}
			tree := s.tree()
			for _, want := range []string{"/var/lib/tkenode/eni.ins-lab00001/journal.json", "/var/lib/tkenode/pki.ins-lab00001/", "/var/lib/kubelet.ins-lab00001/cpu_manager_state", "/var/lib/tkenode/config.ins-lab00001/1.json"} {
				if !strings.Contains(tree, want) {
					t.Errorf("%s is not in\n%s", want, tree)
				}
			}
			if _, err := os.Stat(mountPoint); err != nil {
				t.Error(err)
			}
		})
	}
}

// blade cuts bootstrap off after so many lines of journal and console.
type blade struct{ left int }

type cutOff struct{}

func (b *blade) Write(p []byte) (int, error) {
	if b.left--; b.left == 0 {
		panic(cutOff{})
	}
	return len(p), nil
}

// TestCutOff is law 10: cut off after any line that it has said, and run again, it
// comes to the same, and leaves no key behind.
func TestCutOff(t *testing.T) {
	whole := ""
	for n := 0; ; n++ {
		ended := false
		synctest.Test(t, func(t *testing.T) {
			s := newStage(t)
			if n > 0 {
				ended = s.cut(t.Context(), &blade{n})
			}
			if err := s.boot(t.Context()); err != nil {
				t.Fatalf("cut off after %d lines: %v", n, err)
			}
			s.joined()
			tree := scrub(s.tree())
			if n == 0 {
				whole = tree
			} else if tree != whole {
				t.Errorf("cut off after %d lines, it leaves\n%snot\n%s", n, tree, whole)
			}
		})
		if ended {
			if n < 10 {
				t.Errorf("it has said only %d lines", n)
			}
			return
		}
	}
}

// cut runs bootstrap until the blade falls, and reports whether it ended before.
func (s *stage) cut(ctx context.Context, b *blade) (ended bool) {
	defer func() {
		if e := recover(); e != nil {
			if _, ok := e.(cutOff); !ok {
				panic(e)
			}
		}
	}()
	var both io.Writer = b
	err := Run(ctx, Options{
		Metadata: s, Root: s.root, Dial: s.dial.Dial, Console: both, Log: slog.New(slog.NewTextHandler(both, nil)),
		CloudFacts: func(_ context.Context, _ node.Config, f node.Facts) (node.Facts, error) {
			f.ZoneID, f.ENIQuota, f.IPQuota = labFacts.ZoneID, labFacts.ENIQuota, labFacts.IPQuota
			return f, nil
		},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return true
}

// TestLeftovers: keys that a killed bootstrap has left are gone after the next.
func TestLeftovers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.put(node.KubeletPKI+"/.bootstrap.new", "half a key")
		s.put(node.KubeletPKI+"/kubelet-client-1999-12-31-23-59-59.pem", "a key without a link")
		s.put(node.ConfigDir+"/.bootstrap.new", "half a generation")
		s.put(node.ConfigDir+"/1.json", "a generation without a link")
		if err := s.boot(t.Context()); err != nil {
			t.Fatal(err)
		}
		tree := s.tree()
		if strings.Contains(tree, ".new") || strings.Count(tree, "kubelet-client-") != 3 { // the file, the link and what it leads to
			t.Errorf("the disk holds\n%s", tree)
		}
	})
}

// TestHostNameIsWaitedFor: it is the image's until cloud-init has set it.
func TestHostNameIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.userData += "node: {nameFrom: hostname}\n"
		s.facts.Hostname = "localhost"
		s.factsError = func() error {
			if time.Since(s.began) > 10*time.Second {
				s.facts.Hostname = "Node-A"
			}
			return nil
		}
		if err := s.boot(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{`the host name is still "localhost", the image's`, "HostnameUnset is over", "node node-a of cls-lab00001: joined"} {
			if !strings.Contains(s.console.String(), want) {
				t.Errorf("%q is not in\n%s", want, &s.console)
			}
		}
	})
}

// TestExpiredAuthority: no waiting renews the certificate in the NodeConfig.
func TestExpiredAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		time.Sleep(10*365*24*time.Hour + time.Minute) // the serving certificate was issued before
		err := s.boot(t.Context())
		const want = `its certificate is issued by cluster.certificateAuthority "CN=kubernetes" (key HASH), which is valid TIME to TIME: it is TIME here; write the CA certificate that the cluster has now`
		if node.ClassOf(err) != node.ClassTerminal || !strings.Contains(scrub(err.Error()), want) {
			t.Errorf("got %v", err)
		}
	})
}

// TestServersWords: what an API server says does not drive the console.
func TestServersWords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.answer = func() (int, any) {
			if len(s.requests) == 0 {
				return 0, nil
			}
			return 403, map[string]string{"message": "no \x1b[2J\u202e"}
		}
		err := s.boot(t.Context())
		if err == nil || !strings.Contains(scrub(err.Error()), "does not let bootstrap token abcdef.… read certificate request node-csr-NAME: 403 Forbidden") {
			t.Errorf("got %v", err)
		}
		if text := s.console.String() + s.report().Message; strings.ContainsAny(text, "\x1b\u202e") {
			t.Errorf("unprintable: %q", text)
		}
	})
}

// TestUserDataThatNoTimeMends ends at once, in the words of who has read it.
func TestUserDataThatNoTimeMends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.userDataError = s.until(time.Hour, node.Terminal("UserDataTooLong", "shorten it", errors.New("it has more than 65536 bytes")))
		if err := s.boot(t.Context()); node.ReasonOf(err, "") != "UserDataTooLong" || time.Since(s.began) > time.Second {
			t.Errorf("after %s: %v", time.Since(s.began), err)
		}
	})
}
