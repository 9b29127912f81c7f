package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/reconcile"
)

// look says where the evidence for a condition is, in commands to copy.
var look = map[node.ConditionType][]string{
	node.ConfigSealed: {"journalctl -b -u tkenode-bootstrap", "tkenode config check FILE"},
	node.DisksReady:   {"lsblk -o NAME,SERIAL,FSTYPE,SIZE,MOUNTPOINT", "tkenode plan"},
	node.RuntimeReady: {"systemctl status containerd", "journalctl -b -u containerd -n 50"},
	node.NetworkReady: {"tkenode eni", "tkenode plan"},
	node.NodeJoined:   {"journalctl -b -u tkenode-bootstrap", "kubectl get csr (where you have a kubeconfig)"},
	node.KubeletReady: {"systemctl status kubelet", "journalctl -b -u kubelet -n 50"},
	node.NodeReady:    {"journalctl -b -u kubelet -n 50", "kubectl describe node (where you have a kubeconfig)"},

	node.ServicesReady: {"systemctl status kube-proxy", "journalctl -b -u kube-proxy -n 50"},
	node.DNSReady:      {"systemctl status coredns", "journalctl -b -u coredns -n 50"},
}

// verdict is the first line: one sentence, the whole truth in short. Without age
// it stays the same as long as nothing changes.
func verdict(st api.Status, age bool) string {
	who := "this CVM"
	if st.Node != nil {
		who = fmt.Sprintf("node %s (%s)", st.Node.Name, st.Node.InstanceID)
	}
	since := func(c node.Condition) string {
		if !age || c.Since.IsZero() {
			return ""
		}
		return fmt.Sprintf(" since %s (%s)", clock(c.Since, st.Now), span(st.Now.Sub(c.Since)))
	}
	ready, _ := st.Condition(node.NodeReady)
	switch {
	case st.Unmet == nil:
		return who + " is Ready" + since(ready)
	case st.Node == nil:
		return fmt.Sprintf("%s is not a node yet: %s is %s%s", who, st.Unmet.Type, st.Unmet.Status, since(*st.Unmet))
	case ready.Status == node.True:
		return fmt.Sprintf("%s is Ready, but %s is %s%s", who, st.Unmet.Type, st.Unmet.Status, since(*st.Unmet))
	}
	return fmt.Sprintf("%s is not Ready: %s is %s%s", who, st.Unmet.Type, st.Unmet.Status, since(*st.Unmet))
}

// renderStatus prints the verdict, the evidence, where to look, and the tables.
func renderStatus(t *terminal, st api.Status) {
	color := green
	if st.Unmet != nil {
		color = red
		if underWay(st) {
			color = yellow
		}
	}
	t.printf("%s\n\n", t.paint(bold+";"+color, verdict(st, true)))
	if st.Unmet != nil {
		renderEvidence(t, st)
	}
	for _, c := range st.Warnings {
		t.block("  ", fmt.Sprintf("%s since %s (%s): %s", c.Type, clock(c.Since, st.Now), span(st.Now.Sub(c.Since)), c.Message))
		look := "tkenode eni"
		switch c.Type {
		case node.RepairsUndone:
			look = "journalctl -u tkenode-agent -g RepairsUndone"
		case node.ReadonlyFilesystem, node.IOError, node.Ext4Error, node.DiskNotGrown, node.VolumeMismatch:
			look = "tkenode disks"
		}
		t.printf("  look: %s\n\n", t.paint(bold, look))
	}
	renderConditions(t, st)
	renderInstances(t, st)
	if st.Node != nil {
		t.printf("%s\n", t.paint(faint, cut(fmt.Sprintf("cluster %s, zone %s, configuration %d; agent %s, up %s",
			st.Node.Cluster, st.Node.Zone, st.Node.Generation, st.Version, span(st.Now.Sub(st.Started))), t.width)))
	}
}

// underWay reports whether the agent is at work on the unmet condition, or waits
// for something that is expected to come by itself.
func underWay(st api.Status) bool {
	n := 0
	for _, in := range st.Instances {
		if in.Condition != st.Unmet.Type || in.State == reconcile.Converged {
			continue
		}
		switch in.State {
		case reconcile.Starting, reconcile.Applying, reconcile.Waiting, reconcile.Blocked:
			n++
		default:
			return false
		}
	}
	return n > 0
}

