package nodeconfig

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/tkenode/tkenode/agent/node"
)

var update = flag.Bool("update", false, "write the goldens")

// TestGolden feeds each file's user-data in and compares the configuration or
// the whole message that comes out. $CA and $LEAF stand for certificates in
// base64; the comment's line "pack: gzip base64" packs what is fed in.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no goldens: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			ar, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if len(ar.Files) != 2 || ar.Files[0].Name != "user-data" || ar.Files[1].Name != "want" {
				t.Fatal("want the files user-data and want")
			}
			cfg, err := FromUserData(pack(t, string(ar.Comment), expand(t, ar.Files[0].Data)))
			got := result(t, cfg, err)
			if *update {
				ar.Files[1].Data = []byte(got)
				if err := os.WriteFile(file, txtar.Format(ar), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want := string(ar.Files[1].Data); got != want {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

func result(t *testing.T, cfg node.Config, err error) string {
	t.Helper()
	if err != nil {
		if node.ClassOf(err) != node.ClassTerminal || !reflect.DeepEqual(cfg, node.Config{}) {
			t.Errorf("an error must be terminal and come alone: %v %+v", err, cfg)
		}
		return node.ReasonOf(err, "?") + "\n" + err.Error() + "\n"
	}
	b, err := json.MarshalIndent(cfg, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(b), jsonString(t, readFile(t, "ca.pem")), `"$CA"`) + "\n"
}

func jsonString(t *testing.T, s string) string {
	t.Helper()
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func readFile(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func expand(t testing.TB, b []byte) []byte {
	t.Helper()
	b64 := func(name string) string { return base64.StdEncoding.EncodeToString([]byte(readFile(t, name))) }
	return []byte(strings.NewReplacer("$CA", b64("ca.pem"), "$LEAF", b64("leaf.pem")).Replace(string(b)))
}

func pack(t *testing.T, comment string, b []byte) []byte {
	t.Helper()
	for line := range strings.Lines(comment) {
		how, ok := strings.CutPrefix(line, "pack: ")
		if !ok {
			continue
		}
		for word := range strings.FieldsSeq(how) {
			switch word {
			case "gzip":
				b = gzipped(t, b)
			case "base64":
				b = []byte(base64.StdEncoding.EncodeToString(b))
			case "cut":
				b = b[:len(b)/2|1] // an odd length is no base64
			case "crlf":
				b = bytes.ReplaceAll(b, []byte("\n"), []byte("\r\n"))
			default:
				t.Fatalf("unknown packing %q", word)
			}
		}
	}
	return b
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestBounds(t *testing.T) {
	bomb := gzipped(t, make([]byte, 64<<20))
	deep := strings.Repeat("[", 2000) + strings.Repeat("]", 2000)
	laughs := "apiVersion: tkenode.io/v1alpha1\nkind: NodeConfig\nkubelet:\n  config:\n    a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
	for i := 1; i < 9; i++ {
		p, q := string(rune('0'+i-1)), string(rune('0'+i))
		laughs += "    a" + q + ": &a" + q + " [" + strings.Repeat("*a"+p+", ", 9) + "*a" + p + "]\n"
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"gzip bomb":   {bomb, "more than the 1048576"},
		"long":        {make([]byte, 2<<20), "more than the 1048576"},
		"gzip of …":   {gzipped(t, gzipped(t, gzipped(t, gzipped(t, []byte("x"))))), "packed more than 3 times"},
		"deep":        {[]byte("apiVersion: tkenode.io/v1alpha1\nkind: NodeConfig\nkubelet: {config: {x: " + deep + "}}"), "nested deeper than 32 levels"},
		"laughs":      {[]byte(laughs), "more than 10000 values"},
		"itself":      {[]byte("apiVersion: tkenode.io/v1alpha1\nkind: NodeConfig\nkubelet: {config: &a {x: *a}}"), "nested deeper than 32 levels"},
		"not a text":  {[]byte("apiVersion: \xff\xfe"), "not UTF-8"},
		"many parts":  {[]byte("Content-Type: multipart/mixed; boundary=b\n\n" + strings.Repeat("--b\n\nx\n", 70) + "--b--\n"), "more than 64 MIME parts"},
		"no boundary": {[]byte("Content-Type: multipart/mixed\n\nx\n"), "without a boundary"},
	} {
		_, err := FromUserData(c.data)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %.300v, want %q", name, err, c.want)
		}
	}
}

// TestSecretsAreNotShown: whatever is wrong with the token's field, or anything
// near it, the message does not repeat the token.
func TestSecretsAreNotShown(t *testing.T) {
	const token = "s3cr3ts3cr3ts3cr3t"
	head := "apiVersion: tkenode.io/v1alpha1\nkind: NodeConfig\ncluster:\n"
	for _, doc := range []string{
		head + "  bootstrapToken: " + token,
		head + "  bootstrapToken: [" + token + "]",
		head + "  bootstrapToken: {" + token + ": 1}",
		head + "  bootstrapToken: \"" + token,
		head + "  bootstrapToken: " + token + "\n  bootstrapToken: " + token,
		head + "  endpoint: https://user:" + token + "@10.0.0.10:6443",
		head + "metrics:\n  endpoint: http://user:" + token + "@10.0.0.11/",
		head + "metrics:\n  endpoint: user:" + token + "@10.0.0.11/",
	} {
		if _, err := Decode([]byte(doc)); err == nil || strings.Contains(err.Error(), token) {
			t.Errorf("%s\ngives %v", doc, err)
		}
	}
}

func TestDidYouMean(t *testing.T) {
	known := []string{"endpoint", "certificateAuthority", "id"}
	for name, want := range map[string]string{
		"endpont": "; did you mean endpoint?",
		"ca":      "; known are certificateAuthority, endpoint, id",
		"Id":      "; did you mean id?",
		"xxxxxxx": "; known are certificateAuthority, endpoint, id",
	} {
		if _, got := didYouMean(name, known); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}

// FuzzFromUserData: no input panics or blows up, every refusal is terminal and
// says something, and what is accepted can be sealed and is read back the same.
func FuzzFromUserData(f *testing.F) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		ar, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		data := expand(f, ar.Files[0].Data)
		f.Add(data)
		f.Add(gzipped(f, data))
		f.Add([]byte(base64.StdEncoding.EncodeToString(data)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := FromUserData(data)
		if err != nil {
			if node.ClassOf(err) != node.ClassTerminal || strings.TrimSpace(err.Error()) == "" {
				t.Fatalf("refused with %q, class %v", err, node.ClassOf(err))
			}
			return
		}
		b, err := json.Marshal(cfg)
		if err != nil {
			t.Fatalf("accepted and cannot be sealed: %v", err)
		}
		var again node.Config
		if err := json.Unmarshal(b, &again); err != nil {
			t.Fatalf("sealed and cannot be read: %v", err)
		}
		if b2, err := json.Marshal(again); err != nil || !bytes.Equal(b, b2) {
			t.Fatalf("read back as %s (%v), sealed as %s", b2, err, b)
		}
	})
}
