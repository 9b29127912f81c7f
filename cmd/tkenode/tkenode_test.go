package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func ago(d time.Duration) time.Time { return now.Add(-d) }

// launch returns the status of a launch in which the first n conditions are met.
func launch(n int, instances ...reconcile.InstanceStatus) api.Status {
	st := api.Status{
		Version: "v0.1.0", Now: now, Started: ago(5 * time.Minute),
		Node: &api.Identity{
			Name: "10.0.0.30", InstanceID: "ins-lab00001", Cluster: "cls-lab00001",
			Zone: "ap-guangzhou-3", Generation: 1,
		},
		Instances: instances,
	}
	for i, t := range node.ConditionTypes {
		c := node.Condition{Type: t, Status: node.True, Reason: "Converged", Since: ago(5*time.Minute - time.Duration(i)*10*time.Second)}
		if i >= n {
			c.Status, c.Reason = node.False, "Blocked"
			c.Message = fmt.Sprintf("blocked by %s, which is False", node.ConditionTypes[max(n, i-1)])
		}
		st.Conditions = append(st.Conditions, c)
	}
	if n < len(st.Conditions) {
		st.Conditions[n].Since = ago(3*time.Minute + 12*time.Second)
		st.Unmet = &st.Conditions[n]
		for _, in := range instances {
			if in.Condition == st.Unmet.Type {
				st.Unmet.Reason = in.Reason
			}
		}
	}
	return st
}

var (
	converged = reconcile.InstanceStatus{
		Name: "eni/pool", Condition: node.NetworkReady, State: reconcile.Converged, Reason: "Converged", Since: ago(4 * time.Minute),
	}
	blocked = reconcile.InstanceStatus{
		Name: "unit/containerd", Condition: node.RuntimeReady, State: reconcile.Blocked, Reason: "Blocked",
		Message: "blocked by DisksReady, which is False (DiskNotBlank)", Since: ago(3*time.Minute + 12*time.Second),
	}
	notBlank = reconcile.InstanceStatus{
		Name: "disk/disk-1a2b3c4d", Condition: node.DisksReady, State: reconcile.Failed, Reason: "DiskNotBlank", Class: "terminal",
		Message: `disk-1a2b3c4d (/dev/vdb, 20 GiB) holds an ext4 file system labelled "data" that tkenode did not make; ` +
			`nothing was written to it: move the data away, attach a blank disk, or correct disks[0].diskID`,
		Since: ago(3*time.Minute + 12*time.Second), NextTry: now.Add(108 * time.Second),
	}
)

