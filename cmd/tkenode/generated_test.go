package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tkenode/tkenode/agent/api"
)

var update = flag.Bool("update", false, "write golden and generated files instead of comparing")

// TestGenerated keeps the man page and the completions as the table of commands
// has them; go generate writes them.
func TestGenerated(t *testing.T) {
	for path, write := range map[string]func(io.Writer){
		"man/tkenode.8":            writeMan,
		"completions/tkenode.bash": writeBash,
		"completions/tkenode.zsh":  writeZsh,
		"completions/tkenode.fish": writeFish,
	} {
		var b bytes.Buffer
		write(&b)
		golden(t, filepath.Join("../../packaging", path), b.Bytes())
	}
}

// golden compares got with a file, or with -update writes it.
func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs from what is made now (go generate ./cmd/tkenode writes it):\n%s", path, got)
	}
}

// roff escapes text for man(7): backslashes, hyphens that are typed, and a dot or
// quote that would begin a request.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, `-`, `\-`).Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

func writeMan(w io.Writer) {
	p := func(format string, args ...any) { fmt.Fprintf(w, format, args...) }
	p(".\\\" Made by go generate from the table of commands; do not edit.\n")
	p(".TH TKENODE 8 \"\" tkenode \"System Administration\"\n")
	p(".SH NAME\ntkenode \\- makes a CVM a TKE node and keeps it one\n")
	p(".SH SYNOPSIS\n")
	for i, c := range commands() {
		if i > 0 {
			p(".br\n")
		}
		p(".B %s\n", roff(synopsis(c)))
	}
	p(`.SH DESCRIPTION
.B tkenode bootstrap
joins a CVM to its cluster at its first boot and seals the node's configuration.
.B tkenode agent
keeps it a node: ENIs, disks, containerd and kubelet, metrics. Both are started by systemd.
All other commands ask the agent over its socket and change nothing by themselves.
`)
	p(".SH COMMANDS\n")
	for _, c := range commands() {
		p(".SS %s\n%s.\n", roff(synopsis(c)), roff(strings.ToUpper(c.help[:1])+c.help[1:]))
		if c.long != "" {
			for para := range strings.SplitSeq(c.long, "\n\n") {
				p(".P\n%s\n", roff(para))
			}
		}
		flags(c).VisitAll(func(f *flag.Flag) {
			arg, usage := flag.UnquoteUsage(f)
			p(".TP\n.B %s\n%s\n", roff(strings.TrimSpace(dashes(f)+" "+arg)), roff(usage))
		})
	}
	p(".SH SOCKET\nThe agent speaks HTTP and JSON on %s. Members of the group %s may read; root may use all of it.\n", roff(api.Socket), api.Group)
	for _, r := range api.Routes {
		who := ""
		if r.Root() {
			who = " (root)"
		}
		p(".TP\n.B %s %s\n%s%s\n", r.Method, roff(r.Path), roff(r.Help), who)
	}
	p(".SH EXIT STATUS\n")
	for _, e := range exitCodes {
		p(".TP\n.B %d\n%s\n", e.code, roff(e.help))
	}
	p(".SH FILES\n")
	for _, f := range [][2]string{
		{"/var/lib/tkenode/config/", "the sealed configurations; current leads to the one in force"},
		{"/run/tkenode/bootstrap.json", "what the last bootstrap said"},
		{"/run/tkenode/tkenode.sock", "the agent's socket"},
		{"/run/tkenode/cni.sock", "where the CNI plugin asks the agent"},
	} {
		p(".TP\n.I %s\n%s\n", roff(f[0]), roff(f[1]))
	}
	p(".SH SEE ALSO\n.BR systemctl (1),\n.BR journalctl (1)\n")
}

// words returns the first words of all commands, and by first word the second ones.
func words() (first []string, second map[string][]string) {
	second = map[string][]string{}
	for _, c := range commands() {
		a, b, ok := strings.Cut(c.name, " ")
		if ok {
			second[a] = append(second[a], b)
		}
		if !ok || len(second[a]) == 1 {
			first = append(first, a)
		}
	}
	return first, second
}

// flagWords returns the flags of a command as they are typed.
func flagWords(c command) []string {
	var out []string
	flags(c).VisitAll(func(f *flag.Flag) { out = append(out, dashes(f)) })
	return out
}

