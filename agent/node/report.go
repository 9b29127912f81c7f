package node

import "time"

// ReportFile is where bootstrap says how far it is; it survives bootstrap and
// ends with the boot.
const ReportFile = "/run/tkenode/bootstrap.json"

// Report is bootstrap's account of itself, rewritten at every step.
type Report struct {
	Phase   string       `json:"phase"` // the step it is at, or stopped at
	PID     int          `json:"pid"`   // of the process that writes it
	Done    bool         `json:"done"`  // everything is as it should be; bootstrap has ended
	Class   string       `json:"class,omitempty"`
	Reason  string       `json:"reason,omitempty"`
	Message string       `json:"message,omitempty"` // of the error, if there is one
	Since   time.Time    `json:"since"`             // of Phase, or of the error
	Steps   []ReportStep `json:"steps"`             // in order
	// Digest is of the sealed configuration that this boot has confirmed to be
	// this instance's own. Until it is there, nobody may act on what is sealed:
	// the disk may be an image captured from another node.
	Digest string `json:"digest,omitempty"`
}

// ReportStep is one step of bootstrap in the ledger of the boot.
type ReportStep struct {
	Name  string    `json:"name"`
	Began time.Time `json:"began"`
	Ended time.Time `json:"ended,omitzero"` // zero: not yet
}
