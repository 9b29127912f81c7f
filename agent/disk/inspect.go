package disk

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"unsafe"
)

const (
	front     = 2 << 20  // where formats keep what they are recognised by
	edge      = 16 << 20 // read in full at both ends
	spot      = 64 << 10 // read around every other offset of interest
	blockSize = 4096     // direct reads are aligned to it
	// Of a disk one block is read at random in each of as many strata, by a few
	// readers: a cloud disk answers one in about a millisecond, and a Premium one of
	// 20 GiB two thousand in a second.
	// Source: https://cloud.tencent.com/document/product/362/2353
	strata  = 1024
	readers = 16
	// All of a disk is read in large pieces, by as many readers as it takes for the
	// disk's throughput and not its latency to be the limit.
	piece       = 1 << 20
	fullReaders = 4
)

// sampleText says what inspect reads.
var sampleText = fmt.Sprintf("both ends, the places of superblocks and %d blocks all over it", strata)

// inspect reads the ends, the places of superblocks and a sample of a disk of size
// bytes. r is read by several at once.
func inspect(r io.ReaderAt, size int64) content {
	c := glance(r, size)
	if !c.Blank {
		return c
	}
	// Both at once: the one takes all of a disk's throughput, the other all of its
	// operations.
	results := make(chan content, 2)
	go func() { results <- scan(r, windows(size)) }()
	results <- sample(r, size)
	return first(results, 2)
}

// readAll reads every block of a disk, up to one that is not blank.
func readAll(r io.ReaderAt, size int64) content {
	var next atomic.Int64
	results := make(chan content, fullReaders)
	for range fullReaders {
		go func() {
			buf := aligned(piece)
			for at := (next.Add(1) - 1) * piece; at < size; at = (next.Add(1) - 1) * piece {
				b := buf[:min(piece, size-at)]
				if c := probe(r, b, at); !c.Blank {
					next.Store(size/piece + 1) // the others need not go on
					results <- c
					return
				}
			}
			results <- content{Blank: true}
		}()
	}
	return first(results, fullReaders)
}

// first returns of n results the one that is not blank, or the lowest of several.
func first(results <-chan content, n int) content {
	found := content{Blank: true}
	for range n {
		if c := <-results; !c.Blank && (found.Blank || c.at < found.at) {
			found = c
		}
	}
	return found
}

// glance reads what a disk is recognised by: its first and its last blocks. r has
// to fail rather than invent: any error, and any read that is short, makes the disk
// unreadable.
func glance(r io.ReaderAt, size int64) content {
	if size <= 0 { // as the kernel says of a disk that has failed
		return content{Unreadable: "it has no capacity"}
	}
	head := aligned(int(min(size, front)))
	if err := readFull(r, head, 0); err != nil {
		return content{Unreadable: err.Error()}
	}
	tailAt := max(0, size-spot)
	tail := aligned(int(size - tailAt))
	if err := readFull(r, tail, tailAt); err != nil {
		return content{Unreadable: err.Error()}
	}
	var c content
	c.Signatures, c.UUID, c.Label = identify(head, tail)
	if len(c.Signatures) > 0 {
		c.Member, c.Header = member(head), luks2(head)
		if c.Header != nil {
			c.Header.Alone = nonZero(tail) < 0 && scan(r, []span{{headerBytes, min(headerBytes+front, size)}}).Blank
		}
		return c
	}
	if i := nonZero(head); i >= 0 {
		return content{Evidence: evidence(head, i, 0)}
	}
	if i := nonZero(tail); i >= 0 {
		return content{Evidence: evidence(tail, i, tailAt)}
	}
	return content{Blank: true}
}

// scan reads spans of a disk, up to the first that is not blank.
func scan(r io.ReaderAt, spans []span) content {
	buf := aligned(1 << 20)
	for _, w := range spans {
		for from := w.from; from < w.to; from += int64(len(buf)) {
			if c := probe(r, buf[:min(int64(len(buf)), w.to-from)], from); !c.Blank {
				return c
			}
		}
	}
	return content{Blank: true}
}

