package nodeconfig

import (
	"strings"
	"testing"
)

// TestMIMEIsWhole: whatever of a message is missing at its end, and wherever its
// boundary is wrong, it is refused, and the words say why.
func TestMIMEIsWhole(t *testing.T) {
	const head = "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=\"b\"\n\n"
	const part = "--b\nContent-Type: " + MediaType + "\n\nkind: NodeConfig\n"
	const other = "--b\nContent-Type: text/x-shellscript\n\n#!/bin/sh\n"
	for name, c := range map[string]struct{ data, want string }{
		"whole":                   {head + part + "--b--\n", "apiVersion: missing"},
		"whole, no last newline":  {head + part + "--b--", "apiVersion: missing"},
		"blank line before":       {"\n" + head + part + "--b--", "apiVersion: missing"},
		"after a boundary":        {head + part + "--b\n", `ends without the line "--b--"`},
		"in a boundary":           {head + part + "--", `ends without the line "--b--"`},
		"in a part":               {head + part, `ends without the line "--b--"`},
		"in a part's headers":     {head + part + "--b\nContent-Type: text/x-sh", `ends without the line "--b--"`},
		"in another part":         {head + part + other, `ends without the line "--b--"`},
		"another boundary":        {strings.Replace(head, `"b"`, `"a"`, 1) + part + "--b--\n", `no line is the boundary "--a"`},
		"an unreadable parameter": {head + strings.Replace(part, "+yaml", "+yaml; charset=\"", 1) + "--b--\n", "apiVersion: missing"},
		"a cloud-config":          {"\n#cloud-config\npackages: []\n", "a cloud-config and has no NodeConfig"},
		"words":                   {strings.Repeat("plain words of some length ", 4), "expected fields"},
	} {
		if _, err := FromUserData([]byte(c.data)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}
