package node

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Sealed is one generation of a node's configuration, as bootstrap accepted it:
// decoded, defaulted, validated, and written once. The agent only reads it.
type Sealed struct {
	Generation int       `json:"generation"` // 1 is the first boot's
	SealedAt   time.Time `json:"sealedAt"`
	Digest     string    `json:"digest"` // "sha256:…" of Config and Facts
	// Machine is the DMI system UUID, by which a reboot knows its instance again
	// although the metadata service is silent. Empty: the machine has none.
	Machine string `json:"machine,omitempty"`
	Config  Config `json:"config"`
	Facts   Facts  `json:"facts"`
}

// Seal returns the generation of cfg on the instance that f describes.
func Seal(generation int, cfg Config, f Facts, at time.Time) (Sealed, error) {
	s := Sealed{Generation: generation, SealedAt: at.UTC().Truncate(time.Second), Config: cfg, Facts: f}
	digest, err := s.digest()
	if err != nil {
		return Sealed{}, err
	}
	s.Digest = digest
	return s, nil
}

// Encode returns the file's content. The bootstrap token is not in it.
func (s Sealed) Encode() ([]byte, error) {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode generation %d: %w", s.Generation, err)
	}
	return append(b, '\n'), nil
}

// DecodeSealed reads what Encode wrote and refuses anything else: a file that
// was cut off, edited by hand or damaged.
func DecodeSealed(b []byte) (Sealed, error) {
	var s Sealed
	var raw struct{ Config, Facts json.RawMessage }
	for _, into := range []any{&s, &raw} {
		// What follows the object is a line break, or of no consequence.
		if err := json.NewDecoder(bytes.NewReader(b)).Decode(into); err != nil {
			return Sealed{}, fmt.Errorf("decode sealed configuration: %w", err)
		}
	}
	digest, err := digestOf(raw.Config, raw.Facts)
	if err != nil {
		return Sealed{}, fmt.Errorf("decode sealed configuration: %w", err)
	}
	if s.Digest != digest {
		return Sealed{}, fmt.Errorf("decode sealed configuration: its digest is %q, its content's is %q", s.Digest, digest)
	}
	return s, nil
}

// digest is that of the file that Encode writes.
func (s Sealed) digest() (string, error) {
	config, err := json.Marshal(s.Config)
	if err != nil {
		return "", fmt.Errorf("encode generation %d: %w", s.Generation, err)
	}
	facts, err := json.Marshal(s.Facts)
	if err != nil {
		return "", fmt.Errorf("encode generation %d: %w", s.Generation, err)
	}
	return digestOf(config, facts)
}

// digestOf is computed over the text that is sealed, but for its white space, and
// not over what a version of this program makes of it: one that has a field more
// must find the same.
func digestOf(config, facts json.RawMessage) (string, error) {
	b, err := json.Marshal(struct{ Config, Facts json.RawMessage }{config, facts}) // which compacts them
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}
