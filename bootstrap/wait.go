package bootstrap

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// How long one attempt may take, and how long the pause after it is. Ten thousand
// nodes may wait for the same thing: half of each pause is chance.
const (
	metadataTimeout = 5 * time.Second
	apiTimeout      = 10 * time.Second
	firstPause      = 200 * time.Millisecond
	longestPause    = 2 * time.Second
	// What has not come after a minute may not come for hours, and the whole fleet
	// may be asking.
	patience   = time.Minute
	laterPause = 20 * time.Second
)

// until calls try until it succeeds, fails for good, or ctx ends, and says from
// time to time what is waited for.
func (r *run) until(ctx context.Context, timeout time.Duration, try func(context.Context) error) (err error) {
	defer func() { r.ledger.waited(err) }()
	longest, began := longestPause, time.Now()
	for pause := firstPause; ; pause = min(2*pause, longest) {
		if time.Since(began) > patience {
			longest = laterPause
		}
		attempt, cancel := context.WithTimeout(ctx, timeout)
		err = try(attempt)
		cancel()
		if err == nil || node.ClassOf(err) == node.ClassTerminal {
			return err
		}
		if ctx.Err() == nil {
			r.ledger.waiting(err)
		}
		select {
		case <-time.After(pause/2 + rand.N(pause/2)):
		case <-ctx.Done():
			return fmt.Errorf("interrupted (%w) while: %w", context.Cause(ctx), err)
		}
	}
}
