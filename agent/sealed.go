package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// sealPoll is how often the agent looks whether a configuration has been sealed.
// It does so for the seconds of a first boot, and never again.
const sealPoll = 100 * time.Millisecond

// waitSealed returns the current sealed configuration as soon as there is one
// that bootstrap has confirmed. Until then ConfigSealed says what bootstrap says.
func (a *Agent) waitSealed(ctx context.Context, dir string) (node.Sealed, error) {
	for {
		s, err := readSealed(filepath.Join(dir, "current"))
		if err == nil && !confirmed(s, node.ReportFile) {
			// It may be another node's, of which this disk is an image.
			err = fs.ErrNotExist
		}
		if err == nil {
			a.sealed.Store(&s)
			a.board.Set("bootstrap", node.ConfigSealed, node.True, "Sealed",
				fmt.Sprintf("generation %d, sealed %s", s.Generation, s.SealedAt.Format(time.RFC3339)))
			return s, nil
		}
		if errors.Is(err, fs.ErrNotExist) {
			reason, message := unsealed(node.ReportFile)
			a.board.Set("bootstrap", node.ConfigSealed, node.False, reason, message)
		} else {
			a.board.Set("bootstrap", node.ConfigSealed, node.False, "Damaged",
				err.Error()+"; put the file back from a backup, or launch the instance anew: a node is never run by a configuration that nobody sealed")
		}
		select {
		case <-ctx.Done():
			return s, ctx.Err()
		case <-time.After(sealPoll):
		}
	}
}

func readSealed(path string) (node.Sealed, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return node.Sealed{}, err
	}
	s, err := node.DecodeSealed(text)
	if err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// confirmed reports whether bootstrap has found, in this boot, that the sealed
// configuration is this instance's.
func confirmed(s node.Sealed, report string) bool {
	r, err := readReport(report)
	return err == nil && r.Digest == s.Digest
}

// sealedNow reports whether bootstrap has sealed the configuration in this boot. Of
// one that was started once more since, the report does not tell any longer.
func sealedNow(s node.Sealed, report string) bool {
	r, err := readReport(report)
	return err == nil && r.Digest == s.Digest &&
		slices.ContainsFunc(r.Steps, func(step node.ReportStep) bool { return step.Name == "seal" })
}

// unsealed says, in bootstrap's words, why nothing is sealed.
func unsealed(path string) (reason, message string) {
	r, err := readReport(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "BootstrapNotStarted", "bootstrap has not begun; systemctl status tkenode-bootstrap"
	case err != nil:
		return "BootstrapUnknown", err.Error()
	case !r.Done && r.Class != node.ClassTerminal.String() && syscall.Kill(r.PID, 0) == syscall.ESRCH:
		return "BootstrapDied", strings.TrimSpace(fmt.Sprintf("bootstrap (process %d) has ended at %s without a result, and is started again after a while; systemctl status tkenode-bootstrap. %s",
			r.PID, r.Phase, r.Message))
	case r.Message != "":
		return r.Reason, r.Message
	default:
		return "BootstrapRunning", "bootstrap is at: " + r.Phase
	}
}

func (a *Agent) currentSealed() (node.Sealed, bool) {
	s := a.sealed.Load()
	if s == nil {
		return node.Sealed{}, false
	}
	return *s, true
}
