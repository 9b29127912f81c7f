package node_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/tkenode/tkenode/agent/node"
)

// TestSecretIsNotPrinted: no way of printing a Secret, or what it is in, shows it.
func TestSecretIsNotPrinted(t *testing.T) {
	const text = "s3cr3t"
	s := node.NewSecret(text)
	var nilPointer *node.Secret
	holders := map[string]any{
		"itself": s, "pointer": &s, "zero": node.Secret{}, "nil": nilPointer,
		"slice": []node.Secret{s}, "map": map[string]node.Secret{"k": s},
		"exported":           struct{ S node.Secret }{s},
		"unexported":         struct{ s node.Secret }{s},
		"unexported pointer": struct{ s *node.Secret }{&s},
		"nested":             struct{ s struct{ S []node.Secret } }{struct{ S []node.Secret }{[]node.Secret{s}}},
	}
	for name, h := range holders {
		var out bytes.Buffer
		for _, verb := range "vTtbcdoOqxXUeEfFgGsp" {
			for _, flags := range []string{"", "+", "#", " ", "-20", "020"} {
				fmt.Fprintf(&out, "%"+flags+string(verb)+"\n", h)
			}
		}
		fmt.Fprintln(&out, h)
		slog.New(slog.NewTextHandler(&out, nil)).Info("x", "h", h)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "h", h)
		for _, marshal := range []func(any) ([]byte, error){json.Marshal, yaml.Marshal} {
			b, err := marshal(h)
			if err != nil && name != "unexported pointer" {
				t.Errorf("%s: %v", name, err)
			}
			out.Write(b)
		}
		for _, shown := range []string{text, fmt.Sprintf("%x", text), fmt.Sprintf("%X", text), fmt.Sprint([]byte(text)), fmt.Sprintf("% x", text)} {
			if strings.Contains(out.String(), shown) {
				t.Errorf("%s: %q is in\n%s", name, shown, &out)
			}
		}
	}
	if s.Reveal() != text || s.IsZero() || !(node.Secret{}).IsZero() || (node.Secret{}).Reveal() != "" {
		t.Error("a secret must be what it is")
	}
}
