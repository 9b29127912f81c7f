package nodeconfig

import (
	"fmt"
	"strings"
	"testing"
)

// TestSyntaxLine: the line that is named is the one to look at, although YAML's
// parser means another one, or none.
func TestSyntaxLine(t *testing.T) {
	for doc, line := range map[string]int{
		"a: b\n c: d\n":                          2,
		"a:\n  b: 1\n c: 2\nd: 3\n":              3,
		"a:\n\tb: 1\n":                           2,
		"a: 1\nb: \"no end\nc: 1\nd: 2\n":        2,
		"a: 1\nb: [1,\n  2,\nc: 1\n":             2,
		"a: 1\nb: *nowhere\nc: 1\n":              2,
		"a: 1\nb: @x\n":                          2,
		"a: 1\nb: {c: 1}}\nd: 1\n":               2,
		"a: 1\n- b\n":                            2,
		"x: 1\ny: 1\n---\nz: 1\n w: 2\n":         5,
		strings.Repeat("a: 1\n", 300) + "  b: 1": 301,
	} {
		_, err := Decode([]byte(doc))
		want := fmt.Sprintf("NodeConfig line %d: not YAML from here on: ", line)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", doc[max(0, len(doc)-60):], err, want)
		}
	}
}

const header = "apiVersion: tkenode.io/v1alpha1\nkind: NodeConfig\n"

// TestDecodeSaysWhy holds the words for values that a general decoder takes.
func TestDecodeSaysWhy(t *testing.T) {
	many := "kubelet:\n  config:\n"
	for i := range 50 {
		many += fmt.Sprintf("    noSuchField%d: 1\n", i)
	}
	for name, c := range map[string]struct{ doc, want, not string }{
		"large":           {header + "kubelet: {config: {podPidsLimit: 9007199254740993}}\n", "kubelet.config.podPidsLimit: found the number 9007199254740993, expected one of at most 9007199254740992", ""},
		"octal":           {header + "kubelet: {config: {oomScoreAdj: 010}}\n", "found the number 010, which YAML takes for octal", ""},
		"octal of ours":   {header + "network: {enis: 08}\n", "network.enis: found", ""},
		"out of range":    {header + "network: {enis: 4294967297}\n", "network.enis: found 2147483647, expected 1 to 19", ""},
		"header's type":   {"apiVersion: [x]\nkind: NodeConfig\n", "apiVersion: found a list, expected text", "missing"},
		"a line at end":   {header + "---\n", "cluster.id: missing", "second document"},
		"two documents":   {header + "---\na: 1\n", "line 3: a second document begins here", ""},
		"an escape":       {header + "\"a\\e[2J\\nb\": 1\n", `"a\x1b[2J\nb": no such field`, "\x1b"},
		"a long key":      {header + strings.Repeat("k", 500) + ": 1\n", "kkk…\": no such field", strings.Repeat("k", 70)},
		"many problems":   {header + many, "\nand ", "noSuchField30"},
		"an escaped type": {header + "node: {labels: {a: !!int \"\\e[2J\"}}\n", "found the number �[2J", "\x1b"},
	} {
		_, err := Decode([]byte(c.doc))
		if err == nil || !strings.Contains(err.Error(), c.want) || c.not != "" && strings.Contains(err.Error(), c.not) {
			t.Errorf("%s: got %v, want %q and not %q", name, err, c.want, c.not)
		}
	}
}
