package disk

import (
	"cmp"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	keyMin = 32 // bytes: what makes a fast key derivation right
	keyMax = 512
)

// randomPart is the file of the random part of a key that is derived from the instance,
// beside the ledger: one for each disk, so that one can be brought back without another's
// being lost.
func (d *Disk) randomPart(id string) string { return filepath.Join(string(d.ledger), id+".key") }

// wrongKey is a key, by its hash, that was found not to open a header.
type wrongKey struct {
	header string // UUID
	key    [sha256.Size]byte
}

// keyState looks whether the key can be used, without keeping it.
func (d *Disk) keyState(id string) keyState {
	k := keyState{Where: cmp.Or(d.want.Encryption.KeyFile, d.randomPart(id))}
	derived := d.want.Encryption.KeyFrom == node.KeyFromInstance
	key, err := d.key(id, false)
	switch {
	case err == nil:
		if d.wrong.key == sha256.Sum256([]byte(key.Reveal())) {
			k.Wrong = d.wrong.header
		}
	case derived && errors.Is(err, fs.ErrNotExist):
		k.New = true
	case derived:
		k.Problem, k.Fix = err.Error(), "bring back "+k.Where+" as it was"
	default:
		k.Problem, k.Fix = err.Error(), fmt.Sprintf("put the key there: %d to %d bytes, owned by root, mode 0600", keyMin, keyMax)
	}
	return k
}

// key returns the key of a disk, of a stripe that of its first one. Where it is derived
// from the instance, its random part is made if there is none yet and it may be.
func (d *Disk) key(id string, make bool) (node.Secret, error) {
	e := d.want.Encryption
	if e.KeyFrom != node.KeyFromInstance {
		return readKey(e.KeyFile)
	}
	path := d.randomPart(id)
	random, err := readKey(path)
	if errors.Is(err, fs.ErrNotExist) && make {
		b := [keyMin]byte{}
		rand.Read(b[:]) // never fails
		if err := d.ledger.put(id+".key", b[:]); err != nil {
			return node.Secret{}, err
		}
		random, err = readKey(path)
	}
	if err != nil {
		return node.Secret{}, err
	}
	key, err := hkdf.Key(sha256.New, []byte(random.Reveal()), []byte(d.sealed.Facts.InstanceID), "tkenode "+id, keyMin)
	if err != nil {
		return node.Secret{}, fmt.Errorf("derive the key of %s: %w", id, err)
	}
	return node.NewSecret(string(key)), nil
}

// readKey reads a key that nobody but root can have read or changed.
func readKey(path string) (node.Secret, error) {
	// Of what is no file it is not waited until somebody writes to it.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return node.Secret{}, fmt.Errorf("read the key: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return node.Secret{}, fmt.Errorf("read the key: %w", err)
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	switch {
	case !info.Mode().IsRegular():
		return node.Secret{}, fmt.Errorf("%s is no regular file", path)
	case info.Mode().Perm()&0o077 != 0 || owner != uint32(os.Geteuid()):
		return node.Secret{}, fmt.Errorf("%s has mode %04o and belongs to user id %d, so others can have read it", path, info.Mode().Perm(), owner)
	}
	b, err := io.ReadAll(io.LimitReader(f, keyMax+1))
	if err != nil {
		return node.Secret{}, fmt.Errorf("read the key: %w", err)
	}
	if len(b) < keyMin || len(b) > keyMax {
		return node.Secret{}, fmt.Errorf("%s has %d bytes, of %d to %d expected", path, info.Size(), keyMin, keyMax)
	}
	return node.NewSecret(string(b)), nil
}
