// Package nodeconfig reads NodeConfig documents: it finds the one that user-data
// holds, decodes it strictly, fills in defaults, and says everything that is
// wrong with it, each with its line, what was found and what to write instead.
//
// It is pure: no I/O, no clock, no network. What only the node itself or its
// cluster can tell (its facts, whether a certificate is in date) is not judged here.
package nodeconfig

import (
	"fmt"
	"slices"
	"strings"
	"unicode"

	"github.com/tkenode/tkenode/agent/node"
)

// MediaType marks the part of a MIME multipart user-data that is the NodeConfig.
const MediaType = "application/vnd.tkenode.nodeconfig+yaml"

// The reasons of the errors that this package returns.
const (
	ReasonMissing = "NodeConfigMissing" // user-data has none
	ReasonInvalid = "NodeConfigInvalid" // it is there and cannot be used
)

// Problem is one thing that is wrong with a NodeConfig.
type Problem struct {
	Part  int    `json:"part,omitempty"`  // of a MIME multipart, counted from 1; 0 when there are no parts
	Line  int    `json:"line,omitempty"`  // within the part, counted from 1; 0 when it is unknown
	Field string `json:"field,omitempty"` // cluster.endpoint, disks[1].mountPoint; empty: the document
	Text  string `json:"text"`            // what was found, what is expected, what to do
}

func (p Problem) String() string {
	var b strings.Builder
	b.WriteString("NodeConfig")
	if p.Part > 0 {
		fmt.Fprintf(&b, " part %d", p.Part)
	}
	if p.Line > 0 {
		fmt.Fprintf(&b, " line %d", p.Line)
	}
	if p.Field != "" {
		b.WriteString(": " + p.Field)
	}
	b.WriteString(": " + p.Text)
	return strings.Map(printable, b.String())
}

// printable replaces what could drive the terminal that shows a message.
func printable(r rune) rune {
	if !unicode.IsPrint(r) {
		return '�'
	}
	return r
}

// maxProblems is how many problems are told at once: a serial console is slow,
// and scrolls.
const maxProblems = 20

// Problems is everything that is wrong with a NodeConfig, in order of lines.
type Problems []Problem

func (ps Problems) Error() string {
	var lines []string
	for _, p := range ps[:min(len(ps), maxProblems)] {
		lines = append(lines, p.String())
	}
	if more := len(ps) - maxProblems; more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "\n")
}

// FromUserData finds the NodeConfig in user-data and decodes it.
func FromUserData(data []byte) (node.Config, error) {
	doc, part, err := find(data)
	if err != nil {
		return node.Config{}, err
	}
	return decode(doc, part)
}

// Decode reads one bare NodeConfig document, fills in the defaults and validates
// it. Its error is terminal and holds Problems.
func Decode(doc []byte) (node.Config, error) { return decode(doc, 0) }

func decode(doc []byte, part int) (node.Config, error) {
	var cfg node.Config
	d := decoder{lines: map[string]int{}, budget: maxValues}
	d.document(doc, &cfg)
	// A document of another kind would only be a list of missing fields.
	if d.recognised {
		defaults(&cfg, d.lines)
		v := validator{skip: d.broken, present: d.lines}
		v.config(&cfg)
		for _, p := range v.problems {
			p.Line = d.line(p.Field)
			d.problems = append(d.problems, p)
		}
	}
	if len(d.problems) == 0 {
		cfg.Disks = append(cfg.Disks, fromTKE(cfg.DataDisks, cfg.MountTarget)...)
		cfg.DataDisks, cfg.MountTarget = nil, "" // which are not sealed
		return cfg, nil
	}
	for i := range d.problems {
		d.problems[i].Part = part
	}
	slices.SortStableFunc(d.problems, func(a, b Problem) int { return a.Line - b.Line })
	return node.Config{}, node.Terminal(ReasonInvalid, "", d.problems)
}
