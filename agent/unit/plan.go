package unit

import (
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// want is what a unit has to be.
type want struct {
	unit   string // containerd.service
	files  []node.File
	digest string       // of the files that it reads at its start
	after  string       // unit that has to be up before this one is started; may be empty
	addrs  []netip.Addr // the node's own, on which the unit listens
}

// observed is how files and unit are.
type observed struct {
	Files map[string]file `json:"files"`
	Unit  State           `json:"unit"`
	After string          `json:"after,omitempty"` // ActiveState of the unit that has to be up first
	Probe string          `json:"probe,omitempty"` // what the daemon's probe said; empty: it answers
	Lost  bool            `json:"lost,omitempty"`  // somebody has removed what the daemon had made in the kernel
	Root  root            `json:"root,omitzero"`   // only of containerd
	Addrs []netip.Addr    `json:"addrs,omitempty"` // of the loopback device; only where the unit wants some
}

type file struct {
	Exists bool        `json:"exists"`
	Mode   fs.FileMode `json:"mode,omitempty"`
	Data   string      `json:"data,omitempty"` // only of a regular file of the wanted size
	// Changed is when it last was, by the file system.
	Changed time.Time `json:"changed,omitzero"`
}

// State is what systemd says of a unit, in systemd's words.
type State struct {
	Load       string        `json:"load"`   // loaded, not-found, masked, …
	Active     string        `json:"active"` // active, activating, inactive, failed, …
	Sub        string        `json:"sub"`
	NeedReload bool          `json:"needReload,omitempty"` // its files are newer than what systemd has read
	Result     string        `json:"result,omitempty"`     // success, exit-code, signal, oom-kill, …
	ExitStatus int           `json:"exitStatus,omitempty"` // of the main process's last run
	Up         time.Duration `json:"up,omitempty"`         // since it became active
	Started    time.Time     `json:"started,omitzero"`     // the main process
	Files      string        `json:"files,omitempty"`      // digest in the environment of the main process
	LastLog    string        `json:"lastLog,omitempty"`
}

func (s State) running() bool { return s.Active == "active" || s.Active == "reloading" }

// failure says how the unit ended the last time.
func (s State) failure() string {
	text := fmt.Sprintf("%s, status %d", s.Result, s.ExitStatus)
	if s.LastLog != "" {
		text += ", last said: " + s.LastLog
	}
	return text
}

type verb int

const (
	write verb = iota
	reload
	sow
	tidy
	address
	start
	restart
)

type step struct {
	verb verb
	text string
	file node.File
	addr netip.Addr
}

// verdict is what decide finds.
type verdict struct {
	steps []step
	again time.Duration
	err   error
}

// decide returns what has to be done, and if there is nothing, how the daemon is.
func decide(w want, have observed) verdict {
	var v verdict
	s := have.Unit
	unitFiles := false
	var read string // a file that the process has read as it must not be
	for _, f := range w.files {
		got := have.Files[f.Path]
		if got.Exists && got.Data == string(f.Data) && got.Mode == f.Mode.Perm() {
			continue
		}
		unitFiles = unitFiles || strings.HasPrefix(f.Path, systemDir+"/")
		if len(f.Units) > 0 && got.Exists && got.Changed.Before(s.Started) {
			read = f.Path
		}
		v.add(write, f, "write %s (%s)", f.Path, size(len(f.Data)))
	}
	// systemd finds a unit that it has not loaded yet by itself.
	if s.NeedReload || unitFiles && s.Load != "not-found" {
		v.add(reload, node.File{}, "reload systemd's units")
	}
	for _, a := range w.addrs {
		if !slices.Contains(have.Addrs, a) {
			v.steps = append(v.steps, step{verb: address, text: fmt.Sprintf("add address %s to %s", a, loopback), addr: a})
		}
	}
	if have.Root.Left {
		v.add(tidy, node.File{}, "remove what is left of a seed in %s", have.Root.Path)
	}
	switch {
	case s.running() && s.Files == "" && s.Up < time.Second:
		// Between fork and exec a process has systemd's own environment.
		v.again = probeSoon
		v.wait("Starting", "%s has just been started", w.unit)
	case s.running() && s.Files != w.digest:
		v.add(restart, node.File{}, "restart %s: it runs with other files", w.unit)
	case s.running() && read != "":
		v.add(restart, node.File{}, "restart %s: it was started after %s had been changed", w.unit, read)
	case s.running() && have.Lost:
		v.add(restart, node.File{}, "restart %s: what it had made in the kernel was removed, and it does not notice", w.unit)
	case s.running():
		if len(v.steps) == 0 {
			v.health(w.unit, have)
		}
	case s.Active == "deactivating":
		v.wait("Stopping", "%s is stopping", w.unit)
	case s.Active == "activating" && s.Sub != "auto-restart":
		v.wait("Starting", "%s is starting (%s)", w.unit, s.Sub)
	case w.after != "" && have.After != "active":
		v.wait("Starting", "%s waits for %s, which is %s", w.unit, w.after, have.After)
	case s.Active == "activating": // systemd waits RestartSec and tries again
		v.wait("Restarting", "%s ended and systemd restarts it: %s", w.unit, s.failure())
	case s.Active == "failed":
		v.sow(have.Root)
		v.add(start, node.File{}, "start %s, which has failed (%s)", w.unit, s.failure())
	default:
		v.sow(have.Root)
		v.add(start, node.File{}, "start %s", w.unit)
	}
	return v
}

// starts reports whether the unit is to be started.
func (v *verdict) starts() bool {
	return slices.ContainsFunc(v.steps, func(s step) bool { return s.verb == start })
}

// sow fills containerd's root before containerd has anything in it.
func (v *verdict) sow(r root) {
	if r.Fresh && len(r.Seed.Images) > 0 {
		v.add(sow, node.File{}, "seed %s with %d baked images (%s)", r.Path, len(r.Seed.Images), size(int(r.Seed.Bytes)))
	}
}

func (v *verdict) add(do verb, f node.File, format string, args ...any) {
	v.steps = append(v.steps, step{verb: do, text: fmt.Sprintf(format, args...), file: f})
}

// wait is for what systemd does by itself; what there is to write comes first.
func (v *verdict) wait(reason, format string, args ...any) {
	if len(v.steps) == 0 {
		v.err = node.Waiting(reason, format, args...)
	}
}

// health judges a daemon that runs. A change of its unit wakes us; that it stops
// answering has to be asked for.
func (v *verdict) health(unit string, have observed) {
	v.again = probeEvery
	switch {
	case have.Probe == "":
	case have.Unit.Up < startGrace:
		v.again = probeSoon
		v.err = node.Waiting("Starting", "%s runs and does not answer yet: %s", unit, have.Probe)
	default:
		v.err = &node.Error{Reason: "NotAnswering", Fix: fmt.Sprintf("see `journalctl --unit %s`", unit),
			Err: fmt.Errorf("%s has run for %s and does not answer: %s", unit, have.Unit.Up.Round(time.Second), have.Probe)}
	}
}

func size(n int) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d bytes", n)
	}
	if n < 1<<20 {
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

// archive is one image in an OCI archive.
type archive struct {
	Path   string `json:"path"`
	Size   int64  `json:"size"`
	Name   string `json:"name"`
	Digest string `json:"digest"`
}

// image is an image as containerd has it.
type image struct {
	Digest   string `json:"digest"`
	Pinned   bool   `json:"pinned"` // kubelet's garbage collection leaves it alone
	Unpacked bool   `json:"unpacked"`
}

// missing returns the archives to be imported, each once although it may hold
// several images, with the names of those that are wanted of it.
func missing(baked []archive, have map[string]image) []string {
	var paths []string
	seen := map[string]bool{}
	for _, a := range baked {
		got, ok := have[a.Name]
		if (!ok || got.Digest != a.Digest || !got.Pinned || !got.Unpacked) && !seen[a.Path] {
			seen[a.Path] = true
			paths = append(paths, a.Path)
		}
	}
	return paths
}

// importText describes the import of one archive.
func importText(path string, baked []archive) string {
	var names []string
	var bytes int64
	for _, a := range baked {
		if a.Path == path {
			names, bytes = append(names, a.Name), a.Size
		}
	}
	return fmt.Sprintf("import %s from %s (%s)", strings.Join(names, ", "), filepath.Base(path), size(int(bytes)))
}
