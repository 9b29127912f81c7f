package disk

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// errand is what a helper is sent for. Of what it is to read its descriptor 3 is open,
// for direct reads.
type errand struct {
	Act    string   `json:"act"`
	Target string   `json:"target,omitempty"` // the mount point
	Dev    string   `json:"dev,omitempty"`    // that has to be mounted there: 253:16
	Name   string   `json:"name,omitempty"`   // of the device: vdb
	Disks  []string `json:"disks,omitempty"`  // names of those that the device is made of; of a disk, its own
	Sys    string   `json:"sys,omitempty"`    // where sysfs is mounted
	// Doubtful says that the file system has noted errors: it is tried whether it still
	// takes writes.
	Doubtful bool `json:"doubtful,omitempty"`
	// FSType and Options are those of a mount.
	FSType  string `json:"fsType,omitempty"`
	Options string `json:"options,omitempty"`
	// SizeBytes is the size of what is read, of which the bytes from OwnFrom to OwnTo
	// count as blank.
	SizeBytes int64 `json:"sizeBytes,omitempty"`
	OwnFrom   int64 `json:"ownFrom,omitempty"`
	OwnTo     int64 `json:"ownTo,omitempty"`
	// Suspect is where something was found before; 0: nowhere that a glance misses.
	Suspect int64 `json:"suspect,omitempty"`
	// Partitioned says that the kernel has to be told that the partitions are gone.
	Partitioned bool `json:"partitioned,omitempty"`
}

// What a helper is sent for.
const (
	toProbe    = "probe"    // Disks and the mount on Target
	toUnmount  = "unmount"  // Target
	toMount    = "mount"    // Name on Target
	toGlance   = "glance"   // at what the disk is recognised by, and at Suspect
	toReadBack = "readBack" // flush, then glance
	toInspect  = "inspect"  // read the ends, the places of superblocks and a sample
	toReadAll  = "readAll"  // read every block
	toReadEnds = "readEnds" // read the ends and the places of superblocks, whatever is there
	toWipe     = "wipe"     // write zeros there; descriptor 3 is open for writing
)

// finding is one line of a helper's answer. One that says that a step begins has
// nothing but its name, and one that says how far it is, how many bytes have been read.
type finding struct {
	Step    string   `json:"step"`
	Ended   bool     `json:"ended,omitempty"`
	Value   string   `json:"value,omitempty"`
	Error   string   `json:"error,omitempty"`
	Errno   int      `json:"errno,omitempty"` // of the error, if it has one
	Read    int64    `json:"read,omitempty"`
	Content *content `json:"content,omitempty"`
	At      int64    `json:"at,omitempty"` // of what Content found
}

const (
	stepSerial  = "read of its serial"
	stepStat    = "look at its root directory"
	stepRead    = "direct read of one block"
	stepWrite   = "creation of a file"
	stepUnmount = "unmount"
	stepMount   = "mount"
	stepContent = "read of what it holds"
)

const readToldEvery = 250 * time.Millisecond // how many bytes have been read

// Help is the whole of a helper: it waits for its errand, so that it is in its scope
// before it can hang, and says what it finds.
func Help(in io.Reader, out io.Writer) error {
	var e errand
	if err := json.NewDecoder(in).Decode(&e); err != nil {
		return fmt.Errorf("read errand: %w", err)
	}
	enc := json.NewEncoder(out)
	say := func(step string, do func() (string, error)) error {
		if err := enc.Encode(finding{Step: step}); err != nil {
			return err
		}
		f := finding{Step: step, Ended: true}
		var err error
		if f.Value, err = do(); err != nil {
			f.Error = err.Error()
			if errno, ok := errors.AsType[unix.Errno](err); ok {
				f.Errno = int(errno)
			}
		}
		return enc.Encode(f)
	}
	switch e.Act {
	case toProbe:
		return errors.Join(
			say(stepSerial, e.serial),
			say(stepStat, e.stat),
			say(stepRead, e.read),
			say(stepWrite, e.write),
		)
	case toUnmount:
		return say(stepUnmount, e.unmount)
	case toMount:
		return say(stepMount, e.mount)
	case toGlance, toReadBack, toInspect, toReadAll, toReadEnds, toWipe:
		go func() { // what is found interests nobody but who has sent for it
			_, _ = io.Copy(io.Discard, in)
			os.Exit(1)
		}()
		return e.tell(enc)
	}
	return fmt.Errorf("unknown errand %q", e.Act)
}

// tell reads the disk, and says how far that is and then what it has found.
func (e errand) tell(enc *json.Encoder) error {
	disk := counted{File: os.NewFile(3, "disk"), n: new(atomic.Int64)}
	if err := enc.Encode(finding{Step: stepContent}); err != nil {
		return err
	}
	found := make(chan content, 1)
	go func() { found <- e.content(disk) }()
	tick := time.NewTicker(readToldEvery)
	defer tick.Stop()
	told := int64(0)
	for {
		select {
		case c := <-found:
			return enc.Encode(finding{Step: stepContent, Ended: true, Read: disk.n.Load(), Content: &c, At: c.at})
		case <-tick.C:
			if n := disk.n.Load(); n != told {
				told = n
				if err := enc.Encode(finding{Step: stepContent, Read: n}); err != nil {
					return err
				}
			}
		}
	}
}