// readable reads the ends of a disk, and the places of superblocks, whatever is there.
func readable(r io.ReaderAt, size int64) error {
	buf := aligned(piece)
	for _, w := range append([]span{{0, min(front, size)}}, windows(size)...) {
		for at := w.from; at < w.to; at += piece {
			if err := readFull(r, buf[:min(piece, w.to-at)], at); err != nil {
				return err
			}
		}
	}
	return nil
}

// probe reads b at an offset and says whether it is blank.
func probe(r io.ReaderAt, b []byte, at int64) content {
	if err := readFull(r, b, at); err != nil {
		return content{Unreadable: err.Error(), at: at}
	}
	if i := nonZero(b); i >= 0 {
		return content{Evidence: evidence(b, i, at), at: at + int64(i)}
	}
	return content{Blank: true}
}

// sample reads one random block in every stratum of the disk.
func sample(r io.ReaderAt, size int64) content {
	var next atomic.Int64
	results := make(chan content, readers)
	for range readers {
		go func() {
			b := aligned(blockSize)
			for i := next.Add(1) - 1; i < strata; i = next.Add(1) - 1 {
				at := i*(size/strata) + rand.Int64N(max(1, size/strata/blockSize))*blockSize
				at -= at % blockSize
				if c := probe(r, b[:min(blockSize, size-at)], at); !c.Blank {
					next.Store(strata) // the others need not go on
					results <- c
					return
				}
			}
			results <- content{Blank: true}
		}()
	}
	return first(results, readers)
}

var zeros = strings.Repeat("\x00", 1<<20)

// nonZero returns the index of the first byte that is not zero, or -1.
func nonZero(b []byte) int {
	for at := 0; at < len(b); at += len(zeros) {
		part := b[at:min(len(b), at+len(zeros))]
		// As strings: the race detector takes as long for each byte of two slices as a
		// disk does, and b is the one reader's own.
		if unsafe.String(unsafe.SliceData(part), len(part)) != zeros[:len(part)] {
			return at + slices.IndexFunc(part, func(c byte) bool { return c != 0 })
		}
	}
	return -1
}

func evidence(b []byte, i int, at int64) string {
	return fmt.Sprintf("non-zero bytes at %d: %s", at+int64(i), hex.EncodeToString(b[i:min(len(b), i+16)]))
}

// span is a range of bytes of a disk.
type span struct{ from, to int64 }

// windows lists, in order, what is read of a large disk besides its front and its
// sample: both ends, and every offset at which a known format keeps a superblock
// or a copy of it.
func windows(size int64) []span {
	if size <= front {
		return nil
	}
	all := []span{{front, min(edge, size)}, {max(front, size-edge), size}}
	add := func(at int64) {
		at -= at % blockSize
		if at >= front && at < size {
			all = append(all, span{at, min(at+spot, size)})
		}
	}
	for _, at := range superblocks(size) {
		add(at)
	}
	slices.SortFunc(all, func(a, b span) int { return int(min(max(a.from-b.from, -1), 1)) })
	merged := all[:1]
	for _, s := range all[1:] {
		if last := &merged[len(merged)-1]; s.from <= last.to {
			last.to = max(last.to, s.to)
		} else {
			merged = append(merged, s)
		}
	}
	for i := range merged {
		merged[i].from -= merged[i].from % blockSize // a size need not be a multiple of it
	}
	return merged
}

