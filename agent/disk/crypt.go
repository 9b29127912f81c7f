package disk

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// headerBytes is what LUKS2 takes at the start of a device for its two headers and
// the key slots. Source: cryptsetup docs/on-disk-format-luks2.pdf, 1.3; it is what
// luksFormat takes by itself, and is told to it.
const headerBytes = 16 << 20

// header is what a LUKS2 header says of itself.
type header struct {
	UUID  string `json:"uuid"`
	Label string `json:"label"`
	// Alone says that a glance finds nothing on the device but the header: no file
	// system was ever made behind it.
	Alone bool `json:"alone,omitempty"`
}

// luks2 reads the binary header, or returns nil if it is none or damaged.
// Source: cryptsetup docs/on-disk-format-luks2.pdf, 2.1
func luks2(head []byte) *header {
	be := binary.BigEndian
	if len(head) < 4096 || string(head[:6]) != "LUKS\xba\xbe" || be.Uint16(head[6:]) != 2 {
		return nil
	}
	size := be.Uint64(head[8:])
	if size < 16<<10 || size > uint64(len(head)) || text(head[72:104]) != "sha256" {
		return nil
	}
	area := bytes.Clone(head[:size])
	clear(area[448:512])
	if sum := sha256.Sum256(area); !bytes.Equal(sum[:], head[448:480]) {
		return nil
	}
	return &header{UUID: text(head[168:208]), Label: text(head[24:72])}
}

// keyState is what is known of a key without its being read.
type keyState struct {
	// Problem says why it cannot be used; empty: it can.
	Problem string `json:"problem,omitempty"`
	Fix     string `json:"fix,omitempty"`
	// New says that there is none yet: it is made for the first disk that is formatted.
	New bool `json:"new,omitempty"`
	// Wrong is the UUID of the header that it was found not to open.
	Wrong string `json:"wrong,omitempty"`
	// Where is its file.
	Where string `json:"where,omitempty"`
}

func (k keyState) wrong(dev device, h header) error {
	return node.Terminal("WrongKey", fmt.Sprintf("bring back %s as it was when the disk was formatted; nothing was touched", k.Where),
		fmt.Errorf("the key does not open %s (LUKS2 uuid %s)", dev, h.UUID))
}

// fromHeader decides by what the device holds that is to be encrypted.
func fromHeader(want node.DiskConfig, at place, past entry, have observed) ([]step, error) {
	dev, c := at.dev(), have.Content
	if err := lasting(dev, c); err != nil {
		return nil, err
	}
	if have.Key.Problem != "" {
		return nil, node.Terminal("KeyUnusable", have.Key.Fix, fmt.Errorf("the key of %s: %s; nothing was touched", dev, have.Key.Problem))
	}
	h := c.Header
	ours := h != nil && (past.Crypt == h.UUID || past.State == "" && h.Label == label(dev.Serial)) && len(dev.Partitions) == 0
	switch {
	case have.decided(actFormat, dev):
		return fresh(want, at, have)
	case c.Unreadable != "":
		return nil, unreadable(dev, c)
	case c.Blank && past.State == stateFormatted:
		return nil, blanked(past, dev.String()+" reads as blank", "if its data may be lost, type: "+command(actFormat, dev))
	case c.Blank && len(dev.Partitions) == 0, ours && past.State == stateFormatting && h.Alone:
		return fresh(want, at, have)
	case ours && past.State == "" && otherCluster(h.UUID, have.Cluster):
		return nil, node.Terminal("OtherCluster", "attach another disk; or, once you have saved what you need of it, type: "+command(actFormat, dev),
			fmt.Errorf("%s holds tkenode's LUKS2 (uuid %s), made on a node of another cluster", dev, h.UUID))
	case ours && have.Key.New:
		return nil, node.Terminal("KeyLost", fmt.Sprintf("bring back /var/lib/tkenode/disk/%s.key from the system disk that it was formatted under; or, if its data may be lost, type: %s", dev.Serial, command(actFormat, dev)),
			fmt.Errorf("%s is encrypted with a key that was on a system disk which is no more", dev))
	case ours && have.Key.Wrong == h.UUID:
		return nil, have.Key.wrong(dev, *h)
	case ours:
		return thence(want, at.left, past, dev.Serial), nil
	case past.State == stateFormatting:
		return nil, interrupted(dev, c, past)
	}
	return nil, foreign(dev, c)
}

// uuidOf returns the UUID in the name that cryptsetup gives a mapping's uuid:
// CRYPT-LUKS2-<32 digits>-<name>.
func uuidOf(dm string) string {
	f := strings.SplitN(dm, "-", 4)
	if len(f) != 4 || f[0] != "CRYPT" || f[1] != "LUKS2" || len(f[2]) != 32 {
		return ""
	}
	u := f[2]
	return strings.Join([]string{u[:8], u[8:12], u[12:16], u[16:20], u[20:]}, "-")
}
