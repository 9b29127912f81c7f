//go:build kernel

package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// patient is a disk that can be broken, and the module that keeps it.
type patient struct {
	*episode
	*sick
	life
	size int64
	d    *Disk
}

// patientSizes are as small as each file system goes.
var patientSizes = map[node.FileSystem]int64{node.Ext4: 64 * mib, node.XFS: 320 * mib}

func newPatient(e *episode, fsType node.FileSystem) *patient {
	s := newStorage(e.T)
	file := filepath.Join(s.dir, "file")
	p := &patient{episode: e, size: patientSizes[fsType]}
	clearFile(e.T, file, p.size)
	p.sick = s.disk("patient", file, nil)
	p.life = life{
		Want: node.DiskConfig{DiskID: serial, FileSystem: fsType, MountPoint: filepath.Join(s.dir, "mnt")},
		Sys:  filepath.Join(s.dir, "sys"), Ledger: filepath.Join(s.dir, "ledger"), Run: filepath.Join(s.dir, "run"),
	}
	sysfsEntry(e.T, p.Sys, p.sick.loop, serial)
	p.d = p.life.disk()
	return p
}

// end lets the test end.
func (p *patient) end() {
	p.heal()
	p.d.Close()
	p.unmount()
	clearImmutable(p.Want.MountPoint)
	p.s.close()
}

func (p *patient) unmount() {
	for unix.Unmount(p.Want.MountPoint, 0) == nil {
	}
}

// turns has the module work until nothing is left to be done, or for so many times.
func (p *patient) turns(most int) (err error) {
	p.Helper()
	ctx, cancel := context.WithTimeout(p.Context(), time.Minute)
	defer cancel()
	for range most {
		var planned string
		if planned, err = turn(ctx, p.T, p.d); err == nil && planned == "" {
			return nil
		}
	}
	return err
}

// well is what has to be so once the disk is sound: it is mounted, or somebody is told
// to decide about a file system that was cut off.
func (p *patient) well(what string) {
	p.Helper()
	err := p.turns(4)
	switch st := p.d.State(); {
	case st.State == Mounted:
		p.unmount()
		sound(p.T, "/dev/"+p.sick.loop, p.Want.FileSystem, what)
	case st.State != "FormatInterrupted":
		p.Errorf("%s, then sound: %s: %v", what, st.State, err)
	}
	p.figures["then "+p.d.State().State]++
}

// TestKernelCampaignSectors breaks one sector of a disk, for reads or for writes. A
// blank disk is not formatted while a read of it fails, and a file system of ours
// keeps what it holds.
func TestKernelCampaignSectors(t *testing.T) {
	for _, fsType := range wholeOnly(node.Ext4, node.XFS) {
		episodes(t, "broken sectors, "+string(fsType), 1, func(e *episode) {
			last := patientSizes[fsType]/512 - 1
			// A superblock, what is around it, the middle, the end.
			sectors := []int64{2, last / 2, last}
			if e.whole {
				sectors = append(sectors, 0, 1, 8, 16)
				for range 40 {
					sectors = append(sectors, e.Int64N(last))
				}
			}
			for _, what := range []string{"read", "write"} {
				for i, sector := range sectors {
					e.brokenBlank(fsType, what, sector)
					if e.whole || i == 0 {
						e.brokenOurs(fsType, what, sector)
					}
				}
			}
		})
	}
}

// TestKernelFormatFails: a file system of whose making a write has failed is left to a
// human, although its superblock is sound.
func TestKernelFormatFails(t *testing.T) {
	episodes(t, "format fails", 1, func(e *episode) {
		p := newPatient(e, node.XFS)
		defer p.end()
		p.fail("write", patientSizes[node.XFS]/512-1)
		if err := p.turns(2); node.ReasonOf(err, "") != "FormatInterrupted" {
			e.Errorf("%s: %v", p.d.State().State, err)
		}
		p.well("the last sector cannot be written")
	})
}