func TestStatusText(t *testing.T) {
	unsealed := launch(0)
	unsealed.Node, unsealed.Instances = nil, nil
	unsealed.Conditions[0].Reason = "UnknownField"
	unsealed.Conditions[0].Message = `user-data line 12: cluster.endpiont: no such field; did you mean "endpoint"?`

	applying := launch(1, reconcile.InstanceStatus{
		Name: "disk/disk-1a2b3c4d", Condition: node.DisksReady, State: reconcile.Applying, Reason: "Applying",
		Message: "format disk-1a2b3c4d as ext4", Changes: []string{"format disk-1a2b3c4d as ext4", "mount disk-1a2b3c4d on /var/lib/containerd"},
		Since: ago(2 * time.Second),
	}, blocked)

	lost := launch(len(node.ConditionTypes), notBlank, converged)
	lost.Conditions[1].Status, lost.Conditions[1].Since = node.False, ago(time.Minute)
	lost.Unmet = &lost.Conditions[1]

	exhausted := launch(len(node.ConditionTypes), converged)
	exhausted.Warnings = []node.Condition{{Type: node.PoolExhausted, Status: node.True, Since: ago(2 * time.Minute),
		Message: "no free VPC address: 8 of 8 addresses in use; SubnetFull: subnet-pods0001 has no address left"}}

	undone := launch(len(node.ConditionTypes), converged)
	undone.Warnings = []node.Condition{{Type: node.RepairsUndone, Status: node.True, Since: ago(2 * time.Minute),
		Message: "rule 512 from all lookup 4000 had to be made 17 times since 2026-01-02T03:02:05Z, undone by systemd-network (pid 812)"}}

	hostile := launch(1, reconcile.InstanceStatus{
		Name: "disk/x", Condition: node.DisksReady, State: reconcile.Failed, Class: "transient", NextTry: now.Add(7 * time.Second),
		Message: "label \x1b[2J\x1b]0;owned\x07 \u202etxt\nsecond line", Since: ago(time.Second),
	})

	noDNS := launch(8, reconcile.InstanceStatus{
		Name: "unit/coredns", Condition: node.DNSReady, State: reconcile.Failed, Reason: "NotAnswering", Class: "transient", NextTry: now.Add(9 * time.Second),
		Message: "coredns.service has run for 3m12s and does not answer: ask 169.254.20.10: lookup kubernetes.default.svc.cluster.local.: server misbehaving",
		Since:   ago(2 * time.Minute),
	})

	for name, st := range map[string]api.Status{
		"ready":        launch(len(node.ConditionTypes), converged),
		"not-blank":    launch(1, notBlank, blocked, converged),
		"applying":     applying,
		"unsealed":     unsealed,
		"lost-a-disk":  lost,
		"exhausted":    exhausted,
		"undone":       undone,
		"hostile":      hostile,
		"node-unready": launch(6, converged),
		"no-dns":       noDNS,
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			renderStatus(&terminal{w: &b, tty: true, width: 100}, st)
			golden(t, filepath.Join("testdata", "status-"+name+".txt"), b.Bytes())
		})
	}
}

