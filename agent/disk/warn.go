package disk

import (
	"log/slog"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// Warning is what is wrong with a disk although it is mounted and serves.
type Warning struct {
	Reason  string    `json:"reason"`
	Message string    `json:"message"`
	Since   time.Time `json:"since"`
}

// The reasons of warnings.
const (
	ReasonGrowRefused   = "GrowRefused"   // the file system cannot be made to fill its device
	ReasonSizeUnknown   = "SizeUnknown"   // whether it does is not known
	ReasonNeedsReattach = "NeedsReattach" // the disk is encrypted, and larger than its device is here
	ReasonNotSeen       = "NotSeen"       // the disk is larger than its device is here
)

// warn enters what is wrong with the growth of the disk, or that nothing is.
func (a *account) warn(w *Warning, log *slog.Logger) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if w != nil {
		if w.Since = time.Now(); a.growth != nil && a.growth.Reason == w.Reason {
			w.Since = a.growth.Since
		}
		if a.growth == nil || *a.growth != *w {
			log.Warn("the disk serves, but", "reason", w.Reason, "message", w.Message)
		}
	}
	a.growth = w
}

// Warnings returns what is wrong with disks that serve all the same.
func Warnings(all []State) []node.Condition {
	c := node.Condition{Type: node.DiskNotGrown, Status: node.True}
	for _, s := range all {
		for _, w := range s.Warnings {
			if c.Message != "" {
				c.Message += "; "
			} else {
				c.Reason, c.Since = w.Reason, w.Since
			}
			if w.Since.Before(c.Since) {
				c.Since = w.Since
			}
			c.Message += w.Message
		}
	}
	if c.Message == "" {
		return nil
	}
	return []node.Condition{c}
}