func writeBash(w io.Writer) {
	first, second := words()
	fmt.Fprintf(w, `# Made by go generate from the table of commands; do not edit.
_tkenode() {
	local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words=
	if [ "$prev" = -o ]; then
		words="text json"
	elif [ "$COMP_CWORD" = 1 ]; then
		words=%q
	else
		case "${COMP_WORDS[1]} ${COMP_WORDS[2]}" in
`, strings.Join(first, " "))
	for _, c := range commands() {
		if f := flagWords(c); len(f) > 0 {
			pattern := `"` + c.name + `"`
			if !strings.Contains(c.name, " ") {
				pattern = `"` + c.name + ` "*`
			}
			fmt.Fprintf(w, "\t\t%s) words=%q ;;\n", pattern, strings.Join(f, " "))
		}
	}
	for _, a := range first {
		if len(second[a]) > 0 {
			fmt.Fprintf(w, "\t\t\"%s \"*) [ \"$COMP_CWORD\" = 2 ] && words=%q ;;\n", a, strings.Join(second[a], " "))
		}
	}
	fmt.Fprintf(w, "\t\t\"help \"*) words=%q ;;\n", strings.Join(first, " "))
	fmt.Fprint(w, `		esac
	fi
	if [ -n "$words" ]; then
		mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
	else
		mapfile -t COMPREPLY < <(compgen -f -- "$cur")
	fi
}
complete -F _tkenode tkenode
`)
}

func writeZsh(w io.Writer) {
	fmt.Fprint(w, "#compdef tkenode\n# Made by go generate from the table of commands; do not edit.\n\n")
	first, second := words()
	help := map[string]string{}
	for _, c := range commands() {
		help[c.name] = c.help
	}
	entry := func(word, text string) { fmt.Fprintf(w, "\t\t'%s:%s'\n", word, strings.ReplaceAll(text, "'", `'\''`)) }
	fmt.Fprint(w, "if (( CURRENT == 2 )); then\n\tlocal -a words=(\n")
	for _, a := range first {
		text := help[a]
		if text == "" {
			text = strings.Join(second[a], ", ")
		}
		entry(a, text)
	}
	fmt.Fprint(w, "\t)\n\t_describe command words\n\treturn\nfi\n")
	fmt.Fprint(w, "if [[ $words[CURRENT-1] == -o ]]; then\n\tcompadd text json\n\treturn\nfi\ncase \"$words[2] $words[3]\" in\n")
	for _, c := range commands() {
		if f := flagWords(c); len(f) > 0 {
			pattern := `"` + c.name + `"`
			if !strings.Contains(c.name, " ") {
				pattern = `"` + c.name + ` "*`
			}
			fmt.Fprintf(w, "%s) compadd -- %s ;;\n", pattern, strings.Join(f, " "))
		}
	}
	for _, a := range first {
		if len(second[a]) > 0 {
			fmt.Fprintf(w, "\"%s \"*) (( CURRENT == 3 )) && compadd %s || _files ;;\n", a, strings.Join(second[a], " "))
		}
	}
	fmt.Fprintf(w, "\"help \"*) compadd %s ;;\n*) _files ;;\nesac\n", strings.Join(first, " "))
}

func writeFish(w io.Writer) {
	fmt.Fprint(w, "# Made by go generate from the table of commands; do not edit.\n")
	first, second := words()
	help := map[string]string{}
	for _, c := range commands() {
		help[c.name] = c.help
	}
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `\'`) + "'" }
	for _, a := range first {
		text := help[a]
		if text == "" {
			text = strings.Join(second[a], ", ")
		}
		fmt.Fprintf(w, "complete -c tkenode -f -n __fish_use_subcommand -a %s -d %s\n", a, quote(text))
		for _, b := range second[a] {
			fmt.Fprintf(w, "complete -c tkenode -f -n '__fish_seen_subcommand_from %s' -a %s -d %s\n", a, b, quote(help[a+" "+b]))
		}
	}
	written := map[string]bool{} // commands of two words may share a flag
	for _, c := range commands() {
		a, _, _ := strings.Cut(c.name, " ")
		flags(c).VisitAll(func(f *flag.Flag) {
			kind, arg := "-l", ""
			if len(f.Name) == 1 {
				kind = "-s"
			}
			if f.Name == "o" {
				arg = " -x -a 'text json'"
			}
			_, usage := flag.UnquoteUsage(f)
			line := fmt.Sprintf("complete -c tkenode -n '__fish_seen_subcommand_from %s' %s %s%s -d %s\n", a, kind, f.Name, arg, quote(usage))
			if !written[line] {
				written[line] = true
				io.WriteString(w, line)
			}
		})
	}
}
