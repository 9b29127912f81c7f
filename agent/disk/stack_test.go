package disk

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"io"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/node"
)

// The first 8 KiB of the second disk of an array that mdadm 4.2 made, and the first
// 16 KiB of a disk that cryptsetup 2.6.1 encrypted, as makeArray and makeCrypt run them.
const (
	mdHead = `
H4sIAAAAAAACA2NgGAWjYBSMglEwCkbBKBgFo2AUjIJRMApGwXAHf/y0VzIi8ddO3yZ0eE/P8p6v51advGRWXJKdqptmYGqQZGCUamGSYp5onp
ZkaGlumpqaagBS79zOlQ3Ti2wOAwsDAzMxDuCA0j/kUbjoZj6JrfTPnbZxvtWyHWWrpzwJB6nkQLMfBP5DQXvL2usNRIUAIwMTXNfIA6M5YBSM
glEwCkbBKBgFo2AUjIJRMApGBgAA0o2oLQAgAAA=`
	luksHead = `
H4sIAAAAAAACA+3Yz2vTYBgH8Kh4EUQYImMneQ9e1rIkS9+kgw1t7YrtZrfWuonIeJu8TdN0SdY37ZbVXgRvusMQ3EVRUDwMhF08eFD8gYKwi6
J42lUY/hG+qXWrG+LO+nwOJe/v7/OGXDpRzBaevxAOCx1nha4jvk2jhnBwrELkGP7z+JvHuRNj4w8/H1oJNo6Ro6fu9gm1zf5XuVuFr1+e5r17
scG4Ozuw1Xej+lK/ozubjdup0/jj65Z58vr3dzc/NESslSS1RKKiiEtRTVSVqCaLUlSnhOhxQx7G6rDwH2q+X1tf619fIQPbW8cLZ761Pz15O7
a68WB1+dmj+8kLawIAAAAAAAAAAMC1kE0DVnN9hkZaSAx//MCjaATVGjaTUSQcn2PWMu/CSgSR8p4pEp/C/LrlUb6DIopiBFUIq/DRn38JoDZf
VKekZ1mdLPJFbrnMqM+bw7KKtXCXziFIjmmiErapo9cDz7dch/cSyqJLPot6NWI5WNmTi59hG73JvBJvh+l/zxJBlk/rJNyTp5U6aRmphSkyV0
i8ZF6eSSab05liuTE7FUsNyYGZ8XIzWS3ZXKjYC4XM9BRZVkZRu81P9F2bhtu0+DOj5jx19l9ip4LeYiWsqqos4d16jcAh85YeZmvO+YuU2LxT
/Hv9jOq+W+9egSLGcZjJsEzK9sfYuY7dl32VT7jWG7zbceALq2cTtfRFqVgZMgpmJjHvWnpAc2r1Eh4sl/SUV5WxmtZYPs8mR9GvZOH7TSiaeK
7oVppWLLs0mArSRjPhL/nnxYyVtQsTE2mnmLfHcSw3GV50BOmuU7bMsJoqc51uwUiSZU3rqWinH6sKp/Gl8HUDAAAAAAAAAAAAAAAAAAAAAAAA
AAAAAAAAAAD+JT8AKdxrmwBAAAA=`
)

func unpack(t *testing.T, text string, size int) []byte {
	t.Helper()
	z, err := gzip.NewReader(base64.NewDecoder(base64.StdEncoding, strings.NewReader(strings.ReplaceAll(text, "\n", ""))))
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return append(b, make([]byte, size-len(b))...)
}

func TestSuperblock(t *testing.T) {
	head := unpack(t, mdHead, front)
	ids := []string{"disk-a", "disk-b", "disk-c"}
	want := superblock{
		UUID: "ad97b612-c3bc-8ca7-8cf5-ceaac9d23673", Name: arrayName(ids), ChunkBytes: chunkBytes,
		Disks: 3, Role: 1, DataAt: dataAt, DataBytes: 1<<30 - dataAt,
	}
	got := member(head)
	if got == nil || *got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	if names, _, _ := identify(head, make([]byte, spot)); len(names) != 1 || names[0] != "md member" {
		t.Errorf("identified as %v", names)
	}
	config, dev := node.DiskConfig{DiskIDs: ids}, device{SizeBytes: 1 << 30}
	if !got.is(1, config, entry{}, dev) || got.is(0, config, entry{}, dev) {
		t.Error("it does not stand on disk 1 alone")
	}
	if got.is(1, config, entry{}, device{SizeBytes: 1<<30 - 1}) {
		t.Error("it stands on a disk that is too small")
	}
	if got.is(1, node.DiskConfig{DiskIDs: []string{"disk-c", "disk-b", "disk-a"}}, entry{}, dev) {
		t.Error("it stands in another stripe")
	}
	// Every byte of it counts.
	for i := superAt; i < superAt+256; i++ {
		damaged := bytes.Clone(head)
		damaged[i] ^= 0x10
		if m := member(damaged); m != nil {
			t.Errorf("with byte %d changed it is %+v", i-superAt, m)
		}
	}
}

