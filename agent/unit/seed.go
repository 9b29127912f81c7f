package unit

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/node"
)

// A seed gets into containerd's root in three moves: it is unpacked into seedNew,
// that is renamed to seedReady once all of it is on the disk, and from there its
// directories are renamed into the root, the database last. Whoever is killed in
// between begins anew before the second move, and goes on after it.
const (
	seedNew   = ".tkenode-seed.new"
	seedReady = ".tkenode-seed"

	seedNames = 1 << 20 // bytes of the index, far above what names of images take
)

// seed is what containerd's root is filled with before containerd first starts.
type seed struct {
	file string // made by package images; need not exist
	root string // containerd's
	// failed says that there was an error. A seed only saves the import of the images,
	// so the next plan does without.
	failed atomic.Bool
}

// root is how containerd's root is.
type root struct {
	Path  string            `json:"path,omitempty"`
	Fresh bool              `json:"fresh,omitempty"` // containerd has never used it, and it can be seeded
	Left  bool              `json:"left,omitempty"`  // of a seed that is of no use any more
	Seed  node.SeedContents `json:"seed,omitzero"`
}

// observe looks at the root; into the seed only where that is of use.
func (s *seed) observe() (root, error) {
	r := root{Path: s.root}
	entries, err := os.ReadDir(s.root)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, fmt.Errorf("read containerd's root: %w", err)
	}
	var begun, ready bool
	var others []string
	for _, e := range entries {
		switch e.Name() {
		case "lost+found":
		case seedNew:
			begun = true
		case seedReady:
			ready = true
		default:
			others = append(others, e.Name())
		}
	}
	if ready {
		r.Fresh = s.moving(others)
	} else {
		r.Fresh = len(others) == 0
	}
	if r.Fresh && !s.failed.Load() {
		f, contents, err := s.open()
		switch {
		case err == nil:
			f.Close()
			r.Seed = contents
			return r, nil
		case !errors.Is(err, fs.ErrNotExist):
			return r, s.giveUp(err)
		}
	}
	r.Fresh, r.Left = false, begun || ready
	return r, nil
}

// moving reports whether others in the root are what an interrupted last move has
// left there, with the rest of it, above all the database, still to come.
func (s *seed) moving(others []string) bool {
	for i, dir := range node.SeedDirs {
		_, err := os.Lstat(filepath.Join(s.root, seedReady, dir))
		there := slices.Contains(others, dir)
		if there == (err == nil) || there && i == len(node.SeedDirs)-1 {
			return false
		}
		if there {
			others = slices.DeleteFunc(slices.Clone(others), func(name string) bool { return name == dir })
		}
	}
	return len(others) == 0
}

// open opens the seed and reads its index.
func (s *seed) open() (*os.File, node.SeedContents, error) {
	var c node.SeedContents
	f, err := os.Open(s.file)
	if err != nil {
		return nil, c, err
	}
	st, err := f.Stat()
	if err == nil {
		var h *tar.Header
		t := tar.NewReader(f)
		if h, err = t.Next(); err == nil && (h.Name != node.SeedIndex || h.Size > seedNames) {
			err = fmt.Errorf("it begins with %q of %d bytes", h.Name, h.Size)
		}
		if err == nil {
			err = json.NewDecoder(t).Decode(&c)
		}
		if err == nil && (len(c.Images) == 0 || c.Bytes < 0 || c.Bytes > st.Size()) {
			err = fmt.Errorf("it says that it has %d images and %d bytes", len(c.Images), c.Bytes)
		}
		if err == nil {
			_, err = f.Seek(0, io.SeekStart)
		}
	}
	if err != nil {
		f.Close()
		return nil, c, fmt.Errorf("read seed %s: %w", s.file, err)
	}
	return f, c, nil
}

// sow fills the root, if it still is one to be filled.
func (s *seed) sow(ctx context.Context) error {
	r, err := s.observe()
	if err != nil || !r.Fresh {
		return err
	}
	if err := s.carry(ctx); err != nil {
		return s.giveUp(err)
	}
	return nil
}

// giveUp has err said once, and containerd started without a seed after that.
func (s *seed) giveUp(err error) error {
	s.failed.Store(true)
	return fmt.Errorf("%w; the images will be imported", err)
}

func (s *seed) carry(ctx context.Context) error {
	begun, ready := filepath.Join(s.root, seedNew), filepath.Join(s.root, seedReady)
	if _, err := os.Lstat(ready); errors.Is(err, fs.ErrNotExist) {
		if err := alive(ctx, os.RemoveAll(begun)); err != nil {
			return err
		}
		if err := s.unpack(ctx, begun); err != nil {
			return err
		}
		// One call for all files: what containerd itself does for contents and for
		// its database, one by one.
		if err := alive(ctx, syncFS(begun)); err != nil {
			return err
		}
		if err := alive(ctx, os.Rename(begun, ready)); err != nil {
			return err
		}
	}
	for _, dir := range node.SeedDirs {
		to := filepath.Join(s.root, dir)
		// Never over what is there. What is not here has been moved already.
		err := unix.Renameat2(unix.AT_FDCWD, filepath.Join(ready, dir), unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("move seed to %s: %w", to, err)
		}
		if err := alive(ctx, nil); err != nil {
			return err
		}
	}
	if err := alive(ctx, syncDir(s.root)); err != nil {
		return err
	}
	return os.Remove(ready)
}

