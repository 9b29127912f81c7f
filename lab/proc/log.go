package proc

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
)

const (
	// logLimit bounds a log file; its predecessor is kept beside it, so a process
	// occupies at most twice as much.
	logLimit = 8 << 20
	// tailLimit bounds what Tail reads.
	tailLimit = 64 << 10
)

// logFile is a file that starts anew when it is full.
type logFile struct {
	path  string
	limit int64

	mu   sync.Mutex
	file *os.File
	size int64
}

// openLog appends to what an earlier run of the process has left.
func openLog(path string) (*logFile, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &logFile{path: path, limit: logLimit, file: f, size: size}, nil
}

// Write never fails: a child must not block or die because its log cannot be
// kept.
func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.size+int64(len(b)) > l.limit {
		l.turn()
	}
	n, _ := l.file.Write(b)
	l.size += int64(n)
	return len(b), nil
}

// turn sets the full file aside. Where that cannot be done it is emptied: being
// bounded comes first.
func (l *logFile) turn() {
	l.size = 0
	if os.Rename(l.path, l.path+".1") == nil {
		if f, err := os.OpenFile(l.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY|os.O_TRUNC, 0o600); err == nil {
			l.file.Close()
			l.file = f
			return
		}
	}
	_ = l.file.Truncate(0)
}

func (l *logFile) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.file.Close()
}

// Tail returns the last n lines of the log at path, without the final newline.
func Tail(path string, n int) (string, error) {
	var text string
	// The older half first: the current one may just have been begun.
	for _, p := range []string{path + ".1", path} {
		b, err := lastBytes(p)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("read log: %w", err)
		}
		text += string(b)
	}
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n"), nil
}

func lastBytes(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, size-tailLimit), tailLimit))
}
