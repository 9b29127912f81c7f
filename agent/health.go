package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/kube"
	"github.com/tkenode/tkenode/agent/metrics"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

// cniListener returns the socket that systemd holds for the CNI plugin.
func cniListener() (net.Listener, error) {
	named, err := activation.ListenersWithNames()
	if err != nil {
		return nil, fmt.Errorf("take sockets from systemd: %w", err)
	}
	if l := named["cni"]; len(l) == 1 && l[0] != nil {
		return l[0], nil
	}
	return nil, errors.New("systemd passed no socket named cni: start the agent with systemctl start tkenode-agent, which starts tkenode-cni.socket")
}

// source is what the socket serves.
func (a *Agent) source(collector *metrics.Collector) api.Source {
	return api.Source{
		Version:    a.options.Version,
		Conditions: a.board.Conditions,
		Instances: func() []reconcile.InstanceStatus {
			if e := a.engine.Load(); e != nil {
				return e.Status()
			}
			return []reconcile.InstanceStatus{}
		},
		Plan: func(ctx context.Context) []reconcile.InstancePlan {
			if e := a.engine.Load(); e != nil {
				return e.Plan(ctx)
			}
			return []reconcile.InstancePlan{}
		},
		Wake: func(name string) bool {
			e := a.engine.Load()
			return e != nil && e.Wake(name)
		},
		Sealed: a.currentSealed,
		Boot:   func() api.Boot { return a.ledger.boot(node.ReportFile) },
		Warnings: func() []node.Condition {
			warnings := disk.Warnings(a.diskStates())
			if o := a.others.Load(); o != nil {
				warnings = append(warnings, o.Warnings()...)
			}
			n := a.network.Load()
			if n == nil {
				return warnings
			}
			warnings = append(warnings, illDisks(a.knownDisks())...)
			for _, c := range []*node.Condition{n.Exhausted(), n.Undone()} {
				if c != nil {
					warnings = append(warnings, *c)
				}
			}
			return warnings
		},
		ENI: func() (eni.State, error) {
			if n := a.network.Load(); n != nil {
				return n.State()
			}
			return eni.State{}, errNoNetwork
		},
		Explain: func(ctx context.Context, q eni.Question) (eni.Explanation, error) {
			if n := a.network.Load(); n != nil {
				return n.Explain(ctx, q)
			}
			return eni.Explanation{}, errNoNetwork
		},
		Disks:   a.diskStates,
		Volumes: a.volumeState,
		Decide:  a.decide,
		Metrics: collector,
	}
}

func (a *Agent) knownDisks() []*disk.Disk {
	if all := a.disks.Load(); all != nil {
		return *all
	}
	return nil
}

func (a *Agent) diskStates() []disk.State {
	all := []disk.State{}
	for _, d := range a.knownDisks() {
		all = append(all, d.State())
	}
	return all
}

func (a *Agent) volumeState() api.Volumes {
	v := api.Volumes{Others: []disk.Other{}}
	if o := a.others.Load(); o != nil {
		all, _, _ := o.All()
		v.Others = append(v.Others, all...)
	}
	if c := a.volumes.Load(); c != nil {
		v.Limit = c.Limit()
	}
	return v
}

// illDisks returns what is wrong with disks that are, or were, mounted, and what cannot
// be told of them.
func illDisks(disks []*disk.Disk) []node.Condition {
	return slices.DeleteFunc(wanted(disks).Conditions, func(c node.Condition) bool { return c.Status != node.True && c.Message == "" })
}

// wanted is what the Node has to say of the disks.
func wanted(disks []*disk.Disk) kube.Wanted {
	w := kube.Wanted{Known: true}
	var all []disk.Health
	for _, d := range disks {
		s := d.Standing()
		// A cordon of ours outlives a reboot, until all disks are mounted.
		w.Known = w.Known && s.Mounted
		w.Cordon = cmp.Or(w.Cordon, s.Fenced)
		all = append(all, s.Health)
	}
	w.Conditions = disk.Merge(all)
	return w
}

// tellNode has what the Node says looked at again.
func (a *Agent) tellNode() {
	if e := a.engine.Load(); e != nil {
		e.Wake("kube/conditions")
	}
}

