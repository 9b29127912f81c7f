package eni

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/tencent"
)

// record is one line of the journal: exactly one of its fields is set.
type record struct {
	Begin *begin            `json:"begin,omitempty"`
	Quota *tencent.ENILimit `json:"quota,omitempty"`
	Slot  *Slot             `json:"slot,omitempty"`
	Pod   *Pod              `json:"pod,omitempty"`
	Rest  *rest             `json:"rest,omitempty"`
}

const (
	maxRecord  = 64 << 10
	maxJournal = 1 << 20 // bytes, before it is rewritten
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// encode returns the record's line: CRC-32C of the JSON in 8 hex digits, a space,
// the JSON, a newline.
func (r record) encode() ([]byte, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	if len(text) > maxRecord {
		return nil, fmt.Errorf("encode record: %d bytes, at most %d fit", len(text), maxRecord)
	}
	return append(append([]byte(checksum(text)), text...), '\n'), nil
}

// checksum returns what stands before the text in its line.
func checksum(text []byte) string { return fmt.Sprintf("%08x ", crc32.Checksum(text, castagnoli)) }

var errDamaged = errors.New("damaged")

// decode reads one line without its newline.
func decode(line []byte) (record, error) {
	var r record
	if len(line) < 10 || line[8] != ' ' {
		return r, errDamaged
	}
	if string(line[:9]) != checksum(line[9:]) {
		return r, errDamaged
	}
	if err := json.Unmarshal(line[9:], &r); err != nil {
		return r, fmt.Errorf("%w: %w", errDamaged, err)
	}
	return r, nil
}

// readJournal returns every record, and the length of what is whole. What follows
// the last newline was being written when the power went: it is left out. Any
// other damage is errDamaged, because guessing could give an address out twice.
func readJournal(r io.Reader) ([]record, int64, error) {
	var all []record
	var whole int64
	in := bufio.NewReaderSize(r, 16<<10)
	for n := 1; ; n++ {
		line, err := in.ReadBytes('\n')
		if err == io.EOF {
			return all, whole, nil
		}
		if err != nil {
			return nil, 0, err
		}
		rec, err := decode(bytes.TrimSuffix(line, []byte{'\n'}))
		if err != nil {
			return nil, 0, fmt.Errorf("line %d: %w", n, err)
		}
		all = append(all, rec)
		whole += int64(len(line))
	}
}

// journal is an append-only file of records. What append returned from survives
// the agent; what sync returned from survives a power cut.
type journal struct {
	path string
	file *os.File
	lock *os.File
	size int64

	syncing sync.Mutex // held during fdatasync; those who wait find theirs done
	mu      sync.Mutex // guards the two below
	written int64      // records appended since it was opened
	synced  int64      // of them, those on the disk
}

// openJournal opens or creates the journal and takes its lock: two agents must
// never write to one.
func openJournal(path string) (*journal, []record, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, nil, err
	}
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("lock %s: %w: is another agent running?", lock.Name(), err), lock.Close())
	}
	j := &journal{path: path, lock: lock}
	all, err := j.load()
	if err != nil {
		return nil, nil, errors.Join(err, j.close())
	}
	return j, all, nil
}

func (j *journal) load() ([]record, error) {
	f, err := os.OpenFile(j.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	j.file = f
	all, whole, err := readJournal(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", j.path, err)
	}
	if err := f.Truncate(whole); err != nil {
		return nil, err
	}
	j.size = whole
	return all, nil
}

// append writes the record and reports whether the journal should be rewritten.
func (j *journal) append(r record) (full bool, err error) {
	line, err := r.encode()
	if err != nil {
		return false, err
	}
	n, err := j.file.Write(line)
	if err != nil {
		// A part of a line must not stand in front of the next one.
		return false, errors.Join(err, j.undo(n))
	}
	j.size += int64(n)
	j.mu.Lock()
	j.written++
	j.mu.Unlock()
	return j.size > maxJournal, nil
}

func (j *journal) undo(written int) error {
	if written == 0 {
		return nil
	}
	return j.file.Truncate(j.size)
}

// sync returns once everything appended before the call is on the disk.
func (j *journal) sync() error {
	j.mu.Lock()
	mine := j.written
	j.mu.Unlock()
	j.syncing.Lock()
	defer j.syncing.Unlock()
	j.mu.Lock()
	upTo, done := j.written, j.synced >= mine
	j.mu.Unlock()
	if done {
		return nil
	}
	if err := unix.Fdatasync(int(j.file.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", j.path, err)
	}
	j.mu.Lock()
	j.synced = upTo
	j.mu.Unlock()
	return nil
}

// rewrite replaces the journal by the records.
func (j *journal) rewrite(all []record) error {
	var text []byte
	for _, r := range all {
		line, err := r.encode()
		if err != nil {
			return err
		}
		text = append(text, line...)
	}
	j.syncing.Lock()
	defer j.syncing.Unlock()
	if err := writeFile(j.path, text, 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(j.path, os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	old := j.file
	j.file, j.size = f, int64(len(text))
	j.mu.Lock()
	j.synced = j.written
	j.mu.Unlock()
	return old.Close()
}

func (j *journal) close() error {
	err := j.lock.Close()
	if j.file != nil {
		err = errors.Join(err, j.file.Close())
	}
	return err
}

// writeFile replaces a file so that after a crash it is the old one or the new
// one, whole.
func writeFile(path string, data []byte, mode os.FileMode) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
