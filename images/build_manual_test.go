package images

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

type printer struct {
	last  time.Time
	start map[string]time.Time
}

func (p *printer) Begin(s string) { p.start[s] = time.Now(); fmt.Println("begin", s) }
func (p *printer) Update(s string, f float64, n string) {
	if time.Since(p.last) > 5*time.Second {
		p.last = time.Now()
		fmt.Printf("%s %.0f%% %s\n", s, f*100, n)
	}
}
func (p *printer) End(s string, err error) {
	fmt.Println("end", s, time.Since(p.start[s]).Round(time.Millisecond), err)
}

func TestManual(t *testing.T) {
	cache, _ := CacheDir()
	src, _ := filepath.Abs("..")
	o := Options{Source: src, Cache: cache, Progress: &printer{start: map[string]time.Time{}}}
	if d := os.Getenv("DEB"); d != "" {
		o.Debs = []string{d}
	}
	a, err := Build(context.Background(), o)
	fmt.Println(a, err)
	if err != nil {
		t.Fatal(err)
	}
}
