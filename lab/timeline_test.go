package lab

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

func TestTimelineReadsTheConsole(t *testing.T) {
	tl := newTimeline()
	tl.mark(PowerOn)
	tl.readLine("[    0.000000] Linux version 6.1.0-30-cloud-amd64 (debian-kernel@lists.debian.org)")
	tl.readLine("[    9.120000] Linux version is only read once")
	tl.readLine("tkenode: " + string(node.ConfigSealed) + " is True")
	marks, _ := tl.Marks()
	var got []Step
	for _, m := range marks {
		got = append(got, m.Step)
	}
	if len(got) != 3 || got[1] != Kernel || got[2] != ConfigSealed {
		t.Errorf("steps %v", got)
	}
}

// The kernel's first line is a notice, level 5; the console prints what is below
// the level of the last "quiet" (4) or "loglevel=".
// Source: init/main.c of Linux 6.1: start_kernel, quiet_kernel, loglevel.
func TestImageShowsTheKernelsFirstLine(t *testing.T) {
	grub, err := os.ReadFile("../images/rootfs/boot/grub/grub.cfg")
	if err != nil {
		t.Fatal(err)
	}
	level := 7 // CONSOLE_LOGLEVEL_DEFAULT
	for line := range strings.Lines(string(grub)) {
		args, ok := strings.CutPrefix(line, "linux ")
		if !ok {
			continue
		}
		for _, arg := range strings.Fields(args) {
			if arg == "quiet" {
				level = 4
			} else if n, ok := strings.CutPrefix(arg, "loglevel="); ok {
				if level, err = strconv.Atoi(n); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if level <= 5 {
		t.Errorf("the console prints what is below level %d: nobody sees the kernel start", level)
	}
}
