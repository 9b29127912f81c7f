package disk

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// CSIDriver is the name of Tencent's CSI driver for CBS disks.
// Source: https://github.com/TencentCloud/kubernetes-csi-tencentcloud, driver/cbs
const CSIDriver = "com.tencent.cloud.csi.cbs"

const (
	kubeletDir = "/var/lib/kubelet"
	// volumesDir is where kubelet has a CSI driver mount a volume, once for the node:
	// below it, <driver>/<hash>/globalmount, where hash is the SHA-256 of the volume's
	// handle, and beside it vol_data.json. The handle of a CBS volume is the disk's id.
	// Source: k8s.io/kubernetes v1.36.3 pkg/volume/csi/csi_attacher.go, makeDeviceMountPath
	volumesDir   = kubeletDir + "/plugins/kubernetes.io/csi/"
	globalMount  = "/globalmount"
	volumeData   = "vol_data.json"
	maxData      = 64 << 10
	othersPeriod = time.Minute
	othersSoon   = 10 * time.Second // after a device has come: it is mounted a little later
)

// Other is a CBS disk that is attached and not of the NodeConfig. It is watched and
// never touched.
type Other struct {
	DiskID    string `json:"diskID"`
	Device    string `json:"device"`
	SizeBytes int64  `json:"sizeBytes"`
	CSI       bool   `json:"csi"`              // the CSI driver has mounted it
	Mount     string `json:"mount,omitempty"`  // where it was mounted first
	Pods      int    `json:"pods"`             // that have it mounted
	Volume    string `json:"volume,omitempty"` // that Mount is for; empty: not known
	// Mismatch says that pods which should have another volume have this disk.
	Mismatch string    `json:"mismatch,omitempty"`
	Since    time.Time `json:"mismatchSince,omitzero"`
}

// Others watches the attached disks that are not of the NodeConfig.
type Others struct {
	ours func() []State
	sys  string
	log  *slog.Logger

	mu      sync.Mutex // guards the rest
	last    []Other
	known   bool
	changed chan struct{} // closed and replaced when last is another
}

// NewOthers returns what watches all attached disks but ours.
func NewOthers(ours func() []State, log *slog.Logger) *Others {
	return &Others{ours: ours, sys: "/sys", log: log, changed: make(chan struct{})}
}

// All returns the disks as they were seen last, a channel that is closed once they
// are seen to be others, and whether they were seen at all.
func (o *Others) All() ([]Other, <-chan struct{}, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.last), o.changed, o.known
}

// Warnings returns what is wrong with them.
func (o *Others) Warnings() []node.Condition {
	all, _, _ := o.All()
	c := node.Condition{Type: node.VolumeMismatch, Status: node.True, Reason: "WrongDisk"}
	for _, d := range all {
		if d.Mismatch != "" {
			c.Message += "; " + d.Mismatch
			if c.Since.IsZero() || d.Since.Before(c.Since) {
				c.Since = d.Since
			}
		}
	}
	if c.Message == "" {
		return nil
	}
	c.Message = c.Message[2:]
	return []node.Condition{c}
}

// Run watches until ctx ends.
func (o *Others) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := o.watch(ctx); err != nil && ctx.Err() == nil {
			o.log.Warn("disks that are not of the NodeConfig are not seen", "err", err)
			sleepUntil(ctx, time.Now().Add(othersPeriod), nil)
		}
	}
}

// set takes in what was seen.
func (o *Others) set(now []Other) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for i := range now {
		d := &now[i]
		if d.Mismatch == "" {
			continue
		}
		before := slices.IndexFunc(o.last, func(x Other) bool { return x.DiskID == d.DiskID && x.Mismatch == d.Mismatch })
		if before >= 0 {
			d.Since = o.last[before].Since
			continue
		}
		d.Since = time.Now()
		o.log.Warn("a pod's volume is another disk", "disk", d.DiskID, "message", d.Mismatch)
	}
	if o.known && slices.Equal(o.last, now) {
		return
	}
	o.last, o.known = now, true
	close(o.changed)
	o.changed = make(chan struct{})
}

// others judges the machine: every CBS disk that is not ours, and one of ours only
// if it stands where a volume should. data holds what vol_data.json says, by mount.
func others(ours []string, have observed, data map[string]string) []Other {
	all := []Other{}
	for _, dev := range have.Devices {
		if !diskID.MatchString(dev.Serial) || have.holdsRoot(dev) {
			continue
		}
		o := Other{DiskID: dev.Serial, Device: "/dev/" + dev.Name, SizeBytes: dev.SizeBytes}
		for _, m := range have.Mounts {
			if !dev.owns(m.Dev) {
				continue
			}
			dir, global := strings.CutSuffix(m.Target, globalMount)
			ofCSI := global && strings.HasPrefix(dir, volumesDir)
			switch {
			case ofCSI:
				o.CSI, o.Mount = true, m.Target
				o.Volume = volumeOf(dir, data[m.Target], have.Devices)
				if o.Volume != "" && o.Volume != dev.Serial {
					o.Mismatch = fmt.Sprintf("%s is the volume %s and has %s mounted, whose live serial is %s: its pods read and write another volume's data; "+
						"stop them, and detach both disks before they are used again", m.Target, o.Volume, o.Device, dev.Serial)
				}
			case strings.HasPrefix(m.Target, kubeletDir+"/pods/"):
				o.Pods++
				o.CSI = o.CSI || strings.Contains(m.Target, "/kubernetes.io~csi/")
			case o.Mount == "":
				o.Mount = m.Target
			}
		}
		if !slices.Contains(ours, dev.Serial) || o.Mismatch != "" {
			all = append(all, o)
		}
	}
	slices.SortFunc(all, func(a, b Other) int { return strings.Compare(a.DiskID, b.DiskID) })
	return all
}

// volumeOf tells which volume a directory of kubelet's is for: by what kubelet has
// written beside it, or by its name if that is the hash of a disk that is here.
func volumeOf(dir, handle string, devices []device) string {
	hash := path.Base(dir)
	if handle != "" {
		return handle
	}
	for _, d := range devices {
		if sum := sha256.Sum256([]byte(d.Serial)); hex.EncodeToString(sum[:]) == hash {
			return d.Serial
		}
	}
	return ""
}

// parseVolume reads a volume's handle out of vol_data.json.
// Source: k8s.io/kubernetes v1.36.3 pkg/volume/csi/csi_mounter.go, volDataKey
func parseVolume(text []byte) string {
	var v struct {
		Driver string `json:"driverName"`
		Handle string `json:"volumeHandle"`
	}
	if json.Unmarshal(text, &v) != nil || v.Driver != CSIDriver || !diskID.MatchString(v.Handle) {
		return ""
	}
	return v.Handle
}

// NotCSI returns the ids of the disks that take a place of the instance's and are
// not the CSI driver's: those of the NodeConfig, attached or not, and those that
// somebody has attached by hand. volumes are the disks that the cluster has
// attached, whether they are mounted yet or not.
func NotCSI(ours []State, all []Other, volumes []string) []string {
	ids := []string{}
	for _, s := range ours {
		if s.DiskID == "" {
			ids = append(ids, s.Name) // it will be attached
		}
		ids = append(ids, s.IDs()...)
	}
	for _, o := range all {
		if !o.CSI && !slices.Contains(volumes, o.DiskID) {
			ids = append(ids, o.DiskID)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}
