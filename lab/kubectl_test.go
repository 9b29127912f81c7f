//go:build node

package lab

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// testKubectl wants what goes from the API server to a kubelet: logs, exec and
// port-forward of the pod "web".
func testKubectl(t *testing.T, l *Lab) {
	kubectl := func(ctx context.Context, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, filepath.Join(l.options.Bin, "kubectl"), args...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+l.Cluster.Kubeconfig())
		return cmd
	}
	ctx := within(t, 5*time.Minute)
	if out, err := kubectl(ctx, "exec", "web", "--", "sh", "-c", "echo out of the pod; cat /etc/hostname").CombinedOutput(); err != nil || !strings.Contains(string(out), "out of the pod\nweb") {
		t.Errorf("exec: %v: %s", err, out)
	}
	if out, err := kubectl(ctx, "logs", "web").CombinedOutput(); err != nil {
		t.Errorf("logs: %v: %s", err, out)
	}

	pctx, cancel := context.WithCancel(ctx)
	defer cancel()
	forward := kubectl(pctx, "port-forward", "pod/web", fmt.Sprintf(":%d", webPort))
	stdout, err := forward.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	forward.Stderr = &errs
	if err := forward.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cancel(); _ = forward.Wait() }()
	line := make([]byte, 256)
	n, err := stdout.Read(line)
	port := regexp.MustCompile(`127\.0\.0\.1:(\d+)`).FindSubmatch(line[:n])
	if err != nil || port == nil {
		t.Fatalf("port-forward: %v: %s %s", err, line[:n], errs.String())
	}
	resp, err := http.Get("http://127.0.0.1:" + string(port[1]) + "/")
	if err != nil {
		t.Fatalf("port-forward: %v: %s", err, errs.String())
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || len(body) == 0 {
		t.Errorf("port-forward: %s, %v: %s", resp.Status, err, body)
	}
}