// content reads what is asked for.
func (e errand) content(disk counted) content {
	r := masked{disk, span{e.OwnFrom, e.OwnTo}}
	switch e.Act {
	case toInspect:
		return inspect(r, e.SizeBytes)
	case toReadAll:
		return readAll(r, e.SizeBytes)
	case toReadEnds:
		if err := readable(disk, e.SizeBytes); err != nil {
			return content{Unreadable: err.Error()}
		}
		return content{}
	case toWipe:
		if err := e.wipe(disk); err != nil {
			return content{Unreadable: err.Error()}
		}
		return content{}
	case toReadBack:
		if err := disk.Sync(); err != nil {
			return content{Unreadable: fmt.Sprintf("flush: %v", err)}
		}
	}
	c := glance(r, e.SizeBytes)
	if c.Blank && e.Suspect > 0 {
		// To read all of it once more for what is known would take as long again.
		at := e.Suspect - e.Suspect%blockSize
		c = probe(r, aligned(blockSize)[:min(blockSize, e.SizeBytes-at)], at)
	}
	return c
}

// wipe overwrites what a disk is recognised by.
func (e errand) wipe(disk counted) error {
	zero := aligned(piece)
	for _, w := range append([]span{{0, min(front, e.SizeBytes)}}, windows(e.SizeBytes)...) {
		for at := w.from; at < w.to; at += piece {
			if _, err := disk.WriteAt(zero[:min(piece, w.to-at)], at); err != nil {
				return err
			}
		}
	}
	err := disk.Sync()
	if err == nil && e.Partitioned {
		err = unix.IoctlSetInt(int(disk.Fd()), unix.BLKRRPART, 0)
	}
	return err
}

// counted counts the bytes that have been read or written.
type counted struct {
	*os.File
	n *atomic.Int64
}

func (c counted) ReadAt(b []byte, at int64) (int, error) {
	n, err := c.File.ReadAt(b, at)
	c.n.Add(int64(n))
	return n, err
}

func (c counted) WriteAt(b []byte, at int64) (int, error) {
	n, err := c.File.WriteAt(b, at)
	c.n.Add(int64(n))
	return n, err
}

// masked reads a span of a disk as zero.
type masked struct {
	io.ReaderAt
	own span
}

func (m masked) ReadAt(b []byte, at int64) (int, error) {
	n, err := m.ReaderAt.ReadAt(b, at)
	if from, to := max(m.own.from, at), min(m.own.to, at+int64(n)); from < to {
		clear(b[from-at : to-at])
	}
	return n, err
}

// mount mounts the device, which the agent holds open, and so it is no other.
func (e errand) mount() (string, error) {
	return "", unix.Mount("/dev/"+e.Name, e.Target, e.FSType, unix.MS_NOATIME, e.Options)
}

// serial asks every disk who it is. One that does not tell leaves all untold.
func (e errand) serial() (string, error) {
	var all []string
	for _, name := range e.Disks {
		serial, err := readSerial(filepath.Join(e.Sys, "block", name))
		if err != nil || serial == "" {
			return "", err
		}
		all = append(all, serial)
	}
	return strings.Join(all, "+"), nil
}

// stat looks at the mounted file system: one that has shut itself down, as xfs does,
// answers with an error.
func (e errand) stat() (string, error) {
	if ok, err := e.mounted(); err != nil || !ok {
		return "", err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(e.Target, &st); err != nil {
		return "", err
	}
	dir, err := os.Open(e.Target)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	if _, err := dir.Stat(); err != nil {
		return "", err
	}
	if _, err := dir.Readdirnames(1); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	return "", nil
}

// write makes a file without a name, which a file system that takes no writes
// refuses, and which is gone at once. (A change of an inode alone ext4 takes, and
// drops.)
func (e errand) write() (string, error) {
	if ok, err := e.mounted(); err != nil || !ok || !e.Doubtful {
		return "", err
	}
	f, err := os.OpenFile(e.Target, unix.O_TMPFILE|unix.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	return "", f.Close()
}

// read reads one block past the page cache.
func (e errand) read() (string, error) {
	f, err := os.OpenFile("/dev/"+e.Name, unix.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	if devNumber(st.Rdev) != e.Dev {
		return "", errChanged
	}
	_, err = f.ReadAt(aligned(blockSize), 0)
	return "", err
}

func (e errand) mounted() (bool, error) {
	all, err := mounts()
	if err != nil {
		return false, err
	}
	m, ok := observed{Mounts: all}.at(e.Target)
	return ok && m.Dev == e.Dev, nil
}

// unmount takes the mount away, if it is the one that is meant: as usual if nobody
// uses it, else only from the tree of directories. Those who use it keep what is dead.
func (e errand) unmount() (string, error) {
	if ok, err := e.mounted(); err != nil || !ok {
		return "", err
	}
	err := unix.Unmount(e.Target, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(e.Target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	return "", err
}