// superblocks returns offsets away from both ends at which a file system keeps a
// superblock or a copy of it.
func superblocks(size int64) []int64 {
	var at []int64
	// ext: copies in groups 1 and the powers of 3, 5 and 7; a group has 8 blocks
	// per byte of a block, and with 1 KiB blocks everything is one block later.
	// Source: linux Documentation/filesystems/ext4/blockgroup.rst, super.rst
	for _, block := range []int64{1 << 10, 2 << 10, 4 << 10, 64 << 10} {
		group := 8 * block * block
		at = append(at, group)
		for _, base := range []int64{3, 5, 7} {
			for n := base; n <= size/group; n *= base {
				at = append(at, n*group)
			}
		}
	}
	// btrfs: copies at 64 MiB, 256 GiB and 1 PiB.
	// Source: linux fs/btrfs/disk-io.h, btrfs_sb_offset
	at = append(at, 64<<20, 256<<30, 1<<50)
	// xfs: one a group; mkfs makes four of a small disk, and groups of 1 TiB at
	// most of a large one. Source: xfsprogs libxfs/topology.c, calc_default_ag_geometry
	for i := int64(1); i < 4; i++ {
		at = append(at, i*(size/4)-spot/2)
	}
	for n := int64(1); n <= size>>40; n++ {
		at = append(at, n<<40)
	}
	return at
}

func readFull(r io.ReaderAt, b []byte, at int64) error {
	n, err := r.ReadAt(b, at)
	if err == nil && n != len(b) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(b), at, err)
	}
	return nil
}

// aligned returns n bytes that direct I/O accepts.
func aligned(n int) []byte {
	b := make([]byte, n+blockSize)
	skip := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (blockSize - 1)
	return b[skip : skip+n : skip+n]
}

// signature is a magic value at a fixed offset; a negative one counts from the
// end. They only give a name to what is found: a disk without any is still
// foreign unless it is zero.
type signature struct {
	name  string
	at    int
	magic string
}

// Source: the formats' own documents, and util-linux libblkid/src/superblocks.
var signatures = []signature{
	{"LUKS", 0, "LUKS\xba\xbe"},
	{"LVM2 PV", 512 + 24, "LVM2 001"}, {"LVM2 PV", 24, "LVM2 001"},
	{"LVM2 PV", 1024 + 24, "LVM2 001"}, {"LVM2 PV", 1536 + 24, "LVM2 001"},
	{"md member", 0, "\xfc\x4e\x2b\xa9"}, {"md member", 4096, "\xfc\x4e\x2b\xa9"},
	{"btrfs", 64<<10 + 64, "_BHRfS_M"},
	{"swap", 4096 - 10, "SWAPSPACE2"}, {"swap", 4096 - 10, "SWAP-SPACE"},
	{"NTFS", 3, "NTFS    "}, {"exFAT", 3, "EXFAT   "},
	{"vfat", 82, "FAT32   "}, {"vfat", 54, "FAT16   "}, {"vfat", 54, "FAT12   "},
	{"f2fs", 1024, "\x10\x20\xf5\xf2"},
	{"squashfs", 0, "hsqs"}, {"erofs", 1024, "\xe2\xe1\xf5\xe0"},
	{"iso9660", 32<<10 + 1, "CD001"},
	{"bcache", 4096 + 24, "\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"},
	{"bluestore", 0, "bluestore block device\n"},
	{"gpt", 512, "EFI PART"}, {"gpt", 4096, "EFI PART"}, {"gpt backup", -512, "EFI PART"},
	{"VMFS", 1 << 20, "\x0d\xd0\x01\xc0"},
	{"ocfs2", 8192, "OCFSV2"}, {"gfs2", 64 << 10, "\x01\x16\x19\x70"},
	{"jfs", 32 << 10, "JFS1"}, {"reiserfs", 64<<10 + 52, "ReIsEr"},
}

