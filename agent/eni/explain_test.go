package eni

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// TestExplainOfWhoGivesUp: who asks while another question is answered waits no
// longer than he wants to, and nothing is looked at for him after that.
func TestExplainOfWhoGivesUp(t *testing.T) {
	n := bare(t)
	n.sealed = func() (node.Sealed, bool) { return node.Sealed{}, true }
	n.ledger.witness = func() (witness, bool, error) { return witness{}, false, nil }
	n.explaining <- struct{}{}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := n.Explain(ctx, Question{IP: netip.MustParseAddr("10.0.0.9")})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
