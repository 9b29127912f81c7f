package disk

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// what a disk may hold: made by the real tool, or written by hand.
type diskContent struct {
	name string
	size int64
	tool []string // run with the file appended
	in   string   // its standard input
	put  []poked
}

type poked struct {
	at   int64 // from the end if it is negative
	data []byte
}

const mib = 1 << 20

// basicContents need no tool beyond those that the unit tests need anyway.
func basicContents() []diskContent {
	rand := bytes.Repeat([]byte("\x93\x1c\xe7\x5a\x08\xb6"), 4<<20/6)
	const size = 128 * mib
	hand := func(name string, put ...poked) diskContent { return diskContent{name: name, size: size, put: put} }
	return []diskContent{
		hand("blank"),
		{name: "ext2", size: size, tool: []string{"mkfs.ext2", "-q", "-F"}},
		{name: "ext3", size: size, tool: []string{"mkfs.ext3", "-q", "-F"}},
		{name: "ext4", size: size, tool: []string{"mkfs.ext4", "-q", "-F"}},
		{name: "ext4, 1 KiB blocks", size: size, tool: []string{"mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "^metadata_csum"}},
		{name: "xfs", size: 320 * mib, tool: []string{"mkfs.xfs", "-q"}},
		{name: "swap", size: size, tool: []string{"mkswap", "-q"}},
		hand("LVM2 PV", poked{512, lvm()}),
		hand("LUKS1", poked{0, []byte("LUKS\xba\xbe\x00\x01aes\x00")}),
		hand("md 0.90", poked{size - 64<<10, md090()}),
		hand("md 1.0", poked{size - 8<<10, md1((size - 8<<10) / 512)}),
		hand("md 1.1", poked{0, md1(0)}),
		hand("md 1.2", poked{4096, md1(8)}),
		hand("ZFS", zfsLabels(size)...),
		hand("bcache", poked{4096 + 8, []byte{8}}, poked{4096 + 24, []byte("\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81")}),
		hand("InnoDB pages", innodb(0)...),
		hand("InnoDB pages in the middle", innodb(61*mib)...),
		hand("PostgreSQL page", poked{0, postgres()}),
		hand("random bytes", poked{0, rand}),
		hand("random bytes in the middle", poked{70 * mib, rand}),
		hand("one byte at the start", poked{0, []byte{1}}),
		hand("one byte in the middle", poked{55*mib + 4321, []byte{1}}),
		hand("one byte at the end", poked{-1, []byte{1}}),
	}
}

// make makes the disk as a sparse file.
func (c diskContent) make(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, strings.Map(func(r rune) rune {
		if r == ' ' || r == ',' {
			return '-'
		}
		return r
	}, c.name))
	create := func() error {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		err = f.Truncate(c.size)
		for _, p := range c.put {
			at := p.at
			if at < 0 {
				at += c.size
			}
			_, werr := f.WriteAt(p.data, at)
			err = errors.Join(err, werr)
		}
		return errors.Join(err, f.Close())
	}
	if err := create(); err != nil {
		t.Fatal(err)
	}
	if len(c.tool) == 0 {
		return path
	}
	args := append([]string{}, c.tool[1:]...)
	if c.tool[0] == "genisoimage" {
		args[3] = path
	} else {
		args = append(args, path)
	}
	cmd := exec.CommandContext(t.Context(), c.tool[0], args...)
	for _, d := range []string{"/usr/sbin/", "/sbin/", "/usr/bin/"} {
		if p, err := exec.LookPath(d + c.tool[0]); err == nil {
			cmd.Path, cmd.Err = p, nil
			break
		}
	}
	cmd.Stdin = strings.NewReader(c.in)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(cmd.Args, " "), err, out)
	}
	if err := create(); err != nil { // some tools shorten the file
		t.Fatal(err)
	}
	return path
}

// sparse is a disk in memory, of which only the pieces of 1 MiB are kept that are
// not zero.
type sparse struct {
	size   int64
	pieces map[int64][]byte
}

func load(t *testing.T, path string) *sparse {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &sparse{pieces: map[int64][]byte{}}
	if s.size, err = f.Seek(0, io.SeekEnd); err != nil {
		t.Fatal(err)
	}
	for at := int64(0); ; {
		at, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA) // what nobody has written takes long to read
		if errors.Is(err, unix.ENXIO) {
			return s
		}
		if err != nil {
			t.Fatal(err)
		}
		n := at / piece
		b := make([]byte, min(piece, s.size-n*piece))
		if _, err := f.ReadAt(b, n*piece); err != nil {
			t.Fatal(err)
		}
		if nonZero(b) >= 0 {
			s.pieces[n] = b
		}
		at = (n + 1) * piece
	}
}