// identify names what begins with head and ends with tail. uuid and label are
// set only if it is exactly one file system, ext2 to ext4 or xfs, in good order.
func identify(head, tail []byte) (found []string, uuid, label string) {
	for _, s := range signatures {
		b, at := head, s.at
		if at < 0 {
			b, at = tail, len(tail)+at
		}
		if at < 0 || at+len(s.magic) > len(b) || string(b[at:at+len(s.magic)]) != s.magic {
			continue
		}
		if !slices.Contains(found, s.name) {
			found = append(found, s.name)
		}
	}
	if mdAtEnd(tail) && !slices.Contains(found, "md member") {
		found = append(found, "md member")
	}
	if zfs(head) {
		found = append(found, "zfs member")
	}
	if name, u, l := ext(head); name != "" {
		found, uuid, label = append(found, name), u, l
	}
	if name, u, l := xfs(head); name != "" {
		found, uuid, label = append(found, name), u, l
	}
	if len(found) == 0 && len(head) >= 512 && head[510] == 0x55 && head[511] == 0xaa {
		found = append(found, "dos partition table or boot sector")
	}
	if len(found) != 1 {
		uuid, label = "", ""
	}
	return found, uuid, label
}

// ext recognises ext2, ext3 and ext4.
// Source: linux fs/ext4/ext4.h, struct ext4_super_block
func ext(head []byte) (name, uuid, label string) {
	if len(head) < 2048 {
		return "", "", ""
	}
	sb, le := head[1024:2048], binary.LittleEndian
	if le.Uint16(sb[0x38:]) != 0xef53 {
		return "", "", ""
	}
	const (
		compatJournal   = 0x4
		incompatExt4    = 0x40 | 0x80 | 0x200 // extents, 64bit, flex_bg
		roCompatCRC     = 0x400
		checksummedSize = 0x3fc
	)
	name = "ext2"
	switch {
	case le.Uint32(sb[0x60:])&incompatExt4 != 0:
		name = "ext4"
	case le.Uint32(sb[0x5c:])&compatJournal != 0:
		name = "ext3"
	}
	// The kernel stores the checksum without the final inversion.
	if le.Uint32(sb[0x64:])&roCompatCRC != 0 && ^castagnoli(sb[:checksummedSize]) != le.Uint32(sb[checksummedSize:]) {
		return "damaged " + name, "", ""
	}
	return name, formatUUID(sb[0x68:0x78]), text(sb[0x78:0x88])
}

// xfs recognises xfs.
// Source: linux fs/xfs/libxfs/xfs_format.h, struct xfs_dsb
func xfs(head []byte) (name, uuid, label string) {
	be := binary.BigEndian
	if len(head) < 4096 || string(head[:4]) != "XFSB" {
		return "", "", ""
	}
	sector := int(be.Uint16(head[102:]))
	if sector < 512 || sector > 4096 || head[126] != 0 { // the latter: mkfs did not finish
		return "damaged xfs", "", ""
	}
	if be.Uint16(head[100:])&0xf == 5 {
		sb := slices.Clone(head[:sector])
		sum := binary.LittleEndian.Uint32(sb[224:])
		clear(sb[224:228])
		if castagnoli(sb) != sum {
			return "damaged xfs", "", ""
		}
	}
	return "xfs", formatUUID(head[32:48]), text(head[108:120])
}

// mdAtEnd recognises md superblocks of versions 0.90 and 1.0, which stand at an
// offset from the end that depends on the size; one per 4 KiB is looked at.
func mdAtEnd(tail []byte) bool {
	for at := 0; at+4 <= len(tail); at += blockSize {
		if string(tail[at:at+4]) == "\xfc\x4e\x2b\xa9" {
			return true
		}
	}
	return false
}

// zfs recognises the uberblocks of the first vdev label, at 128 KiB, 1 KiB each.
func zfs(head []byte) bool {
	for at := 128 << 10; at+8 <= min(len(head), 256<<10); at += 1 << 10 {
		if m := head[at : at+8]; string(m) == "\x0c\xb1\xba\x00\x00\x00\x00\x00" || string(m) == "\x00\x00\x00\x00\x00\xba\xb1\x0c" {
			return true
		}
	}
	return false
}

func castagnoli(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

func formatUUID(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
