package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestReadKey: a key is taken from nothing but a file of ours that is closed to others;
// whatever else is there is refused at once.
func TestReadKey(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, size int, mode fs.FileMode) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte(strings.Repeat("k", size)), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		file("least", keyMin, 0o600):    "",
		file("most", keyMax, 0o400):     "",
		file("short", keyMin-1, 0o600):  "has 31 bytes, of 32 to 512 expected",
		file("long", keyMax+1, 0o600):   "has 513 bytes, of 32 to 512 expected",
		file("open", keyMin, 0o640):     "has mode 0640",
		filepath.Join(dir, "not there"): "no such file",
		dir:                             "is no regular file",
		pipe:                            "is no regular file",
	} {
		key, err := readKey(path)
		switch {
		case want == "" && (err != nil || len(key.Reveal()) < keyMin):
			t.Errorf("%s: %d bytes, %v", path, len(key.Reveal()), err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}
