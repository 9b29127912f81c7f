package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func deletion(container string) Deletion {
	return Deletion{Attachment{container, "eth0"}, time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC)}
}

// drained returns the containers that a drain hands out.
func drained(q Queue, fail string) (all []string, err error) {
	err = q.Drain(func(d Deletion) error {
		if d.ContainerID == fail {
			return errors.New("no")
		}
		all = append(all, d.ContainerID)
		return nil
	})
	return all, err
}

func TestQueue(t *testing.T) {
	q := Queue(filepath.Join(t.TempDir(), "a", "del"))
	if all, err := drained(q, ""); len(all) != 0 || err != nil {
		t.Errorf("a queue that was never used: %v, %v", all, err)
	}
	for range 3 { // a DEL that is repeated is one
		for _, c := range []string{"one", "two"} {
			if err := q.Put(deletion(c)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if all, err := drained(q, "two"); len(all) != 1 || all[0] != "one" || err == nil || !strings.Contains(err.Error(), "queued DEL of two: no") {
		t.Errorf("drained %v, %v", all, err)
	}
	if all, err := drained(q, ""); len(all) != 1 || all[0] != "two" || err != nil {
		t.Errorf("what failed is tried again: %v, %v", all, err)
	}
	if all, err := drained(q, ""); len(all) != 0 || err != nil {
		t.Errorf("left: %v, %v", all, err)
	}
}

func TestQueueIsBounded(t *testing.T) {
	q := Queue(t.TempDir())
	if err := q.Put(deletion("first")); err != nil {
		t.Fatal(err)
	}
	for i := range maxQueue {
		if err := os.WriteFile(filepath.Join(string(q), fmt.Sprint(i, queueSuffix)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Put(deletion("next")); err == nil || !strings.Contains(err.Error(), "wait in") {
		t.Errorf("one more: %v", err)
	}
	if err := q.Put(deletion("first")); err != nil {
		t.Errorf("one that is there: %v", err)
	}
}

// TestHostileQueue has everything in the queue that does not belong there.
func TestHostileQueue(t *testing.T) {
	dir := t.TempDir()
	q := Queue(dir)
	good := deletion("good")
	if err := q.Put(good); err != nil {
		t.Fatal(err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(path(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(`{"containerID":"secret","ifname":"eth0"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	write("torn"+queueSuffix, `{"containerID":"to`)
	write("empty"+queueSuffix, "")
	write("long"+queueSuffix, `{"containerID":"`+strings.Repeat("x", maxDeletion)+`"}`)
	write("misnamed"+queueSuffix, `{"containerID":"good","ifname":"eth0"}`)
	write("unrelated", "keep me")
	write(queueTemp+"young", "half")
	write(queueTemp+"old", "half")
	if err := os.Chtimes(path(queueTemp+"old"), time.Time{}, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, path(deletion("secret").file())); err != nil {
		t.Fatal(err)
	}
	all, err := drained(q, "")
	if len(all) != 1 || all[0] != "good" || err == nil {
		t.Errorf("drained %v, %v", all, err)
	}
	for _, name := range []string{"torn", "empty", "long", "misnamed"} {
		if !strings.Contains(err.Error(), "forget "+path(name+queueSuffix)) {
			t.Errorf("not reported: %s", name)
		}
	}
	var left []string
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if got := strings.Join(left, " "); got != queueTemp+"young unrelated" {
		t.Errorf("left: %s", got)
	}
	if _, err := os.Stat(secret); err != nil {
		t.Error(err)
	}

	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := q.Put(good); err == nil || !strings.Contains(err.Error(), "not ours alone") {
		t.Errorf("Put where everybody may write: %v", err)
	}
	if _, err := drained(q, ""); err == nil || !strings.Contains(err.Error(), "not ours alone") {
		t.Errorf("Drain where everybody may write: %v", err)
	}
}

// TestQueueKeepsWhatCannotBeReadNow: only what will never be a deletion is forgotten.
func TestQueueKeepsWhatCannotBeReadNow(t *testing.T) {
	for err, want := range map[error]bool{
		&fs.PathError{Op: "open", Err: syscall.EMFILE}:    true,
		&fs.PathError{Op: "open", Err: syscall.ENOMEM}:    true,
		&fs.PathError{Op: "read", Err: syscall.EIO}:       true,
		&fs.PathError{Op: "open", Err: syscall.ELOOP}:     false, // a link
		&fs.PathError{Op: "open", Err: syscall.ENXIO}:     false, // a socket
		&fs.PathError{Op: "open", Err: syscall.ENOENT}:    false,
		errors.New("it is not named after what it holds"): false,
	} {
		if got := passing(err); got != want {
			t.Errorf("passing(%v) = %v", err, got)
		}
	}
	if os.Geteuid() == 0 {
		return // who may read everything
	}
	q := Queue(t.TempDir())
	d := deletion("one")
	if err := q.Put(d); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(string(q), d.file())
	if err := os.Chmod(file, 0); err != nil {
		t.Fatal(err)
	}
	if all, err := drained(q, ""); len(all) != 0 || err == nil || !strings.Contains(err.Error(), "read queued DEL") {
		t.Errorf("drained %v, %v", all, err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if all, err := drained(q, ""); len(all) != 1 || err != nil {
		t.Errorf("drained %v, %v", all, err)
	}
}

func FuzzDeletion(f *testing.F) {
	f.Add([]byte(`{"containerID":"c0ffee","ifname":"eth0","at":"2026-01-02T03:04:05.678Z"}`))
	f.Add([]byte(`{"containerID":"../../etc"`))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(dir, deletion("c0ffee").file())
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if d, err := readDeletion(path); err == nil && (d.ContainerID != "c0ffee" || d.IfName != "eth0") {
			t.Errorf("%q was taken for %+v", data, d)
		}
	})
}
