package node

// A seed is a tar of what containerd's root holds once the images of the node
// image are imported and unpacked. SeedIndex is the name of its first file, a
// SeedContents as JSON; all others are below the directories SeedDirs.
const SeedIndex = "seed.json"

// SeedContents says what is in a seed.
type SeedContents struct {
	Images []string `json:"images"` // their names
	Files  int      `json:"files"`  // entries of the tar, without the index
	Bytes  int64    `json:"bytes"`  // of all files
}

// SeedDirs are the directories in containerd's root that a seed fills: contents,
// snapshots, and last the database of both, by which containerd knows them.
// Source: containerd plugins/types.go, core/metadata/plugin
var SeedDirs = [...]string{
	"io.containerd.content.v1.content",
	"io.containerd.snapshotter.v1.overlayfs",
	"io.containerd.metadata.v1.bolt",
}
