package lab

import (
	"bytes"
	"context"
	"io"
	"os"
	"time"

	"github.com/tkenode/tkenode/lab/proc"
)

// follow calls line with every line that is and will be in the file, until ctx
// ends. A serial console has no notification, so the file is looked at.
func follow(ctx context.Context, path string, line func(string)) {
	const every = 50 * time.Millisecond
	t := time.NewTicker(every)
	defer t.Stop()
	var offset int64
	var rest []byte
	buf := make([]byte, 64<<10)
	for {
		n := readAt(path, offset, buf)
		if n > 0 {
			offset += int64(n)
			rest = append(rest, buf[:n]...)
			for {
				i := bytes.IndexByte(rest, '\n')
				if i < 0 {
					break
				}
				line(string(bytes.TrimRight(rest[:i], "\r")))
				rest = rest[i+1:]
			}
			if len(rest) > len(buf) { // a line without an end
				rest = nil
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// Tail returns the last n lines of a file, or why it cannot be read.
func Tail(path string, n int) string {
	text, err := proc.Tail(path, n)
	if err != nil {
		return err.Error()
	}
	return text
}

func readAt(path string, offset int64, buf []byte) int {
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	n, err := f.ReadAt(buf, offset)
	if err != nil && err != io.EOF {
		return 0
	}
	return n
}
