package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// progress shows steps as they go. On a terminal each running step is one line
// with a bar that is redrawn; elsewhere (a pipe, a CI log) each step is a line at
// its start and its end, with one in between every few seconds.
type progress struct {
	w    io.Writer
	tty  bool
	size func() int // columns of the terminal
	mu   sync.Mutex // guards the rest and the writer
	step []*step    // running, oldest first
	rows int        // that draw has written and clear removes
	ends chan struct{}
	done sync.WaitGroup
}

type step struct {
	name     string
	began    time.Time
	fraction float64
	note     string
	said     time.Time // when it was last written where there is no terminal
}

const (
	redraw   = 200 * time.Millisecond
	sayEvery = 15 * time.Second
	barWidth = 24
)

func newProgress(f *os.File) *progress {
	st, err := f.Stat()
	p := &progress{
		w:    f,
		tty:  err == nil && st.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb",
		size: func() int { return columns(f) },
		ends: make(chan struct{}),
	}
	p.done.Go(p.loop)
	return p
}

// Close ends the redrawing and clears the line of what still runs.
func (p *progress) Close() {
	close(p.ends)
	p.done.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clear()
}

// Begin shows that a step has begun.
func (p *progress) Begin(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.step = append(p.step, &step{name: name, began: now, fraction: -1, said: now})
	if !p.tty {
		fmt.Fprintf(p.w, "  %s …\n", name)
	}
	p.draw()
}

// Update shows how far a step is; a negative fraction means that nobody knows.
func (p *progress) Update(name string, fraction float64, note string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s := p.find(name); s != nil {
		s.fraction, s.note = fraction, note
	}
}

// End shows that a step has ended, and how long it took.
func (p *progress) End(name string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.find(name)
	if s == nil {
		return
	}
	for i := range p.step {
		if p.step[i] == s {
			p.step = append(p.step[:i], p.step[i+1:]...)
			break
		}
	}
	mark := p.paint("32", "✓")
	if err != nil {
		mark = p.paint("31", "✗")
	}
	p.line("%s %-44s %8s", mark, name, seconds(time.Since(s.began)))
	if err != nil {
		p.line("  %s", strings.ReplaceAll(err.Error(), "\n", "\n  "))
	}
	p.draw()
}

// Say prints a line above what is running.
func (p *progress) Say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.line(format, args...)
	p.draw()
}

func (p *progress) loop() {
	t := time.NewTicker(redraw)
	defer t.Stop()
	for {
		select {
		case <-p.ends:
			return
		case <-t.C:
			p.mu.Lock()
			p.draw()
			p.mu.Unlock()
		}
	}
}

func (p *progress) find(name string) *step {
	for _, s := range p.step {
		if s.name == name {
			return s
		}
	}
	return nil
}

func (p *progress) line(format string, args ...any) {
	p.clear()
	fmt.Fprintf(p.w, format+"\n", args...)
}

func (p *progress) clear() {
	if p.rows > 0 {
		fmt.Fprint(p.w, "\r\x1b[K"+strings.Repeat("\x1b[A\x1b[K", p.rows-1))
		p.rows = 0
	}
}

// columns is the width of a terminal; 80 where it does not tell.
func columns(f *os.File) int {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 {
		return 80
	}
	return int(size.Col)
}

// draw shows the running steps; the caller holds mu.
func (p *progress) draw() {
	now := time.Now()
	if p.tty {
		p.clear()
		width := p.size() - 1 // a line that fills the last column wraps
		for i, s := range p.step {
			if i > 0 {
				fmt.Fprint(p.w, "\n")
			}
			fmt.Fprint(p.w, text(s, now, width))
		}
		p.rows = len(p.step)
		return
	}
	for _, s := range p.step {
		if now.Sub(s.said) >= sayEvery {
			s.said = now
			fmt.Fprintln(p.w, text(s, now, 160))
		}
	}
}

// text is one line about a running step, at most width characters of it.
func text(s *step, now time.Time, width int) string {
	length := barWidth
	if width < 100 {
		length /= 2 // the note says more
	}
	bar := strings.Repeat("·", length)
	percent := "    "
	if s.fraction >= 0 {
		n := min(int(s.fraction*float64(length)), length)
		bar = strings.Repeat("█", n) + strings.Repeat("░", length-n)
		percent = fmt.Sprintf("%3d%%", int(min(s.fraction, 1)*100))
	}
	out := fmt.Sprintf("  %-30s %s %s %6s  %s", s.name, bar, percent, seconds(now.Sub(s.began)), s.note)
	if r := []rune(out); len(r) > width && width > 0 {
		out = string(r[:width-1]) + "…"
	}
	return out
}

func (p *progress) paint(colour, s string) string {
	if !p.tty || os.Getenv("NO_COLOR") != "" {
		return s
	}
	return "\x1b[" + colour + "m" + s + "\x1b[0m"
}

func seconds(d time.Duration) string {
	if d >= time.Minute {
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%.1fs", d.Seconds())
}
