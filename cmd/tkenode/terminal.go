package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// terminal is where a command prints to: with colours and the window's width if
// it is one, plain and of a fixed width if it is a pipe or a file.
type terminal struct {
	w     io.Writer
	tty   bool
	color bool
	width int
}

const defaultWidth = 100

func newTerminal(f *os.File) *terminal {
	t := &terminal{w: f, width: defaultWidth}
	if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
		t.tty = true
		t.color = os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
		if ws.Col > 0 { // a serial console does not know its width
			t.width = max(40, int(ws.Col))
		}
	}
	return t
}

func (t *terminal) printf(format string, args ...any) { fmt.Fprintf(t.w, format, args...) }

// json prints v as the socket does.
func (t *terminal) json(v any) error {
	e := json.NewEncoder(t.w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// The colours, each with one meaning.
const (
	bold   = "1"
	faint  = "2"
	red    = "31" // wrong, and somebody must act
	green  = "32" // as it should be
	yellow = "33" // under way
)

func (t *terminal) paint(color, s string) string {
	if !t.color || s == "" || color == "" {
		return s
	}
	return "\x1b[" + color + "m" + s + "\x1b[0m"
}

// block prints text, every line after indent, and wrapped to the width of a
// terminal; elsewhere a message stays one line, for whoever searches for it.
// Messages may carry what a cloud, a disk or a user wrote, so what could drive a
// terminal is replaced.
func (t *terminal) block(indent, text string) {
	for line := range strings.Lines(text) {
		for _, l := range t.lines(strings.TrimRight(line, "\n"), utf8.RuneCountInString(indent)) {
			t.printf("%s%s\n", indent, l)
		}
	}
}

// lines returns a line as block prints it.
func (t *terminal) lines(line string, indent int) []string {
	if line = clean(line); t.tty {
		return wrap(line, t.width-indent)
	}
	return []string{line}
}

// clean replaces what is not printable.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return '�'
		}
		return r
	}, s)
}

// wrap breaks s at spaces into lines of at most width, where words allow it.
func wrap(s string, width int) []string {
	var out []string
	line := ""
	for word := range strings.FieldsSeq(s) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			out = append(out, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(out, line)
}

// cut shortens s to width.
func cut(s string, width int) string {
	s = clean(s)
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	r := []rune(s)
	return strings.TrimRight(string(r[:max(0, width-1)]), " ") + "…"
}

// pad fills s up to width.
func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}

// span writes a duration with the two units that matter.
func span(d time.Duration) string {
	d = max(0, d.Round(time.Second))
	h, m, s := int(d.Hours()), int(d.Minutes())%60, int(d.Seconds())%60
	switch {
	case h >= 48:
		return fmt.Sprintf("%dd%02dh", h/24, h%24)
	case h > 0:
		return fmt.Sprintf("%dh%02dm", h, m)
	case m > 0:
		return fmt.Sprintf("%dm%02ds", m, s)
	}
	return fmt.Sprintf("%ds", s)
}

// clock writes when something was as logs write it, without the date of today.
func clock(at, now time.Time) string {
	if at.UTC().Format(time.DateOnly) == now.UTC().Format(time.DateOnly) {
		return at.UTC().Format("15:04:05 UTC")
	}
	return at.UTC().Format("2006-01-02 15:04:05 UTC")
}
