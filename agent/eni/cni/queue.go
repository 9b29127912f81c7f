package cni

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// QueueDir holds the DELs that no agent has answered.
const QueueDir = "/var/lib/tkenode/cni-del"

// Bounds of the queue. A node has some hundred pods, each with one interface.
const (
	maxQueue    = 4096
	maxDeletion = 4 << 10
	// abandoned is when a file that was never renamed is nobody's any more: writing
	// one takes as long as the disk does.
	abandoned = time.Minute
)

const (
	queueSuffix = ".json"
	queueTemp   = ".new-"
)

// Deletion is a DEL that waits for an agent.
type Deletion struct {
	Attachment
	At time.Time `json:"at"` // when the runtime asked for it
}

// file is the name of the one file of an attachment: a DEL that is repeated takes
// no more room.
func (d Deletion) file() string {
	sum := sha256.Sum256([]byte(d.ContainerID + "/" + d.IfName))
	return hex.EncodeToString(sum[:16]) + queueSuffix
}

// Queue is a directory of Deletions. It outlives the plugin and the agent.
type Queue string

// Put keeps a deletion; when it returns nil, it is on the disk.
func (q Queue) Put(d Deletion) error {
	dir := string(q)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	names, err := q.names()
	if err != nil {
		return err
	}
	if len(names) >= maxQueue && !slices.Contains(names, d.file()) {
		return fmt.Errorf("%d DELs wait in %s already", len(names), dir)
	}
	data, err := json.Marshal(d)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, queueTemp)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(dir, d.file()))
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDir(dir)
}

// Drain calls f for every deletion, and forgets those that f has carried out.
// What is no deletion of ours is reported; a file that cannot be read as one is
// forgotten, too, since nothing will ever make it one. One that cannot be read now
// is kept.
func (q Queue) Drain(f func(Deletion) error) error {
	names, err := q.names()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, name := range names {
		path := filepath.Join(string(q), name)
		if strings.HasPrefix(name, queueTemp) {
			if info, statErr := os.Lstat(path); statErr == nil && time.Since(info.ModTime()) > abandoned {
				err = errors.Join(err, os.Remove(path))
			}
			continue
		}
		d, readErr := readDeletion(path)
		if passing(readErr) {
			err = errors.Join(err, fmt.Errorf("read queued DEL: %w", readErr))
			continue
		}
		if readErr == nil {
			if doErr := f(d); doErr != nil {
				err = errors.Join(err, fmt.Errorf("queued DEL of %s: %w", d.ContainerID, doErr))
				continue
			}
		} else {
			err = errors.Join(err, fmt.Errorf("forget %s: %w", path, readErr))
		}
		if rmErr := os.Remove(path); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
	}
	return err
}

// names returns the queue's files, sorted, once it is proved to be ours: nobody
// else could have written to it.
func (q Queue) names() ([]string, error) {
	d, err := os.OpenFile(string(q), os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	info, err := d.Stat()
	if err != nil {
		return nil, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != uint32(os.Geteuid()) || info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("%s is not ours alone to write to", q)
	}
	all, err := d.Readdirnames(2 * maxQueue)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(n string) bool {
		return !strings.HasSuffix(n, queueSuffix) && !strings.HasPrefix(n, queueTemp)
	})
	slices.Sort(all)
	return all, nil
}

func readDeletion(path string) (d Deletion, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return d, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return d, errors.Join(errors.New("no regular file"), err)
	}
	if err := Read(f, maxDeletion, &d); err != nil {
		return d, err
	}
	if filepath.Base(path) != d.file() {
		return d, errors.New("it is not named after what it holds")
	}
	return d, nil
}

// passing reports whether an error is of reading and not of what was read: a lack of
// descriptors or memory, a disk that fails.
func passing(err error) bool {
	_, reading := errors.AsType[*fs.PathError](err)
	return reading && !errors.Is(err, syscall.ELOOP) && !errors.Is(err, syscall.ENXIO) && !errors.Is(err, fs.ErrNotExist)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
