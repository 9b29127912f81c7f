package bootstrap

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// joinedStage is a node that has joined. What is said from now on is new.
func joinedStage(t *testing.T) *stage {
	s := newStage(t)
	if err := s.boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.forget()
	return s
}

func (s *stage) forget() {
	s.console.Reset()
	s.journal.Reset()
	s.log = nil
	s.began = time.Now()
}

// TestLaterBoots: one golden each, as for the first.
func TestLaterBoots(t *testing.T) {
	const aYear = 366 * 24 * time.Hour
	silence := errors.New("read metadata instance-id: connection refused")
	current := func(s *stage) string { return filepath.Join(s.root, node.SealedPath) }
	for name, c := range map[string]struct {
		set  func(s *stage)
		asks bool // the API server, for another certificate
	}{
		"reboot": {set: func(*stage) {}},
		"reboot-metadata-silent": {set: func(s *stage) {
			s.factsError = s.until(time.Hour, silence)
		}},
		"reboot-resized": {set: func(s *stage) { s.facts.InstanceType = "S5.LARGE8" }},
		"reboot-expired": {set: func(*stage) { time.Sleep(aYear) }, asks: true},
		"reboot-expired-token-too": {set: func(s *stage) {
			s.token = "fedcba.0123456789abcdef"
			time.Sleep(aYear)
		}, asks: true},
		"reboot-certificate-gone": {set: func(s *stage) {
			if err := os.Remove(filepath.Join(s.root, node.ClientCertPath)); err != nil {
				s.t.Fatal(err)
			}
		}, asks: true},
		"reboot-certificate-damaged": {set: func(s *stage) { s.put(node.ClientCertPath, "-----BEGIN") }, asks: true},
		"reboot-new-config": {set: func(s *stage) { // of which only a node without a certificate takes notice
			s.userData = strings.Replace(s.userData, "subnet-pods0001", "subnet-pods0002", 1)
			time.Sleep(aYear)
		}, asks: true},
		"reboot-seal-damaged": {set: func(s *stage) {
			if err := os.Truncate(current(s), 100); err != nil {
				s.t.Fatal(err)
			}
		}, asks: true},
		"image-of-another": {set: func(s *stage) {
			s.facts.InstanceID = "ins-lab00002"
			s.put("/var/lib/tkenode/eni/ledger.json", "{}")
			s.put("/var/lib/kubelet/cpu_manager_state", "{}")
		}, asks: true},
		"image-of-another-metadata-late": {set: func(s *stage) {
			s.facts.InstanceID = "ins-lab00002"
			s.put("/sys/class/dmi/id/product_uuid", "00000000-0000-0000-0000-000000000000\n")
			s.factsError = s.until(30*time.Second, silence)
		}, asks: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := joinedStage(t)
				c.set(s)
				s.began = time.Now()
				s.boot(t.Context())
				s.golden(name)
				if asked := len(s.log) > 0; asked != c.asks {
					t.Errorf("API server was asked %q, want some: %v", s.log, c.asks)
				}
				if s.err == nil && c.asks {
					s.joined()
				}
			})
		})
	}
}

// TestKilledAnywhere cuts a first boot off after each thing that it writes, also
// in the middle of one, and boots again. The end is always the same.
func TestKilledAnywhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		whole := joinedStage(t)
		want := scrub(whole.tree())
		pki := filepath.Join(whole.root, node.KubeletPKI)
		pair, err := os.Readlink(filepath.Join(whole.root, node.ClientCertPath))
		if err != nil {
			t.Fatal(err)
		}
		// In the order in which they come to be.
		writes := []string{
			filepath.Join(whole.root, node.ConfigDir, "1.json"),
			filepath.Join(whole.root, node.SealedPath),
			filepath.Join(pki, pair),
			filepath.Join(whole.root, node.ClientCertPath),
		}
		for kept := range writes {
			for _, half := range []bool{false, true} {
				s := newStage(t)
				s.fakeCluster, s.userData, s.dial = whole.fakeCluster, whole.userData, whole.dial
				for _, path := range writes[:kept] {
					s.copy(whole, path, false)
				}
				if half {
					s.copy(whole, writes[kept], true)
				}
				time.Sleep(time.Minute)
				if err := s.boot(t.Context()); err != nil {
					t.Fatalf("killed after %d writes, half of the next: %v: %v", kept, half, err)
				}
				s.joined()
				got := slices.Compact(strings.Split(scrub(s.tree()), "\n")) // an orphaned pair stays, unused
				if !slices.Equal(got, strings.Split(want, "\n")) {
					t.Errorf("killed after %d writes, half of the next: %v: got\n%s\nwant\n%s", kept, half, strings.Join(got, "\n"), want)
				}
				s.forget()
				if err := s.boot(t.Context()); err != nil || len(s.log) > 0 {
					t.Errorf("killed after %d writes: the boot after the next asks again: %v %q", kept, err, s.log)
				}
			}
		}
	})
}