func (e *episode) brokenBlank(fsType node.FileSystem, what string, sector int64) {
	p := newPatient(e, fsType)
	defer p.end()
	p.fail(what, sector)
	err := p.turns(2)
	said := fmt.Sprintf("blank, %s of sector %d fails", what, sector)
	if _, blank := hashFile(e.T, p.file, 0); what == "read" && !blank {
		e.Errorf("%s: it has been written to: %v", said, err)
	}
	if what == "read" && (node.ReasonOf(err, "") != "Unreadable" || node.ClassOf(err) != node.ClassTransient) {
		e.Errorf("%s: %v", said, err)
	}
	if err == nil && p.d.State().State != Mounted {
		e.Errorf("%s: %+v", said, p.d.State())
	}
	p.unmount()
	p.heal()
	p.well(said)
	e.figures["disks"]++
}

func (e *episode) brokenOurs(fsType node.FileSystem, what string, sector int64) {
	p := newPatient(e, fsType)
	defer p.end()
	must(e.T, p.turns(2))
	kept := filepath.Join(p.Want.MountPoint, "kept")
	must(e.T, os.WriteFile(kept, []byte(keptText), 0o600))
	p.unmount()
	p.d.Close()
	p.d = p.life.disk()
	p.fail(what, sector)
	_ = p.turns(2) // it may be mounted, or not
	p.unmount()
	p.heal()
	said := fmt.Sprintf("ours, %s of sector %d failed", what, sector)
	if err := p.turns(4); err != nil || p.d.State().State != Mounted {
		e.Errorf("%s: %s: %v", said, p.d.State().State, err)
	} else if b, err := os.ReadFile(kept); err != nil || string(b) != keptText {
		e.Errorf("%s: the file holds %q: %v", said, b, err)
	}
	e.figures["disks"]++
}

// TestKernelCampaignUnplug takes the disk away in every state: all of its reads and
// writes fail, and then the device is gone. Nothing hangs, nothing is mounted in its
// place, and when it is back all is well.
func TestKernelCampaignUnplug(t *testing.T) {
	for _, fsType := range wholeOnly(node.Ext4, node.XFS) {
		episodes(t, "unplugged, "+string(fsType), 3, func(e *episode) {
			for _, state := range []string{"planned", "sample", "read", "format", "mount", "mounted", "dirty"} {
				e.unplugged(fsType, state)
			}
		})
	}
}

func (e *episode) unplugged(fsType node.FileSystem, state string) {
	p := newPatient(e, fsType)
	defer p.end()
	ctx, cancel := context.WithTimeout(e.Context(), time.Minute)
	defer cancel()
	gone := func() {
		p.fail("all", -1)
		sysfsGone(e.T, p.Sys, p.sick.loop)
	}
	var err error
	switch state {
	case "planned":
		plan, perr := p.d.Plan(ctx)
		must(e.T, perr)
		gone()
		err = p.d.Apply(ctx, plan)
	case "mounted", "dirty":
		must(e.T, p.turns(2))
		if state == "dirty" {
			must(e.T, os.WriteFile(filepath.Join(p.Want.MountPoint, "dirty"), make([]byte, 4<<20), 0o600))
		}
		gone()
		_, err = turn(ctx, e.T, p.d)
	default: // while it works
		worked := begin(ctx, p.d)
		began := func() bool {
			return slices.ContainsFunc(p.d.State().Steps, func(s Step) bool { return s.Name == state })
		}
		for !began() && len(worked) == 0 {
			time.Sleep(100 * time.Microsecond)
		}
		gone()
		_, err = await(e.T, worked)
	}
	said := fmt.Sprintf("unplugged when %s", state)
	if err == nil && !slices.Contains([]string{"mount", "mounted", "dirty"}, state) { // which is fenced in later turns
		e.Errorf("%s: nobody noticed", said)
	}
	for ; node.ReasonOf(err, "") != absent && node.ReasonOf(err, "") != Gone; _, err = turn(ctx, e.T, p.d) {
		if ctx.Err() != nil {
			e.Fatalf("%s: then %v", said, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err := unix.Unmount(p.Want.MountPoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, fs.ErrNotExist) {
		e.Errorf("%s: unmount: %v", said, err)
	}
	p.d.Close()
	detachLoop(e.T, p.sick.loop)
	p.heal()
	p.sick.loop = attachLoop(e.T, p.path)
	sysfsEntry(e.T, p.Sys, p.sick.loop, serial)
	p.well(said)
	e.figures["disks"]++
}
