package nodeconfig

import (
	"strings"
	"testing"
)

// TestAuthority: what a reader of PEM passes over is named.
func TestAuthority(t *testing.T) {
	ca := strings.TrimSpace(readFile(t, "ca.pem"))
	lines := strings.Split(ca, "\n")
	lines[2] = "!" + lines[2]
	damaged := strings.Join(lines, "\n")
	headers := strings.Replace(ca, "\n", "\nProc-Type: 4\n\n", 1)
	for name, c := range map[string]struct{ text, want string }{
		"good":            {ca + "\n# another\n" + ca, ""},
		"damaged, first":  {damaged + "\n" + ca, "certificate 1 is damaged"},
		"damaged, second": {ca + "\n" + damaged + "\n" + ca, "certificate 2 is damaged"},
		"damaged, last":   {ca + "\n" + damaged, "certificate 2 is not PEM"},
		"headers":         {ca + "\n" + headers, "certificate 2 has header lines before its base64 (Proc-Type: …); remove them"},
	} {
		v := validator{skip: func(string) bool { return false }}
		v.authority("x", c.text+"\n")
		if got := v.problems.Error(); got == "" != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

func TestHosts(t *testing.T) {
	for text, good := range map[string]bool{
		"https://10.0.0.10:6443": true, "https://api.example.com": true, "https://[fd00::1]:6443": true, "https://3com.example": true,
		"https://10.0.0.256:6443": false, "https://10.0.0:6443": false, "https://[fe80::1%25eth0]:6443": false, "https://1234": false,
	} {
		v := validator{skip: func(string) bool { return false }}
		v.httpURL("x", text, "y")
		if (len(v.problems) == 0) != good {
			t.Errorf("%s: %v, want good %v", text, v.problems, good)
		}
	}
	if got := redactURL("HTTPS://user:pw@host/"); got != "HTTPS://…@host/" {
		t.Error(got)
	}
}
