package disk

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// ledger is the directory that holds, for each disk that was ever formatted or
// adopted here, what was done to it. It is written before the disk is.
type ledger string

const (
	stateFormatting = "formatting" // a file system with this uuid may be being made
	stateFormatted  = "formatted"  // it was made, or found and adopted
)

// entry is what is known of one disk.
type entry struct {
	DiskID     string          `json:"diskID"`
	MountPoint string          `json:"mountPoint"`
	FileSystem node.FileSystem `json:"fileSystem"`
	UUID       string          `json:"uuid"`
	State      string          `json:"state"`
	SizeBytes  int64           `json:"sizeBytes"`
	Proof      string          `json:"proof,omitempty"` // what it rested on that the disk was blank; empty: it was not ours to format
	At         time.Time       `json:"at"`
	// Array and Crypt are what stands between the disk and the file system: the array
	// that the disk is the first member of, and the UUID of the LUKS2 header.
	Array *madeArray `json:"array,omitempty"`
	Crypt string     `json:"crypt,omitempty"`
	// Boot is that in which formatting began, and only told until it has ended or failed.
	Boot string `json:"boot,omitempty"`
}

func (e entry) valid(id string) error {
	switch {
	case e.DiskID != id:
		return fmt.Errorf("it is about %q", e.DiskID)
	case e.State != stateFormatting && e.State != stateFormatted:
		return fmt.Errorf("unknown state %q", e.State)
	case len(e.UUID) != 36, e.MountPoint == "", e.FileSystem == "":
		return errors.New("it is incomplete")
	case e.Array != nil && (len(e.Array.UUID) != 36 || len(e.Array.Members) < 2 || e.Array.Members[0] != id || e.Array.ChunkBytes <= 0),
		e.Crypt != "" && len(e.Crypt) != 36:
		return errors.New("it is incomplete")
	}
	return nil
}

// read returns every entry. A damaged one is left out and a terminal error:
// without it nobody knows whether the disk has been used before.
func (l ledger) read() (map[string]entry, error) {
	files, err := os.ReadDir(string(l))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read disk ledger: %w", err)
	}
	entries := map[string]entry{}
	var all []entry
	var damage error
	for _, f := range files {
		id, ok := strings.CutSuffix(f.Name(), ".json")
		if !ok {
			continue // a decision, or what a crash left of a write; it was never renamed
		}
		path := filepath.Join(string(l), f.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read disk ledger: %w", err)
		}
		e, err := decodeEntry(id, b)
		if err != nil {
			damage = node.Terminal("LedgerDamaged",
				fmt.Sprintf("nothing is formatted while it is unreadable; remove it if %s may be treated as never seen", id),
				fmt.Errorf("read disk ledger %s: %w", path, err))
			continue
		}
		all = append(all, e)
	}
	// An entry is that of every disk of a stripe. Of two for a disk the later one is
	// so: an operator had the disk taken from what it was.
	slices.SortStableFunc(all, func(a, b entry) int { return a.At.Compare(b.At) })
	for _, e := range all {
		entries[e.DiskID] = e
		if e.Array != nil {
			for _, id := range e.Array.Members {
				entries[id] = e
			}
		}
	}
	return entries, damage
}

func decodeEntry(id string, b []byte) (entry, error) {
	var e entry
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return entry{}, err
	}
	if d.More() {
		return entry{}, errors.New("something follows the entry")
	}
	return e, e.valid(id)
}

// write stores e, dated now, and returns once it is on stable storage.
func (l ledger) write(e entry) error {
	e.At = time.Now().UTC().Truncate(time.Second)
	return l.store(e.DiskID+".json", e)
}

// resize notes that a disk, and what is on it, is larger than it was.
func (l ledger) resize(id string, size int64) error {
	all, err := l.read()
	if err != nil {
		return err
	}
	e, ok := all[id]
	if !ok || e.SizeBytes == size {
		return nil
	}
	e.SizeBytes = size
	return l.store(id+".json", e) // dated as it was: nothing else was done
}

// store writes v as a file, and returns once it is on stable storage.
func (l ledger) store(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode disk ledger: %w", err)
	}
	return l.put(name, append(b, '\n'))
}

// put writes a file, and returns once it is on stable storage.
func (l ledger) put(name string, b []byte) error {
	if err := os.MkdirAll(string(l), 0o700); err != nil {
		return fmt.Errorf("write disk ledger: %w", err)
	}
	if err := syncDir(filepath.Dir(string(l))); err != nil {
		return fmt.Errorf("write disk ledger: %w", err)
	}
	path := filepath.Join(string(l), name)
	f, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write disk ledger: %w", err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil {
		err = syncDir(string(l))
	}
	if errors.Is(err, syscall.ENOSPC) {
		err = &node.Error{Class: node.ClassTransient, Reason: "LedgerFull", Err: err,
			Fix: "make room on the system disk (`du -xh --max-depth=3 /var | sort -h | tail`): what is done to a disk is written down before it is done"}
	}
	if err != nil {
		_ = os.Remove(path + ".new") // of a full disk what little it takes
		return fmt.Errorf("write disk ledger: %w", err)
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
