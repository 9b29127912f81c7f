package images

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"
)

// epoch is the time of everything in a container image, so that the same content
// gives the same digest.
var epoch = time.Unix(0, 0).UTC()

// ociFile is one file of a container image; directories above it come by
// themselves. Exactly one of data and link is set.
type ociFile struct {
	path string // without leading slash
	data []byte
	link string
	mode int64 // of data; default 0755
}

// ociConfig is the part of an image's configuration that we use.
// Source: https://github.com/opencontainers/image-spec/blob/v1.1.1/config.md
type ociConfig struct {
	User         string              `json:"User,omitempty"`
	ExposedPorts map[string]struct{} `json:"ExposedPorts,omitempty"`
	Env          []string            `json:"Env,omitempty"`
	Entrypoint   []string            `json:"Entrypoint,omitempty"`
	Cmd          []string            `json:"Cmd,omitempty"`
	WorkingDir   string              `json:"WorkingDir,omitempty"`
	StopSignal   string              `json:"StopSignal,omitempty"`
}

// descriptor names a blob.
// Source: https://github.com/opencontainers/image-spec/blob/v1.1.1/descriptor.md
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    *platform         `json:"platform,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

// writeOCI writes an image of one layer as an OCI archive: a tar of an image
// layout, as "ctr image import" and containerd's client read it. The layer is not
// compressed: the archive is read on the machine it is baked into, where
// unpacking would cost the launch more than reading.
//
// The format is a tar and four small JSON documents; a library for it would bring
// registry clients and credential helpers.
func writeOCI(w io.Writer, ref string, files []ociFile, config ociConfig) error {
	layer, err := ociLayer(files)
	if err != nil {
		return err
	}
	blobs := map[string][]byte{}
	blob := func(mediaType string, data []byte) descriptor {
		sum := sha256.Sum256(data)
		digest := hex.EncodeToString(sum[:])
		blobs["blobs/sha256/"+digest] = data
		return descriptor{MediaType: mediaType, Digest: "sha256:" + digest, Size: len(data)}
	}
	layerBlob := blob("application/vnd.oci.image.layer.v1.tar", layer)
	host := platform{Architecture: runtime.GOARCH, OS: "linux"}
	configBlob := blob("application/vnd.oci.image.config.v1+json", toJSON(map[string]any{
		"created":      epoch.Format(time.RFC3339),
		"architecture": host.Architecture,
		"os":           host.OS,
		"config":       config,
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{layerBlob.Digest}},
	}))
	manifest := blob("application/vnd.oci.image.manifest.v1+json", toJSON(map[string]any{
		"schemaVersion": 2,
		"mediaType":     "application/vnd.oci.image.manifest.v1+json",
		"config":        configBlob,
		"layers":        []descriptor{layerBlob},
	}))
	manifest.Platform = &host
	manifest.Annotations = map[string]string{
		"io.containerd.image.name":           ref, // what containerd calls it
		"org.opencontainers.image.ref.name":  ref[strings.LastIndexByte(ref, ':')+1:],
		"org.opencontainers.image.base.name": "scratch",
	}
	blobs["index.json"] = toJSON(map[string]any{
		"schemaVersion": 2,
		"mediaType":     "application/vnd.oci.image.index.v1+json",
		"manifests":     []descriptor{manifest},
	})
	blobs["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)

	var members []ociFile
	for name, data := range blobs {
		members = append(members, ociFile{path: name, data: data, mode: 0o644})
	}
	return writeTar(w, members)
}

// toJSON encodes what this file makes, which has no value that JSON lacks.
func toJSON(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

func ociLayer(files []ociFile) ([]byte, error) {
	var b bytes.Buffer
	err := writeTar(&b, files)
	return b.Bytes(), err
}

// writeTar writes files in the order of their paths, each directory before what
// is in it.
func writeTar(w io.Writer, files []ociFile) error {
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b ociFile) int { return strings.Compare(a.path, b.path) })
	t := tar.NewWriter(w)
	dirs := map[string]bool{".": true}
	for i, f := range files {
		if f.path != path.Clean(f.path) || path.IsAbs(f.path) || i > 0 && f.path == files[i-1].path {
			return fmt.Errorf("write tar: path %q twice or not clean", f.path)
		}
		if err := tarDirs(t, dirs, path.Dir(f.path)); err != nil {
			return err
		}
		h := &tar.Header{Name: f.path, Mode: f.mode, ModTime: epoch, Format: tar.FormatPAX, Typeflag: tar.TypeReg, Size: int64(len(f.data))}
		if f.mode == 0 {
			h.Mode = 0o755
		}
		if f.link != "" {
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		}
		if err := t.WriteHeader(h); err != nil {
			return fmt.Errorf("write tar: %w", err)
		}
		if _, err := t.Write(f.data); err != nil {
			return fmt.Errorf("write tar: %w", err)
		}
	}
	return t.Close()
}

func tarDirs(t *tar.Writer, done map[string]bool, dir string) error {
	if done[dir] {
		return nil
	}
	done[dir] = true
	if err := tarDirs(t, done, path.Dir(dir)); err != nil {
		return err
	}
	h := &tar.Header{Name: dir + "/", Mode: 0o755, ModTime: epoch, Format: tar.FormatPAX, Typeflag: tar.TypeDir}
	if path.Base(dir) == "tmp" {
		h.Mode = 0o1777
	}
	return t.WriteHeader(h)
}

// readFile adds a file of this machine.
func readFile(at, source string) (ociFile, error) {
	data, err := os.ReadFile(source)
	return ociFile{path: at, data: data}, err
}