func TestStatusFitsTheTerminal(t *testing.T) {
	var b bytes.Buffer
	renderStatus(&terminal{w: &b, tty: true, width: 60}, launch(1, notBlank, blocked))
	for line := range strings.Lines(b.String()) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 60 && !strings.Contains(line, "look:") && !strings.Contains(line, "is not Ready") {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	result := filepath.Join(dir, "bootstrap.json")
	if err := os.WriteFile(result, []byte(`{"phase":"user-data","since":"2026-01-02T03:01:05Z","class":"terminal","reason":"NodeConfigInvalid","message":"NodeConfig line 12: no such field"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	_, down := api.NewClient(filepath.Join(dir, "none")).Status(t.Context())
	var b bytes.Buffer
	err := explainUnreachable(&terminal{w: &b, tty: true, width: 100}, down, result, now)
	if exitCode(err) != exitNoAgent {
		t.Errorf("exit code %d", exitCode(err))
	}
	golden(t, "testdata/unreachable.txt", bytes.ReplaceAll(b.Bytes(), []byte(dir), []byte("/run/tkenode")))

	b.Reset()
	denied := fmt.Errorf("ask: %w", api.ErrDenied)
	if err := explainUnreachable(&terminal{w: &b}, denied, result, now); !errors.Is(err, api.ErrDenied) || b.Len() > 0 {
		t.Errorf("denied: %v, printed %q", err, &b)
	}
}

func TestPlanText(t *testing.T) {
	var b bytes.Buffer
	out := &terminal{w: &b, tty: true, width: 100}
	renderPlan(out, api.Plan{Instances: []reconcile.InstancePlan{
		{Name: "disk/disk-1a2b3c4d", Changes: []string{"format disk-1a2b3c4d as ext4", "mount disk-1a2b3c4d on /var/lib/containerd"}},
		{Name: "unit/containerd", Changes: []string{}, Error: "blocked by DisksReady, which is False (Applying)"},
		{Name: "eni/pool"}, {Name: "eni/paths"},
	}})
	golden(t, "testdata/plan.txt", b.Bytes())
}

func TestBootText(t *testing.T) {
	at := func(d float64) time.Time { return now.Add(time.Duration(d * float64(time.Second))) }
	var b bytes.Buffer
	out := &terminal{w: &b, tty: true, width: 100}
	renderBoot(out, api.Boot{Began: now, Steps: []api.Step{
		{Name: "kernel", Began: now, Ended: at(5.1)},
		{Name: "metadata", Began: at(7), Ended: at(7.4)},
		{Name: "DisksReady", Began: at(7.5), Ended: at(14.2)},
		{Name: "RuntimeReady", Began: at(14.2), Ended: at(31)},
		{Name: "NodeReady", Began: at(40), Ended: at(58.2)},
	}}, at(90))
	out.printf("\n")
	renderBoot(out, api.Boot{Began: now, Steps: []api.Step{{Name: "kernel", Began: now, Ended: at(5.1)}, {Name: "metadata", Began: at(7)}}}, at(20))
	renderBoot(out, api.Boot{Began: now}, now)
	golden(t, "testdata/boot.txt", b.Bytes())
}

func TestCommandLines(t *testing.T) {
	for _, tc := range []struct {
		args string
		code int
		want string // on either output
	}{
		{"", exitUsage, "which command?"},
		{"help", exitOK, "tkenode status"},
		{"--help", exitOK, "tkenode status"},
		{"help config show", exitOK, "usage: tkenode config show"},
		{"status -h", exitOK, "usage: tkenode status [-o format] [--watch]"},
		{"version", exitOK, "tkenode "},
		{"--version", exitOK, "tkenode "},
		{"stauts", exitUsage, `there is no command "stauts"`},
		{"config", exitUsage, "Try: tkenode config show, tkenode config check"},
		{"status -x", exitUsage, "-x"},
		{"status -o yaml", exitUsage, `-o is text or json, not "yaml"`},
		{"status --watch -o json", exitUsage, "--watch"},
		{"plan now", exitUsage, `plan takes no argument, found "now"`},
		{"wake a b", exitUsage, "one instance"},
		{"explain", exitUsage, "Try: tkenode explain pod, tkenode explain ip"},
		{"explain pod", exitUsage, "explain pod takes one argument"},
		{"explain pod web", exitUsage, "wants NAMESPACE/NAME"},
		{"explain pod default/web --to here", exitUsage, "-to"},
		{"explain ip --to fe80::1 10.0.16.5", exitUsage, "--to wants an address that packets are routed to"},
		{"explain ip 10.0.16.5 10.0.16.6", exitUsage, "one argument"},
		{"explain ip ::1", exitUsage, "wants an address such as a pod has"},
		{"pods default", exitUsage, "pods takes no argument"},
		{"config check", exitUsage, "one file"},
		{"config check testdata/none", exitError, "no such file"},
		{"config check testdata/bad.yaml", exitError, "line 3: "},
	} {
		var b bytes.Buffer
		out := &terminal{w: &b, tty: true, width: 100}
		if code := run(context.Background(), out, out, strings.Fields(tc.args)); code != tc.code || !strings.Contains(b.String(), tc.want) {
			t.Errorf("tkenode %s: exit %d, printed %q; want %d, %q", tc.args, code, &b, tc.code, tc.want)
		}
	}
}

func TestReadSealed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "1.json")
	if _, err := readSealed(path, api.ErrNotRunning); err == nil || err.Error() != "no configuration is sealed yet" {
		t.Errorf("nothing sealed: %v", err)
	}
	want, err := node.Seal(1, node.Config{Cluster: node.ClusterConfig{ID: "cls-lab00001"}}, node.Facts{InstanceID: "ins-lab00001"}, now)
	if err != nil {
		t.Fatal(err)
	}
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := readSealed(path, api.ErrNotRunning); err != nil || got.Digest != want.Digest {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 1499 * time.Millisecond: "1s", 59 * time.Second: "59s", 192 * time.Second: "3m12s",
		time.Hour: "1h00m", 47 * time.Hour: "47h00m", 100 * time.Hour: "4d04h",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%v) = %s, want %s", d, got, want)
		}
	}
}
