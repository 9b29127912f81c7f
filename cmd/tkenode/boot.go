package main

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tkenode/tkenode/agent/api"
)

var bootCommand = command{
	name: "boot",
	help: "what took how long in this boot",
	long: `A ledger of this boot: when each step began, how long it took, and a picture of both.`,
	flags: func(fs *flag.FlagSet) action {
		format := output(fs)
		return func(ctx context.Context, out *terminal, _ []string) error {
			asJSON, err := isJSON(*format)
			if err != nil {
				return err
			}
			c := api.NewClient(api.Socket)
			defer c.Close()
			b, err := c.Boot(ctx)
			if err != nil {
				return err
			}
			if asJSON {
				return out.json(b)
			}
			renderBoot(out, b, time.Now())
			return nil
		}
	},
}

// renderBoot draws one line a step. What has not ended reaches to the right edge.
func renderBoot(t *terminal, b api.Boot, now time.Time) {
	end, running := b.Began, false
	name := 0
	for _, s := range b.Steps {
		name = max(name, utf8.RuneCountInString(s.Name))
		if s.Ended.IsZero() {
			running = true
		} else if s.Ended.After(end) {
			end = s.Ended
		}
	}
	if running {
		end = now
	}
	total := end.Sub(b.Began)
	how := "it took " + tenths(total)
	if running {
		how = tenths(total) + " so far"
	}
	t.printf("%s\n\n", t.paint(bold, fmt.Sprintf("boot of %s, %s", b.Began.UTC().Format("2006-01-02 15:04:05 UTC"), how)))
	bars := max(10, t.width-name-22)
	for _, s := range b.Steps {
		ended, color, took := s.Ended, green, ""
		if ended.IsZero() {
			ended, color, took = end, yellow, "…"
		}
		took = tenths(ended.Sub(s.Began)) + took
		from, to := place(s.Began, b.Began, total, bars), place(ended, b.Began, total, bars)
		row(t, fmt.Sprintf("%7s  %s  %-8s  %s%s", tenths(s.Began.Sub(b.Began)), pad(clean(s.Name), name), took,
			strings.Repeat(" ", min(from, bars-1)), t.paint(color, strings.Repeat("█", max(1, to-from)))))
	}
}

// place maps a time to a column.
func place(at, began time.Time, total time.Duration, columns int) int {
	if total <= 0 {
		return 0
	}
	return min(columns, max(0, int(int64(at.Sub(began))*int64(columns)/int64(total))))
}

func tenths(d time.Duration) string { return fmt.Sprintf("%.1fs", max(0, d.Seconds())) }
