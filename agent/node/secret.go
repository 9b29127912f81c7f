package node

import (
	"fmt"
	"io"
	"log/slog"
)

// Secret is text that prints, logs and marshals as "[redacted]". Reveal returns
// it for the one place that sends it.
type Secret struct {
	// A pointer, which fmt does not follow where it may not call Format: in an
	// unexported field of another type.
	text *string
}

const redacted = "[redacted]"

// NewSecret wraps text.
func NewSecret(text string) Secret { return Secret{&text} }

// Reveal returns the text.
func (s Secret) Reveal() string {
	if s.text == nil {
		return ""
	}
	return *s.text
}

// IsZero reports whether there is no secret.
func (s Secret) IsZero() bool { return s.Reveal() == "" }

// Format prints the same for every verb; a String would be asked by some only.
func (s Secret) Format(f fmt.State, _ rune)   { _, _ = io.WriteString(f, redacted) }
func (s Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// UnmarshalText takes the text as it is.
func (s *Secret) UnmarshalText(b []byte) error { *s = NewSecret(string(b)); return nil }