// renderEvidence prints what is known about the unmet condition. The instances
// that serve it say more than the condition, which shows only the first of them.
func renderEvidence(t *terminal, st api.Status) {
	served := false
	for _, in := range st.Instances {
		if in.Condition != st.Unmet.Type || in.State == reconcile.Converged {
			continue
		}
		served = true
		t.block("  ", in.Name+": "+orReason(in.Message, in.Reason))
		changes := in.Changes
		if in.State == reconcile.Applying && len(changes) > 0 {
			changes = changes[1:] // the message is the first
		}
		for _, c := range changes {
			t.block("    ", c)
		}
		if next := try(st, in); next != "" {
			t.block("    ", next)
		}
	}
	if !served {
		t.block("  ", orReason(st.Unmet.Message, st.Unmet.Reason))
	}
	t.printf("\n")
	label := "look: "
	for _, l := range look[st.Unmet.Type] {
		t.printf("  %s%s\n", label, t.paint(bold, l))
		label = strings.Repeat(" ", len(label))
	}
	t.printf("\n")
}

// try says what the agent does next about an instance, and when.
func try(st api.Status, in reconcile.InstanceStatus) string {
	when := ""
	if d := in.NextTry.Sub(st.Now).Round(time.Second); !in.NextTry.IsZero() {
		when = "in " + span(max(d, time.Second))
	}
	switch {
	case in.Class == node.ClassTerminal.String():
		return strings.TrimSpace("a human must act; it looks again " + when)
	case in.State == reconcile.Failed && when != "":
		return "tried again " + when
	case in.State == reconcile.Waiting && when != "":
		return "looks again " + when
	}
	return ""
}

func renderConditions(t *terminal, st api.Status) {
	t.printf("%s\n", t.paint(faint, pad("CONDITION", 15)+pad("STATUS", 9)+pad("FOR", 8)+"REASON"))
	for _, c := range st.Conditions {
		color, reason := red, c.Reason
		switch {
		case c.Status == node.True:
			color, reason = green, ""
		case st.Unmet != nil && c.Type != st.Unmet.Type:
			color = faint // it follows from the unmet one, or is looked at after it
		}
		age := ""
		if !c.Since.IsZero() {
			age = span(st.Now.Sub(c.Since))
		}
		row(t, pad(string(c.Type), 15)+t.paint(color, pad(string(c.Status), 9))+pad(age, 8)+cut(reason, t.width-32))
	}
	t.printf("\n")
}

func renderInstances(t *terminal, st api.Status) {
	if len(st.Instances) == 0 {
		return
	}
	width := len("INSTANCE")
	for _, in := range st.Instances {
		width = max(width, len(in.Name))
	}
	t.printf("%s\n", t.paint(faint, pad("INSTANCE", width+2)+pad("STATE", 15)+pad("FOR", 8)+"MESSAGE"))
	for _, in := range st.Instances {
		color, message := yellow, orReason(in.Message, in.Reason)
		switch in.State {
		case reconcile.Converged:
			color, message = green, ""
		case reconcile.Failed, reconcile.NotConverging, reconcile.Stuck:
			color = red
		case reconcile.Blocked:
			color = faint
		}
		message, _, _ = strings.Cut(message, "\n")
		row(t, pad(in.Name, width+2)+t.paint(color, pad(string(in.State), 15))+
			pad(span(st.Now.Sub(in.Since)), 8)+cut(message, t.width-width-25))
	}
	t.printf("\n")
}

func row(t *terminal, s string) { t.printf("%s\n", strings.TrimRight(s, " ")) }

func orReason(message, reason string) string {
	if message != "" {
		return message
	}
	return reason
}

// explainUnreachable tells what can be told without the agent: why it cannot be
// asked, what bootstrap said, and what to do. At three in the morning this is
// the case that matters most. It returns err, marked as told if it was.
func explainUnreachable(t *terminal, err error, report string, now time.Time) error {
	if !errors.Is(err, api.ErrNotRunning) && !errors.Is(err, api.ErrHung) {
		return err
	}
	t.printf("%s\n\n", t.paint(bold+";"+red, err.Error()))
	if said := readReport(report, now); said != "" {
		t.block("  ", said)
		t.printf("\n")
	}
	t.block("  ", "Pods, kubelet and containerd do not depend on the agent; what runs, runs on.")
	t.printf("\n")
	for _, l := range [][2]string{
		{"look: ", "systemctl status tkenode-agent tkenode-bootstrap"},
		{"      ", "journalctl -b -u tkenode-agent -n 50"},
		{"then: ", "systemctl restart tkenode-agent"},
	} {
		t.printf("  %s%s\n", l[0], t.paint(bold, l[1]))
	}
	return told{err}
}

// readReport returns what bootstrap says of itself, or nothing.
func readReport(path string, now time.Time) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	var r node.Report
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Sprintf("%s cannot be read: %v", path, err)
	}
	when := fmt.Sprintf("since %s (%s)", clock(r.Since, now), span(now.Sub(r.Since)))
	switch {
	case r.Message != "":
		return fmt.Sprintf("bootstrap is at %q %s: %s: %s", r.Phase, when, r.Reason, r.Message)
	case r.Done:
		return "bootstrap is done " + when
	}
	return fmt.Sprintf("bootstrap is at %q %s", r.Phase, when)
}
