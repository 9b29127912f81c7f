package images

import (
	"slices"
	"testing"
)

func TestAptSources(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string // empty: an error
	}{
		{
			"deb822, as Debian 12 has it, beside a third party's",
			map[string]string{
				"sources.list.d/debian.sources": "Types: deb deb-src\n# comment\nURIs: http://d.example/debian\nSuites: bookworm bookworm-updates bookworm-backports\n" +
					"Components: main contrib\nSigned-By: /k.gpg\n\nTypes: deb\nURIs: http://d.example/security\nSuites: bookworm-security\nComponents: main\n",
				"sources.list.d/node.sources": "Types: deb\nURIs: http://n.example\nSuites: nodistro\nComponents: main\n",
				"sources.list.d/cloud.list":   "deb http://c.example cloud-sdk main\n",
			},
			"Types: deb\nURIs: http://d.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n\n" +
				"Types: deb\nURIs: http://d.example/security\nSuites: bookworm-security\nComponents: main\n",
		},
		{
			"one line each",
			map[string]string{"sources.list": "# mine\ndeb [arch=amd64 signed-by=/k.gpg] http://d.example/debian bookworm main non-free # x\n" +
				"deb-src http://d.example/debian bookworm main\ndeb http://d.example/debian trixie main\ndeb broken\n"},
			"Types: deb\nSigned-By: /k.gpg\nURIs: http://d.example/debian\nSuites: bookworm\nComponents: main\n",
		},
		{
			"a mirror inside",
			map[string]string{"sources.list": "deb [trusted=yes check-valid-until=no] http://d.example/debian bookworm main\n"},
			"Types: deb\nTrusted: yes\nCheck-Valid-Until: no\nURIs: http://d.example/debian\nSuites: bookworm\nComponents: main\n",
		},
		{
			"turned off",
			map[string]string{"sources.list.d/d.sources": "Enabled: no\nTypes: deb\nURIs: http://d.example\nSuites: bookworm\nComponents: main\n"},
			"",
		},
		{"another release", map[string]string{"sources.list": "deb http://d.example/debian trixie main\n"}, ""},
		{"nothing", nil, ""},
	} {
		dir := t.TempDir()
		write(t, dir, c.files)
		got, err := aptSources(dir, "bookworm")
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%s:\n%s%v\nwant\n%s", c.name, got, err, c.want)
		}
	}
}

func TestAptProxies(t *testing.T) {
	got := aptProxies("Acquire \nAcquire::http::Proxy http://p.example:3128\nAcquire::http::Proxy::d.example DIRECT\n" +
		"Acquire::https::Proxy DIRECT\nAcquire::ftp::Proxy ftp://p.example\n")
	if want := []string{"http_proxy=http://p.example:3128"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
