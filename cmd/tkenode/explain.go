package main

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tkenode/tkenode/agent/api"
	"github.com/tkenode/tkenode/agent/eni"
)

var explainPodCommand = command{
	name: "explain pod",
	args: "NAMESPACE/NAME",
	help: "the way of a pod's packets, and where kernel, ledger and cloud disagree",
	long: `The hops of a packet out of the pod and back: interface, veth, mark, rule, table, gateway, ENI. The kernel is
asked for every one of them as it would route the packet now; that is compared with the agent's ledger and
with what the cloud has assigned. Every disagreement is marked with !! and followed by what to do.

The cloud is asked for 5 s at most; if it cannot be, the rest is told all the same. Nothing is changed.`,
	flags: func(fs *flag.FlagSet) action {
		return explain(fs, func(pod string) (eni.Question, error) {
			if namespace, name, ok := strings.Cut(pod, "/"); !ok || namespace == "" || name == "" {
				return eni.Question{}, usagef("explain pod wants NAMESPACE/NAME, not %q", pod)
			}
			return eni.Question{Pod: pod}, nil
		})
	},
}

var explainIPCommand = command{
	name: "explain ip",
	args: "ADDRESS",
	help: "what an address is, and the way of packets from and to it",
	long: `If a pod of this node has the address, it is explained as the pod is. Otherwise: what the ledger and the cloud
know of the address, where the kernel sends packets to it, and what a pod may have left behind.`,
	flags: func(fs *flag.FlagSet) action {
		return explain(fs, func(text string) (eni.Question, error) {
			a, err := netip.ParseAddr(text)
			if err != nil || !eni.Explicable(a) {
				return eni.Question{}, usagef("explain ip wants an address such as a pod has, not %q", text)
			}
			return eni.Question{IP: a}, nil
		})
	},
}

// explainDeadline is several times what the agent waits for the cloud: it answers
// one question at a time.
const explainDeadline = 30 * time.Second

// explain asks what parse makes of the one argument.
func explain(fs *flag.FlagSet, parse func(string) (eni.Question, error)) action {
	format := output(fs)
	var to netip.Addr
	fs.TextVar(&to, "to", to, "where packets go to, an `address` (default the subnet's gateway, and one outside of the VPC)")
	return func(ctx context.Context, out *terminal, args []string) error {
		asJSON, err := isJSON(*format)
		if err != nil {
			return err
		}
		if len(args) != 1 {
			return usagef("%s takes one argument; see: tkenode help %s", fs.Name(), fs.Name())
		}
		q, err := parse(args[0])
		if err != nil {
			return err
		}
		if q.To = to; to.IsValid() && !eni.Explicable(to) {
			return usagef("--to wants an address that packets are routed to, not %q", to)
		}
		c := api.NewClient(api.Socket)
		defer c.Close()
		ctx, cancel := context.WithTimeout(ctx, explainDeadline)
		defer cancel()
		e, err := c.Explain(ctx, q)
		if err != nil {
			return err
		}
		if asJSON {
			err = out.json(e)
		} else {
			renderExplanation(out, e)
		}
		if err == nil && e.Problems() > 0 {
			err = told{errUnmet}
		}
		return err
	}
}

// renderExplanation prints the verdict, and then the hops in the order in which a
// packet meets them.
func renderExplanation(t *terminal, e eni.Explanation) {
	agree := "kernel, ledger and cloud agree"
	if e.CloudNotAsked != "" {
		agree = "kernel and ledger agree"
	}
	color := green
	switch n := e.Problems(); {
	case n == 1:
		agree, color = "1 disagreement, marked !!", red
	case n > 1:
		agree, color = fmt.Sprintf("%d disagreements, marked !!", n), red
	}
	t.printf("%s\n", t.paint(bold+";"+color, clean(e.Subject)+": "+agree))
	if e.CloudNotAsked != "" {
		t.block("  ", "cloud not asked: "+e.CloudNotAsked)
	}
	for _, trace := range e.Traces {
		t.printf("\n")
		t.block("", trace.Title)
		width := 0
		for _, l := range trace.Legs {
			for _, h := range l.Hops {
				width = max(width, utf8.RuneCountInString(h.Name))
			}
		}
		for _, l := range trace.Legs {
			t.printf("\n")
			t.block("  ", l.Title)
			for _, h := range l.Hops {
				renderHop(t, h, width)
			}
		}
	}
}

func renderHop(t *terminal, h eni.Hop, width int) {
	mark, color := "ok", green
	if len(h.Problems) > 0 {
		mark, color = "!!", red
	}
	indent := strings.Repeat(" ", 10+width)
	for i, line := range t.lines(h.Text, len(indent)) {
		if i == 0 {
			t.printf("    %s  %s  %s\n", t.paint(color, mark), pad(clean(h.Name), width), line)
			continue
		}
		t.printf("%s%s\n", indent, line)
	}
	for _, p := range h.Problems {
		t.block("        ", "!! "+p.Text)
		if p.Do != "" {
			t.block("        ", "→  "+p.Do)
		}
	}
}