func TestHeader(t *testing.T) {
	head := unpack(t, luksHead, front)
	want := header{UUID: "068b17ba-006b-8074-8201-ceaac9d23673", Label: "tke-d"}
	if got := luks2(head); got == nil || *got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
	for _, i := range []int{0, 7, 24, 168, 448, 4096, 16383} {
		damaged := bytes.Clone(head)
		damaged[i] ^= 1
		if h := luks2(damaged); h != nil {
			t.Errorf("with byte %d changed it is %+v", i, h)
		}
	}
	for name, poked := range map[string]int64{"alone": -1, "data": headerBytes + 5, "end": 64<<20 - 1} {
		disk := make([]byte, 64<<20)
		copy(disk, head)
		if poked >= 0 {
			disk[poked] = 1
		}
		if c := glance(bytes.NewReader(disk), int64(len(disk))); c.Header == nil || c.Header.Alone != (poked < 0) {
			t.Errorf("%s: %+v", name, c.Header)
		}
	}
}

// TestMasked: what is ours reads as zero, and nothing else does.
func TestMasked(t *testing.T) {
	disk := bytes.Repeat([]byte{7}, 64)
	for _, r := range []struct{ at, n int }{{0, 64}, {0, 10}, {0, 11}, {12, 4}, {15, 20}, {20, 8}, {60, 4}} {
		b := make([]byte, r.n)
		if _, err := (masked{bytes.NewReader(disk), span{10, 20}}).ReadAt(b, int64(r.at)); err != nil {
			t.Fatal(err)
		}
		for i, c := range b {
			if own := r.at+i >= 10 && r.at+i < 20; (c == 0) != own {
				t.Errorf("read %d at %d: byte %d is %d", r.n, r.at, r.at+i, c)
			}
		}
	}
}

// TestOwn: only what was cut off is taken for blank, and only by its UUID.
func TestOwn(t *testing.T) {
	past := entry{State: stateFormatting, Array: &madeArray{UUID: "u"}, Crypt: "v"}
	done := past
	done.State = stateFormatted
	ours := content{Member: &superblock{UUID: "u", DataAt: dataAt}}
	sealed := content{Header: &header{UUID: "v"}}
	for name, c := range map[string]struct {
		found content
		past  entry
		want  span
	}{
		"member":        {ours, past, span{superAt, dataAt}},
		"header":        {sealed, past, span{0, headerBytes}},
		"finished":      {ours, done, span{}},
		"finished too":  {sealed, done, span{}},
		"never seen":    {ours, entry{}, span{}},
		"another array": {content{Member: &superblock{UUID: "x", DataAt: dataAt}}, past, span{}},
		"more data":     {content{Member: &superblock{UUID: "u", DataAt: 1 << 30}}, past, span{}},
		"other header":  {content{Header: &header{UUID: "x"}}, past, span{}},
		"blank":         {content{Blank: true}, past, span{}},
	} {
		if got := c.found.own(c.past); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// TestOnlyProvenDisksLeadToAStripe tries every combination of what two disks can hold,
// the ledger can know, and an operator can have decided.
func TestOnlyProvenDisksLeadToAStripe(t *testing.T) {
	ids := []string{"disk-a", "disk-b"}
	want := node.DiskConfig{DiskIDs: ids, FileSystem: node.Ext4, MountPoint: "/data"}
	made := &madeArray{UUID: "6c1f3ab8-0d0a-8bdc-8a3e-0123456789ab", Members: ids, ChunkBytes: chunkBytes}
	dev := func(i int) device {
		return device{Name: "vd" + string(rune('b'+i)), Dev: "253:16", Serial: ids[i], SizeBytes: 1 << 30}
	}
	holds := []struct {
		name string
		c    func(i int) content
	}{
		{"blank", func(int) content { return content{Blank: true} }},
		{"ours", func(i int) content {
			return content{Signatures: []string{"md member"}, Member: &superblock{UUID: made.UUID, Name: arrayName(ids), ChunkBytes: chunkBytes, Disks: 2, Role: i, DataAt: dataAt, DataBytes: 1<<30 - dataAt}}
		}},
		{"foreign", func(int) content { return content{Signatures: []string{"xfs"}, UUID: "u"} }},
		{"unreadable", func(int) content { return content{Unreadable: "EIO"} }},
		{"busy", func(int) content { return content{Busy: true} }},
	}
	formats := 0
	for _, state := range []string{"", stateFormatting, stateFormatted} {
		for a := range holds {
			for b := range holds {
				for decided := range 1 << 2 {
					have := observed{Devices: []device{dev(0), dev(1)}, Members: map[string]content{}, Decisions: map[string]*decision{}}
					allowed := true
					for i, h := range []int{a, b} {
						have.Members[ids[i]] = holds[h].c(i)
						ok := holds[h].name == "blank" && state != stateFormatted || holds[h].name == "ours" && state == stateFormatting
						if decided>>i&1 == 1 {
							have.Decisions[ids[i]] = &decision{Act: actFormat, DiskID: ids[i], SizeBytes: 1 << 30}
							ok = holds[h].name != "busy"
						}
						allowed = allowed && ok
					}
					if state != "" {
						e := entry{DiskID: ids[0], MountPoint: "/data", State: state, UUID: made.UUID, Array: made}
						have.Ledger = map[string]entry{ids[0]: e, ids[1]: e}
					}
					steps, err := decide(want, have)
					if len(steps) == 0 || steps[0].verb != format {
						continue
					}
					formats++
					// Two disks that are ours are an array: it is not made again.
					if err != nil || !allowed || a == 1 && b == 1 && decided == 0 {
						t.Errorf("format: ledger %q, disks %s and %s, decided %02b, %v", state, holds[a].name, holds[b].name, decided, err)
					}
				}
			}
		}
	}
	if formats == 0 {
		t.Error("nothing was ever formatted")
	}
}
