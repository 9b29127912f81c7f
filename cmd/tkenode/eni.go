package main

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/eni"
)

var eniCommand = command{
	name: "eni",
	help: "the ENIs, their addresses, and what the pool waits for",
	long: `For every slot: the ENI in it, its device, MAC, subnet and security groups, the call of the cloud's API
that is under way and for how long, and its addresses. An address is free, used by a pod, cooling down after
one, leaving: about to be given back, or gone: the cloud has taken it away although a pod has it. What keeps the pool from having more
addresses is said first.`,
	flags: func(fs *flag.FlagSet) action { return askENI(fs, renderENI) },
}

var podsCommand = command{
	name: "pods",
	help: "the pods that have a VPC address, and how they are wired",
	long: `One line for every interface of a pod. It is wired; or has no veth, or no ENI of its own that it should have, while its network is being made or
repaired; or is dead: its network namespace is gone and the runtime has not said so; or its address is gone:
the cloud has taken it away. Pods with host networking have the node's address and are not listed.`,
	flags: func(fs *flag.FlagSet) action { return askENI(fs, renderPods) },
}

// askENI asks the agent for what it knows of the network.
func askENI(fs *flag.FlagSet, render func(*terminal, eni.State)) action {
	format := output(fs)
	return func(ctx context.Context, out *terminal, _ []string) error {
		asJSON, err := isJSON(*format)
		if err != nil {
			return err
		}
		c := api.NewClient(api.Socket)
		defer c.Close()
		ctx, cancel := context.WithTimeout(ctx, askDeadline)
		defer cancel()
		st, err := c.ENI(ctx)
		if err != nil {
			return err
		}
		if asJSON {
			return out.json(st)
		}
		render(out, st)
		return nil
	}
}

// renderENI prints the sum, what is wrong, and a section for every slot.
func renderENI(t *terminal, st eni.State) {
	sum, color := "", green
	for _, six := range []bool{false, true} {
		count, all := map[string]int{}, 0
		for _, e := range st.ENIs {
			for _, a := range e.Addresses {
				if a.Addr.Is6() == six {
					count[a.State]++
					all++
				}
			}
		}
		what := "%d addresses free"
		if six {
			what = "; IPv6: %d free"
		}
		if six && all == 0 {
			break
		}
		sum += fmt.Sprintf(what+", %d used, %d cooling", count["free"], count["used"], count["cooling"])
		if n := count["gone"]; n > 0 {
			sum, color = sum+fmt.Sprintf(", %d gone", n), red
		}
	}
	if st.Exhausted != "" {
		color = red
	}
	t.printf("%s\n", t.paint(bold+";"+color, sum))
	if st.Exhausted != "" {
		t.block("  ", "PoolExhausted: "+st.Exhausted)
	}
	if st.Waiting > 0 {
		t.block("  ", fmt.Sprintf("%d pods wait for an address", st.Waiting))
	}
	if st.Blocked != "" {
		t.block("  ", "the pool waits: "+st.Blocked)
	}
	if st.MetadataRefused > 0 {
		t.block("  ", fmt.Sprintf("%d packets of pods to the metadata service were refused", st.MetadataRefused))
	}
	if st.CloudSeen.IsZero() {
		t.block("  ", "the cloud has not told of the ENIs since the agent started")
	}
	for _, e := range st.ENIs {
		t.printf("\n")
		renderSlot(t, st, e)
	}
}

func renderSlot(t *terminal, st eni.State, e eni.ENIState) {
	id, state, color := e.ENI, "not ready", yellow
	if id == "" {
		id, state = "no ENI", "empty"
	}
	if e.Ready {
		state, color = "ready", green
	}
	if e.Exclusive {
		state += ", for a pod alone"
	}
	t.printf("%s  %s\n", t.paint(bold, fmt.Sprintf("slot %d  %s", e.Number, clean(id))), t.paint(color, state))
	if e.MAC != "" {
		device := e.Device
		if device == "" {
			device = "no link"
		}
		subnet := e.SubnetID + " " + e.Subnet.String()
		if e.Subnet6.IsValid() {
			subnet += " " + e.Subnet6.String()
		}
		t.block("  ", fmt.Sprintf("%s  %s  %s", clean(device), e.MAC, strings.TrimSpace(subnet)))
	}
	if len(e.SecurityGroups) > 0 {
		t.block("  ", "security groups "+strings.Join(e.SecurityGroups, ", "))
	}
	if e.Intent != "" {
		t.block("  ", fmt.Sprintf("under way: %s for %s", e.Intent, span(st.Now.Sub(e.Since))))
	}
	// Addresses of IPv6 are as long as they are: a column for the longest of them.
	width := 17
	for _, a := range e.Addresses {
		if a.State != "free" {
			width = max(width, len(a.Addr.String())+2)
		}
	}
	if e.Primary6.IsValid() {
		width = max(width, len(e.Primary6.String())+2)
	}
	var free []string
	for _, a := range e.Addresses {
		switch a.State {
		case "free":
			free = append(free, a.Addr.String())
		case "cooling":
			row(t, fmt.Sprintf("  %s%s for %s", pad(a.Addr.String(), width), t.paint(faint, "cooling"), span(a.Until.Sub(st.Now))))
		case "gone":
			row(t, fmt.Sprintf("  %s%s %s", pad(a.Addr.String(), width), t.paint(red, pad("gone", 8)), clean(a.Pod)))
		default:
			row(t, fmt.Sprintf("  %s%s %s", pad(a.Addr.String(), width), pad(a.State, 8), clean(a.Pod)))
		}
	}
	for _, a := range []netip.Addr{e.Primary, e.Primary6} {
		if a.IsValid() && !e.Exclusive {
			row(t, fmt.Sprintf("  %sthe ENI's own, no pod's", pad(a.String(), width)))
		}
	}
	if len(free) > 0 {
		t.block("  ", "free: "+strings.Join(free, " "))
	}
}

// renderPods prints a table. The pods' names come last, and whole: they are copied.
func renderPods(t *terminal, st eni.State) {
	if len(st.Pods) == 0 {
		t.printf("no pod has a VPC address\n")
		return
	}
	rows := [][]string{{"STATE", "ADDRESS", "ENI", "SLOT", "VETH", "FOR", "POD"}}
	for _, p := range st.Pods {
		addr := p.Addr.String()
		if p.Addr6.IsValid() {
			addr += "," + p.Addr6.String()
		}
		rows = append(rows, []string{p.State, addr, clean(p.ENI), strconv.Itoa(p.Slot), p.Veth, span(st.Now.Sub(p.Since)), clean(p.String())})
	}
	width := make([]int, len(rows[0]))
	for _, r := range rows {
		for i, cell := range r {
			width[i] = max(width[i], utf8.RuneCountInString(cell))
		}
	}
	for n, r := range rows {
		line := ""
		for i, cell := range r[:len(r)-1] {
			cell = pad(cell, width[i]+2)
			if n > 0 && i == 0 {
				cell = t.paint(map[string]string{"wired": green, "address gone": red}[r[0]], cell)
			}
			line += cell
		}
		line += r[len(r)-1]
		if n == 0 {
			line = t.paint(faint, line)
		}
		t.printf("%s\n", line)
	}
}
