package images

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// The container images. The name is ours and no registry's: nothing is pulled.
const (
	Pause = node.PauseImage
	// Web is what the lab's pods run: a shell, the usual tools, and a web server on
	// port 8080 that serves /www.
	Web = "localhost/tkenode/web:1.0"
)

// containerImage says what is in an image and what it runs.
type containerImage struct {
	file      string   // of the archive
	component string   // the binary at /<component>
	debian    []string // programs from the node's own file system, with their libraries
	files     []ociFile
	config    ociConfig
}

// nobody runs what needs no privilege. 65535 is what the upstream images use.
const nobody = "65535:65535"

// containerImages are carried by the node image: their import is part of every
// first boot.
var containerImages = map[string]containerImage{
	Pause: {
		file: "pause.tar", component: "pause",
		config: ociConfig{User: nobody, Entrypoint: []string{"/pause"}},
	},
	Web: {
		file: "web.tar", debian: []string{"usr/bin/busybox"},
		files: append(busyboxLinks("sh", "cat", "date", "echo", "env", "hostname", "httpd", "id", "ip", "ls", "mount",
			"nc", "nslookup", "ping", "ps", "sleep", "stat", "touch", "wget", "dd", "df", "head", "tail", "grep", "sed",
			"kill", "test", "true", "false", "seq", "md5sum", "sync", "rm", "mkdir", "uname", "vi", "tar"),
			ociFile{path: "www/index.html", data: []byte("tkenode\n"), mode: 0o644},
			ociFile{path: "etc/passwd", data: []byte("root:x:0:0::/:/bin/sh\n"), mode: 0o644},
			ociFile{path: "tmp/.keep", mode: 0o644},
		),
		config: ociConfig{
			Entrypoint: []string{"/usr/bin/httpd", "-f", "-v", "-p", "8080", "-h", "/www"},
			Env:        []string{"PATH=/usr/bin:/bin"}, WorkingDir: "/",
			ExposedPorts: map[string]struct{}{"8080/tcp": {}},
		},
	},
}

func busyboxLinks(names ...string) []ociFile {
	links := []ociFile{{path: "bin", link: "usr/bin"}}
	for _, name := range names {
		links = append(links, ociFile{path: "usr/bin/" + name, link: "busybox"})
	}
	return links
}

// containerImages writes the OCI archives.
func (b *builder) containerImages(ctx context.Context, base string) error {
	for ref, image := range containerImages {
		if err := ctx.Err(); err != nil {
			return err
		}
		key := keyOf(recipe, ref, fmt.Sprintf("%+v", image), b.key(image.component))
		if image.debian != nil {
			key = keyOf(key, b.key(baseStep))
		}
		err := b.step(containerStep(ref), filepath.Join(b.ociDir(), image.file), key, func(tmp string) error {
			return b.containerImage(tmp, ref, image, base)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) containerImage(out, ref string, image containerImage, base string) error {
	files := slices.Clone(image.files)
	if image.component != "" {
		f, err := readFile(image.component, filepath.Join(b.binDir(), image.component))
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	if image.debian != nil {
		more, err := programs(base, image.debian)
		if err != nil {
			return err
		}
		files = append(files, more...)
	}
	w, err := os.Create(out)
	if err != nil {
		return err
	}
	defer w.Close()
	if err := writeOCI(w, ref, files, image.config); err != nil {
		return err
	}
	return w.Close()
}

// programs takes programs and the libraries they need out of a file system's tar.
func programs(base string, names []string) ([]ociFile, error) {
	tree, err := readTree(base)
	if err != nil {
		return nil, err
	}
	out, dynamic := map[string]ociFile{}, false
	for len(names) > 0 {
		name := names[0]
		names = names[1:]
		f, ok := tree[name]
		if !ok {
			return nil, fmt.Errorf("%s: no %s in it", base, name)
		}
		if _, ok := out[name]; ok {
			continue
		}
		out[name] = f
		if f.link != "" {
			names = append(names, target(name, f.link))
			continue
		}
		libraries, err := needed(f.data)
		if err != nil {
			return nil, fmt.Errorf("read libraries of %s: %w", name, err)
		}
		names = append(names, libraries...)
		dynamic = dynamic || len(libraries) > 0
	}
	if dynamic { // the loader is named by a path below /lib64
		for _, name := range []string{"lib", "lib64"} {
			out[name] = ociFile{path: name, link: "usr/" + name}
		}
	}
	var files []ociFile
	for _, f := range out {
		files = append(files, f)
	}
	return files, nil
}

// target is where a link at name leads to, in a tree whose /lib is /usr/lib.
func target(name, link string) string {
	to := link
	if !path.IsAbs(to) {
		to = path.Join("/", path.Dir(name), to)
	}
	return usr(strings.TrimPrefix(path.Clean(to), "/"))
}

// usr resolves the links of a merged /usr.
func usr(name string) string {
	for _, dir := range []string{"lib", "lib64", "bin", "sbin"} {
		if strings.HasPrefix(name, dir+"/") {
			return "usr/" + name
		}
	}
	return name
}

// needed are the paths of the libraries and of the loader that a program names.
func needed(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, name := range libraries {
		if !strings.HasPrefix(name, "ld-linux") {
			out = append(out, "usr/lib/x86_64-linux-gnu/"+name)
		}
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		loader, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
		if err != nil {
			return nil, err
		}
		out = append(out, usr(strings.Trim(string(loader), "/\x00")))
	}
	return out, nil
}

// readTree reads the programs, libraries and links of a file system's tar.
func readTree(base string) (map[string]ociFile, error) {
	f, err := os.Open(base)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	tree := map[string]ociFile{}
	for t := tar.NewReader(f); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return tree, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", base, err)
		}
		name := path.Clean(h.Name)
		if dir := path.Dir(name); dir != "usr/bin" && dir != "usr/sbin" && dir != "usr/lib64" && dir != "usr/lib/x86_64-linux-gnu" {
			continue
		}
		file := ociFile{path: name, link: h.Linkname}
		if h.Typeflag == tar.TypeReg {
			if file.data, err = io.ReadAll(t); err != nil {
				return nil, fmt.Errorf("read %s: %w", base, err)
			}
		}
		tree[name] = file
	}
}

func containerStep(ref string) string { return "container image " + ref }