// alive returns err, or else whether ctx has ended: it stands between any two steps.
func alive(ctx context.Context, err error) error {
	if err != nil {
		return err
	}
	return ctx.Err()
}

// clear removes what is left of a seed, if it still is of no use. It ceases to be
// ready before it ceases to be whole.
func (s *seed) clear() error {
	r, err := s.observe()
	if err != nil || !r.Left {
		return err
	}
	begun, ready := filepath.Join(s.root, seedNew), filepath.Join(s.root, seedReady)
	if err := os.RemoveAll(begun); err != nil {
		return err
	}
	if err := os.Rename(ready, begun); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(begun)
}

func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync file system of %s: %w", dir, err)
	}
	return nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return firstError(f.Sync(), f.Close())
}

// unpack unpacks the seed into the new directory dir. The contents are not
// hashed: the seed is as much a part of the node image as containerd is.
func (s *seed) unpack(ctx context.Context, dir string) error {
	f, contents, err := s.open()
	if err != nil {
		return err
	}
	defer f.Close()
	// As containerd makes it, where it is not a disk's.
	if err := os.MkdirAll(s.root, 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	var free unix.Statfs_t
	if err := unix.Statfs(dir, &free); err != nil {
		return fmt.Errorf("look for free space: %w", err)
	}
	if space := int64(free.Bavail) * free.Bsize; space < contents.Bytes {
		return fmt.Errorf("%s has %s free, the seed takes %s", s.root, size(int(space)), size(int(contents.Bytes)))
	}
	u := unpacking{dir: dir, left: contents, seen: map[string]byte{}, asRoot: os.Geteuid() == 0, buffer: make([]byte, 256<<10)}
	t := tar.NewReader(f)
	for index := true; ; index = false {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err == nil && !index {
			err = u.entry(h, t)
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("unpack seed %s: %w", s.file, err)
		}
	}
	if u.left.Files != 0 || u.left.Bytes != 0 {
		return fmt.Errorf("unpack seed %s: %d files with %d bytes are not in it", s.file, u.left.Files, u.left.Bytes)
	}
	return u.times()
}

// unpacking is the state of one unpack.
type unpacking struct {
	dir    string
	left   node.SeedContents // of what the index allows
	seen   map[string]byte   // types of what was made, by name
	dirs   []*tar.Header
	asRoot bool // owners are set
	buffer []byte
}

// entry makes one file. Its directory has to be one that was made before: so no
// path leaves dir, neither by itself nor through a link.
func (u *unpacking) entry(h *tar.Header, data io.Reader) error {
	name := strings.TrimSuffix(h.Name, "/")
	above := path.Dir(name)
	switch {
	case !filepath.IsLocal(name) || name != path.Clean(name):
		return fmt.Errorf("path %q is not clean", h.Name)
	case above == "." && (h.Typeflag != tar.TypeDir || !slices.Contains(node.SeedDirs[:], name)):
		return fmt.Errorf("%s is no directory of a seed", name)
	case above != "." && u.seen[above] != tar.TypeDir:
		return fmt.Errorf("%s has no directory above it", name)
	case u.seen[name] != 0:
		return fmt.Errorf("%s is there twice", name)
	case h.Mode&^0o1777 != 0:
		return fmt.Errorf("%s has mode %o", name, h.Mode)
	case h.Size < 0 || h.Size > u.left.Bytes || u.left.Files <= 0:
		return fmt.Errorf("%s is more than the index says", name)
	}
	u.left.Files--
	u.left.Bytes -= h.Size
	at := filepath.Join(u.dir, name)
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		u.dirs = append(u.dirs, h)
		err = os.Mkdir(at, 0o700)
	case tar.TypeReg:
		err = u.file(at, data)
	case tar.TypeSymlink:
		err = os.Symlink(h.Linkname, at)
	case tar.TypeLink:
		if u.seen[h.Linkname] != tar.TypeReg {
			return fmt.Errorf("%s is a link to %q, which is no file before it", name, h.Linkname)
		}
		err = os.Link(filepath.Join(u.dir, h.Linkname), at)
	default:
		return fmt.Errorf("%s is of type %q", name, h.Typeflag)
	}
	if err != nil {
		return err
	}
	u.seen[name] = h.Typeflag
	if h.Typeflag == tar.TypeLink { // owner, mode and time are those of its file
		return nil
	}
	if u.asRoot && (h.Uid != 0 || h.Gid != 0) {
		if err := os.Lchown(at, h.Uid, h.Gid); err != nil {
			return err
		}
	}
	if h.Typeflag == tar.TypeSymlink {
		return setTime(at, h.ModTime)
	}
	if err := os.Chmod(at, fs.FileMode(h.Mode&0o777)|sticky(h.Mode)); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeReg {
		return setTime(at, h.ModTime)
	}
	return nil
}

func (u *unpacking) file(at string, data io.Reader) error {
	f, err := os.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	// Without its other methods it would not be read into the buffer.
	_, err = io.CopyBuffer(struct{ io.Writer }{f}, data, u.buffer)
	return firstError(err, f.Close())
}

// times sets those of directories, which change whenever something is made in them.
func (u *unpacking) times() error {
	for _, h := range u.dirs {
		if err := setTime(filepath.Join(u.dir, h.Name), h.ModTime); err != nil {
			return err
		}
	}
	return nil
}

func sticky(mode int64) fs.FileMode {
	if mode&0o1000 != 0 {
		return fs.ModeSticky
	}
	return 0
}

func setTime(at string, t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, at, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time of %s: %w", at, err)
	}
	return nil
}