//go:norace // b is the one reader's own, and it takes the race detector a second for each GiB
func (s *sparse) ReadAt(b []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(b)) > s.size {
		return 0, io.EOF
	}
	clear(b)
	for n := at / piece; n*piece < at+int64(len(b)); n++ {
		if data, ok := s.pieces[n]; ok {
			from := max(at, n*piece)
			copy(b[from-at:], data[from-n*piece:])
		}
	}
	return len(b), nil
}

// lvm is a physical volume's label, in sector 1.
// Source: lvm2 lib/format_text/layout.h, and lib/misc/crc.c for the checksum
func lvm() []byte {
	b := make([]byte, 512)
	copy(b, "LABELONE")
	b[8], b[20] = 1, 32
	copy(b[24:], "LVM2 001")
	copy(b[32:], "0123456789abcdefghijklmnopqrstuv")
	crc := uint32(0xf597a6cf)
	for _, c := range b[20:] {
		crc ^= uint32(c)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0xedb88320
			} else {
				crc >>= 1
			}
		}
	}
	binary.LittleEndian.PutUint32(b[16:], crc)
	return b
}

// md1 is a superblock of version 1 at a sector.
// Source: linux include/uapi/linux/raid/md_p.h, drivers/md/md.c calc_sb_1_csum
func md1(sector int64) []byte {
	b := make([]byte, 256+2)
	le := binary.LittleEndian
	le.PutUint32(b, 0xa92b4efc)
	le.PutUint32(b[4:], 1)
	copy(b[16:], "0123456789abcdef")
	le.PutUint32(b[72:], 1)               // RAID 1
	le.PutUint32(b[92:], 1)               // disks
	le.PutUint64(b[144:], uint64(sector)) // super_offset
	le.PutUint32(b[220:], 1)              // max_dev
	var sum uint64
	for i := 0; i < 256; i += 4 {
		sum += uint64(le.Uint32(b[i:]))
	}
	sum += uint64(le.Uint16(b[256:]))
	le.PutUint32(b[216:], uint32(sum)+uint32(sum>>32))
	return b
}

// md090 is a superblock of version 0.90. Source: as md1, calc_sb_csum
func md090() []byte {
	b := make([]byte, 4096)
	le := binary.LittleEndian
	le.PutUint32(b, 0xa92b4efc)
	le.PutUint32(b[8:], 90)
	copy(b[20:], "0123")
	var sum uint64
	for i := 0; i < len(b); i += 4 {
		sum += uint64(le.Uint32(b[i:]))
	}
	le.PutUint32(b[152:], uint32(sum)+uint32(sum>>32))
	return b
}

// zfsLabels are the uberblocks of the four labels of a vdev.
// Source: openzfs include/sys/vdev_impl.h, uberblock_impl.h
func zfsLabels(size int64) (all []poked) {
	for _, label := range []int64{0, 256 << 10, size - 512<<10, size - 256<<10} {
		for n := range int64(128) {
			u := make([]byte, 1024)
			binary.LittleEndian.PutUint64(u, 0x00bab10c)
			binary.LittleEndian.PutUint64(u[8:], 5000)
			binary.LittleEndian.PutUint64(u[16:], uint64(n+1))
			all = append(all, poked{label + 128<<10 + n<<10, u})
		}
	}
	return all
}

// innodb are pages of 16 KiB with checksums as they are on a raw partition.
func innodb(at int64) (all []poked) {
	for n := range int64(64) {
		page := bytes.Repeat([]byte{0}, 16<<10)
		sum := sha256.Sum256([]byte{byte(n)})
		copy(page, sum[:4])
		binary.BigEndian.PutUint32(page[4:], uint32(n))
		binary.BigEndian.PutUint16(page[24:], 0x45bf)
		copy(page[38:], "infimum\x00supremum")
		all = append(all, poked{at + n<<14, page})
	}
	return all
}

// postgres is a heap page. Source: postgresql src/include/storage/bufpage.h
func postgres() []byte {
	b := make([]byte, 8<<10)
	le := binary.LittleEndian
	le.PutUint32(b[4:], 0x16b3740)
	le.PutUint16(b[12:], 28)
	le.PutUint16(b[14:], 8160)
	le.PutUint16(b[16:], 8192)
	le.PutUint16(b[18:], 0x2004)
	copy(b[8160:], "\x01\x00\x00\x00a row of a table")
	return b
}