// copy takes a file or link over from another node, or the half of it that replace
// was killed in.
func (s *stage) copy(from *stage, path string, half bool) {
	s.t.Helper()
	rel, err := filepath.Rel(from.root, path)
	if err != nil {
		s.t.Fatal(err)
	}
	to := filepath.Join(s.root, rel)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if half {
		to = filepath.Join(filepath.Dir(to), temporary)
	}
	if target, err := os.Readlink(path); err == nil {
		if err := os.Symlink(target, to); err != nil {
			s.t.Fatal(err)
		}
		return
	}
	b, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	if half {
		b = b[:len(b)/2]
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// TestReportWhileWaiting: the reason stands in the report at once, not only when
// it has been spoken of, and an interrupt ends the wait with exit status 2.
func TestReportWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.refuseDial = func() error { return errors.New("no route to host") }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); s.boot(ctx) }()

		time.Sleep(time.Second)
		synctest.Wait()
		r := s.report()
		if r.Done || r.Phase != "api-server" || r.Class != "waiting" || r.Reason != ReasonUnreachable || !r.Since.Equal(s.began) {
			t.Errorf("report %+v, since %v, want since %v", r, r.Since, s.began)
		}
		if !strings.Contains(r.Message, "no route to host") {
			t.Errorf("message %q", r.Message)
		}
		time.Sleep(time.Hour)
		words := strings.Count(s.console.String(), "waiting for")
		if words < 8 || words > 16 {
			t.Errorf("spoke %d times in an hour:\n%s", words, s.console.String())
		}
		if n := strings.Count(s.journal.String(), "\n"); n > 40 {
			t.Errorf("logged %d lines in an hour", n)
		}
		cancel()
		<-done
		if ExitCode(s.err) != ExitBroken || !errors.Is(s.err, context.Canceled) {
			t.Errorf("interrupted: %v, exit %d", s.err, ExitCode(s.err))
		}
		if tree := s.tree(); strings.Contains(tree, "/var/") {
			t.Errorf("an interrupted boot left\n%s", tree)
		}
	})
}

// TestNeverHot: with an API server that refuses every connection, an hour has
// few attempts in it.
func TestNeverHot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		dials := 0
		s.refuseDial = func() error { dials++; return errors.New("connection refused") }
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		s.boot(ctx)
		if low, high := int(time.Hour/longestPause), int(time.Hour/(longestPause/2))+10; dials < low || dials > high {
			t.Errorf("%d attempts in an hour, want %d to %d", dials, low, high)
		}
	})
}

// TestDiskUnusable: the API server is asked for nothing else, the reason is said,
// and another try may succeed.
func TestDiskUnusable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.put(filepath.Dir(node.ConfigDir), "not a directory")
		s.boot(t.Context())
		if ExitCode(s.err) != ExitBroken || node.ReasonOf(s.err, "") != ReasonState || s.report().Phase != "seal" {
			t.Errorf("got %v, exit %d, at %s", s.err, ExitCode(s.err), s.report().Phase)
		}
		if err := os.Remove(filepath.Join(s.root, filepath.Dir(node.ConfigDir))); err != nil {
			t.Fatal(err)
		}
		if err := s.boot(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.joined()
	})
}

// TestUserDataFile: a file instead of the metadata service's user-data.
func TestUserDataFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t)
		s.userDataError = func() error { return errors.New("not to be asked") }
		s.put("/user-data", s.userData)
		s.userDataFile = filepath.Join(s.root, "user-data")
		if err := Run(t.Context(), s.options()); err != nil {
			t.Fatal(err)
		}
		s.joined()
		s.userDataFile += ".none"
		s2 := newStage(t)
		s2.userDataFile = s.userDataFile
		if err := Run(t.Context(), s2.options()); !errors.Is(err, fs.ErrNotExist) || ExitCode(err) != ExitHuman {
			t.Errorf("got %v", err)
		}
	})
}
