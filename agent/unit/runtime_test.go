package unit

import (
	"archive/tar"
	"bytes"
	"context"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// TestProbe asks a real gRPC server, first one without and then one with a CRI.
func TestProbe(t *testing.T) {
	methods := make(chan string, 10)
	cri := false
	socket := filepath.Join(t.TempDir(), "c.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(s)
		methods <- method
		if !cri {
			return status.Error(codes.Unimplemented, "unknown service runtime.v1.RuntimeService")
		}
		if err := s.RecvMsg(&emptypb.Empty{}); err != nil {
			return err
		}
		// As a VersionResponse is: fields that the caller does not know.
		reply := &emptypb.Empty{}
		reply.ProtoReflect().SetUnknown([]byte("\x0a\x050.1.0\x12\x0acontainerd"))
		return s.SendMsg(reply)
	}))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	defer func() { srv.Stop(); <-done }()
	rt, err := dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := rt.probe(ctx); status.Code(err) != codes.Unimplemented {
		t.Errorf("without a CRI: %v", err)
	}
	if m := <-methods; m != "/runtime.v1.RuntimeService/Version" {
		t.Errorf("asked for %s", m)
	}
	cri = true
	if err := rt.probe(ctx); err != nil {
		t.Error(err)
	}
}

func TestProbeOfNobody(t *testing.T) {
	rt, err := dial(filepath.Join(t.TempDir(), "nobody.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer rt.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	started := time.Now()
	if err := rt.probe(ctx); err == nil || time.Since(started) > 30*time.Second {
		t.Errorf("%v after %s", err, time.Since(started))
	}
}

func tarball(t *testing.T, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		if err := w.WriteHeader(&tar.Header{Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(files[i+1])); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

const index = `{"schemaVersion":2,"manifests":[
 {"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:aa","size":1,"annotations":{"io.containerd.image.name":"localhost/tkenode/pause:v1","org.opencontainers.image.ref.name":"v1"}},
 {"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:bb","size":1,"annotations":{"org.opencontainers.image.ref.name":"localhost/tkenode/coredns:v1"}}]}`

func TestArchives(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	whole := tarball(t, "oci-layout", `{"imageLayoutVersion":"1.0.0"}`, "./index.json", index)
	write("a.tar", whole)
	write("README", []byte("not an archive"))
	write(".a.tar", []byte("half written"))
	got, err := archives(dir)
	want := []archive{
		{filepath.Join(dir, "a.tar"), int64(len(whole)), "localhost/tkenode/pause:v1", "sha256:aa"},
		{filepath.Join(dir, "a.tar"), int64(len(whole)), "localhost/tkenode/coredns:v1", "sha256:bb"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	write("b.tar", tarball(t, "index.json", `{"manifests":[{"digest":"sha256:cc","annotations":{"org.opencontainers.image.ref.name":"small"}}]}`))
	if got, err := archives(dir); err != nil || len(got) != 3 || got[0].Name != "small" {
		t.Errorf("the smallest is not the first: %+v, %v", got, err)
	}
	for name, bad := range map[string][]byte{
		"no index":  tarball(t, "oci-layout", "{}"),
		"cut off":   whole[:1000],
		"no name":   tarball(t, "index.json", `{"manifests":[{"digest":"sha256:aa"}]}`),
		"not JSON":  tarball(t, "index.json", "manifests"),
		"not a tar": []byte("hello"),
	} {
		write("b.tar", bad)
		if got, err := archives(dir); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got, err := archives(filepath.Join(dir, "nothing")); err != nil || len(got) != 0 {
		t.Errorf("no directory: %v, %v", got, err)
	}
}
