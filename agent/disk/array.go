package disk

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

const (
	chunkBytes = 512 << 10 // what mdadm takes, too; large enough for one request of the page cache's read-ahead
	// superAt and dataAt are where version 1.2 of md keeps its superblock, and where
	// the data of a member of ours begins. Source: linux Documentation/driver-api/md,
	// include/uapi/linux/raid/md_p.h
	superAt = 4 << 10
	dataAt  = 1 << 20
)

// superblock is what a disk says of the array that it is a member of.
type superblock struct {
	UUID       string `json:"uuid"`
	Name       string `json:"name"`
	Level      int32  `json:"level"`
	ChunkBytes int64  `json:"chunkBytes"`
	Disks      int    `json:"disks"`
	Role       int    `json:"role"` // place in the array, from 0
	DataAt     int64  `json:"dataAt"`
	DataBytes  int64  `json:"dataBytes"`
}

// madeArray is what the ledger knows of an array.
type madeArray struct {
	UUID       string   `json:"uuid"`
	Members    []string `json:"members"` // ids, in order
	ChunkBytes int64    `json:"chunkBytes"`
}

// arrayName marks an array as made of these disks in this order. md allows 32 bytes.
func arrayName(ids []string) string {
	sum := sha256.Sum256([]byte(strings.Join(ids, " ")))
	return "tke-" + hex.EncodeToString(sum[:12])
}

// member reads md's superblock of version 1.2, or returns nil.
// Source: linux include/uapi/linux/raid/md_p.h, struct mdp_superblock_1
func member(head []byte) *superblock {
	le := binary.LittleEndian
	if len(head) < superAt+4096 {
		return nil
	}
	sb := head[superAt : superAt+4096]
	most := int(le.Uint32(sb[220:]))
	if le.Uint32(sb) != 0xa92b4efc || le.Uint32(sb[4:]) != 1 || most > 384 || le.Uint64(sb[144:]) != superAt/512 {
		return nil
	}
	if sumOf(sb[:256+2*most]) != le.Uint32(sb[216:]) {
		return nil // damaged
	}
	at := int(le.Uint32(sb[160:]))
	role := -1
	if at < most {
		role = int(le.Uint16(sb[256+2*at:]))
	}
	name, _, _ := bytes.Cut(sb[32:64], []byte{0})
	return &superblock{
		UUID: formatUUID(sb[16:32]), Name: string(name), Level: int32(le.Uint32(sb[72:])),
		ChunkBytes: int64(le.Uint32(sb[88:])) * 512, Disks: int(le.Uint32(sb[92:])), Role: role,
		DataAt: int64(le.Uint64(sb[128:])) * 512, DataBytes: int64(le.Uint64(sb[136:])) * 512,
	}
}

// sumOf is md's checksum: of little-endian words, the place of the sum as zero.
func sumOf(sb []byte) uint32 {
	var sum uint64
	for i := 0; i+4 <= len(sb); i += 4 {
		if i != 216 {
			sum += uint64(binary.LittleEndian.Uint32(sb[i:]))
		}
	}
	if rest := len(sb) % 4; rest == 2 {
		sum += uint64(binary.LittleEndian.Uint16(sb[len(sb)-2:]))
	}
	return uint32(sum) + uint32(sum>>32)
}

// is reports whether s stands on disk i of the array that want means: the one in the
// ledger, or where that knows none, one that carries our mark.
func (s *superblock) is(i int, want node.DiskConfig, past entry, dev device) bool {
	if s == nil || s.Level != 0 || s.Role != i || s.Disks != len(want.DiskIDs) || s.DataAt < superAt+4096 || s.DataAt+s.DataBytes > dev.SizeBytes {
		return false
	}
	if past.Array != nil {
		return s.UUID == past.Array.UUID && s.ChunkBytes == past.Array.ChunkBytes
	}
	return s.Name == arrayName(want.DiskIDs)
}

// fromMembers decides by what each disk of a stripe holds. It returns nothing if the
// array is up and all is well.
func fromMembers(want node.DiskConfig, at place, past entry, have observed) ([]step, error) {
	var ours, blank, stuck []device // stuck: no array may be made of it
	var reading []string
	uuid, down, hung := "", at.next() == array, false
	for i, dev := range at.disks {
		c := have.Members[dev.Serial]
		if err := lasting(dev, c); err != nil && c.Proving == "" {
			return nil, err
		}
		switch {
		case c.Proving != "":
			reading, hung = append(reading, c.Proving), hung || c.Hung
		case down && have.decided(actFormat, dev):
		case c.Unreadable != "":
			return nil, unreadable(dev, c)
		case c.Member.is(i, want, past, dev) && (uuid == "" || uuid == c.Member.UUID):
			ours, uuid = append(ours, dev), c.Member.UUID
			if past.State != stateFormatting {
				stuck = append(stuck, dev)
			}
		case c.Blank && len(dev.Partitions) == 0:
			blank = append(blank, dev)
			if have.Ledger[dev.Serial].State == stateFormatted {
				stuck = append(stuck, dev)
			}
		default:
			return nil, stray(want, i, dev, c)
		}
	}
	switch {
	case len(reading) > 0:
		return nil, node.Waiting(proving(hung), "%s", strings.Join(reading, "; "))
	case len(ours) == len(at.disks) && past.State == "" && otherCluster(uuid, have.Cluster):
		return nil, node.Terminal("OtherCluster", "attach other disks; or, once you have saved what you need of them, type: "+commands(actFormat, ours),
			fmt.Errorf("%s are tkenode's array %s, made on a node of another cluster", names(ours), uuid))
	case len(ours) == len(at.disks) && (down || at.up[0].State == "readonly"):
		id := at.disks[0].Serial
		return append([]step{{verb: assemble, text: fmt.Sprintf("assemble %s (array %s)", list(want.DiskIDs), uuid)}}, thence(want, at.left, past, id)...), nil
	case len(ours) == len(at.disks):
		return nil, nil
	case !down:
		return nil, node.Terminal("InUse", "stop that array", fmt.Errorf("%s are in the array /dev/%s, which is not tkenode's", names(at.disks), at.dev().Name))
	case len(stuck) == 0:
		return fresh(want, at, have)
	case len(ours) == 0:
		return nil, blanked(past, names(blank)+" read as blank", "if the data may be lost, type: "+commands(actFormat, stuck))
	}
	return nil, node.Terminal("Lost", "attach the disks that belong to it; or, if its data may be lost, type: "+commands(actFormat, stuck),
		fmt.Errorf("of the array %s only %s are left, and %s", uuid, names(ours), cmp.Or(blankOnes(blank), "the others are to be erased")))
}

// stray says what a disk holds that is wanted for a stripe and not of it.
func stray(want node.DiskConfig, i int, dev device, c content) error {
	return node.Terminal("Foreign", "attach the disk that belongs there; or, once you have saved what you need of this one, type: "+command(actFormat, dev),
		fmt.Errorf("%s is to be disk %d of the stripe for %s, and holds %s; nothing was written", dev, i, want.MountPoint, c))
}

func blankOnes(blank []device) string {
	if len(blank) == 0 {
		return ""
	}
	return names(blank) + " read as blank"
}

func commands(act string, devs []device) string {
	var all []string
	for _, d := range devs {
		all = append(all, command(act, d))
	}
	return strings.Join(all, "; ")
}