// decide hands an operator's order to the disk that it is about.
func (a *Agent) decide(ctx context.Context, o disk.Order) error {
	var known []string
	for _, d := range a.knownDisks() {
		st := d.State()
		if !st.Has(o.DiskID) {
			known = append(known, cmp.Or(st.DiskID, st.Name))
			continue
		}
		if err := d.Decide(ctx, o); err != nil {
			return err
		}
		a.engine.Load().Wake(d.Name())
		return nil
	}
	return fmt.Errorf("%s %.64q: %w: the NodeConfig's disks are %s", o.Act, o.DiskID, disk.ErrRefused, cmp.Or(strings.Join(known, ", "), "none"))
}

// errNoNetwork is what is known of the network before its modules are started.
var errNoNetwork = errors.New("the network's modules are not started yet; look at tkenode status")

// tell logs every transition of a condition, which is the node's biography in the
// journal and on the console, shows the first unmet one in systemctl status, and
// keeps the ledger of the boot.
func (a *Agent) tell(ctx context.Context) error {
	told := map[node.ConditionType]node.Condition{}
	for {
		_, changed := a.board.Unmet()
		var instances []reconcile.InstanceStatus
		if e := a.engine.Load(); e != nil {
			instances = e.Status()
			a.ledger.note(instances)
		}
		conditions := a.board.Conditions()
		for _, c := range conditions {
			if !isNews(told[c.Type], c, instances) {
				continue
			}
			line := fmt.Sprintf("%s is %s", c.Type, c.Status)
			a.log.Info(line, "reason", c.Reason, "message", c.Message)
			if c.Status != node.True {
				line += ": " + c.Reason + ": " + c.Message
			}
			fmt.Fprintf(a.options.Console, "tkenode: %s\n", oneLine(line))
			told[c.Type] = c
		}
		status := "every condition is met"
		if i := slices.IndexFunc(conditions, func(c node.Condition) bool { return c.Status != node.True }); i >= 0 {
			c := conditions[i]
			status = fmt.Sprintf("%s is %s (%s) %s", c.Type, c.Status, c.Reason, c.Message)
		}
		// It only decorates systemctl status.
		if _, err := daemon.SdNotify(false, "STATUS="+oneLine(status)); err != nil {
			a.log.Warn("systemctl status does not show the first unmet condition", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// maxLine is what fits a datagram to systemd and a serial console at 115200 baud.
const maxLine = 1 << 10

// oneLine makes one line of text of what may come from anywhere: a line break
// would begin another variable of sd_notify(3), and other control characters
// would move a terminal's cursor.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == '\u2028' || r == '\u2029' {
			return ' '
		}
		return r
	}, s) // which also replaces what is not UTF-8
	if len(s) > maxLine {
		s = strings.ToValidUTF8(s[:maxLine], "") + "…"
	}
	return s
}

// isNews reports whether a condition is to be told of after what was told last.
// Nobody has to hear that it is not True yet, unless a human must act for it.
func isNews(told, now node.Condition, instances []reconcile.InstanceStatus) bool {
	if now.Status != node.True && slices.ContainsFunc(instances, func(in reconcile.InstanceStatus) bool {
		return in.Condition == now.Type && in.Class == node.ClassTerminal.String() && in.Reason == now.Reason
	}) {
		return told.Status == node.True || told.Reason != now.Reason
	}
	return told.Status != now.Status && (told.Status != "" || now.Status == node.True)
}

// watchdog says READY once the socket answers, and then feeds systemd's watchdog
// as long as both the engine and the socket do. A module that hangs is a
// condition, not a reason to die: the engine answers beside it.
func (a *Agent) watchdog(ctx context.Context) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("read watchdog interval: %w", err)
	}
	ready := false
	for ctx.Err() == nil {
		wait := interval / 3
		if interval == 0 {
			wait = time.Minute
		}
		state := "WATCHDOG=1"
		if !ready {
			state, wait = "READY=1", 50*time.Millisecond
		}
		if err := a.alive(ctx); err == nil {
			if _, err := daemon.SdNotify(false, state); err != nil {
				return fmt.Errorf("notify systemd: %w", err)
			}
			ready = true
		} else if ready && ctx.Err() == nil {
			a.log.Error("the watchdog is not fed", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// alive returns an error unless the socket accepts and answers, over a connection
// of its own each time, and every loop of the engine turns.
func (a *Agent) alive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client := api.NewClient(a.socket)
	defer client.Close()
	if _, err := client.Status(ctx); err != nil {
		return err
	}
	if e := a.engine.Load(); e != nil {
		return e.Alive(ctx)
	}
	return nil
}
