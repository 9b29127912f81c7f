package nodeconfig

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	"github.com/tkenode/tkenode/agent/node"
)

// A NodeConfig has some dozens of values. The bounds only stop aliases from
// multiplying into millions, and nesting from exhausting the stack.
const (
	maxValues = 10_000
	maxDepth  = 32
)

// decoder walks a YAML tree into a node.Config. Unlike a general decoder it goes
// on after a problem, so that one look at the console shows all of them.
type decoder struct {
	lines      map[string]int  // of each field that is present
	failed     map[string]bool // fields that have a problem of decoding already
	problems   Problems
	recognised bool // the document says that it is a NodeConfig of our version
	budget     int
	depth      int
}

func (d *decoder) problem(line int, field, format string, args ...any) {
	if d.failed == nil {
		d.failed = map[string]bool{}
	}
	d.failed[field] = true
	d.problems = append(d.problems, Problem{Line: line, Field: field, Text: fmt.Sprintf(format, args...)})
}

// broken reports whether field, or what it is in, could not be decoded: then
// validating it would only say the same thing twice.
func (d *decoder) broken(field string) bool {
	for ; field != ""; field = parent(field) {
		if d.failed[field] {
			return true
		}
	}
	return d.failed[""]
}

// line returns the line of field, or of the innermost present thing around it.
func (d *decoder) line(field string) int {
	for ; field != ""; field = parent(field) {
		if l, ok := d.lines[field]; ok {
			return l
		}
	}
	return d.lines[""]
}

// parent cuts the last step off a path: a.b[1] -> a.b -> a -> "".
func parent(field string) string {
	if strings.HasSuffix(field, `"]`) {
		return field[:strings.LastIndex(field, `["`)]
	}
	return field[:max(strings.LastIndexAny(field, ".["), 0)]
}

const beginsWith = `a NodeConfig begins with "apiVersion: ` + node.APIVersion + `" and "kind: ` + node.Kind + `"`

func (d *decoder) document(doc []byte, cfg *node.Config) {
	if !utf8.Valid(doc) {
		d.problem(0, "", "is not UTF-8 text, so not YAML; %s", beginsWith)
		return
	}
	dec := yaml.NewDecoder(bytes.NewReader(doc))
	var root yaml.Node
	switch err := dec.Decode(&root); {
	case errors.Is(err, io.EOF):
		d.problem(0, "", "is empty; %s", beginsWith)
		return
	case err != nil:
		d.syntax(doc, err)
		return
	}
	top := root.Content[0]
	if top.Kind != yaml.MappingNode {
		d.problem(top.Line, "", "found %s, expected fields; %s", found(top), beginsWith)
		return
	}
	d.value(top, reflect.ValueOf(cfg).Elem(), "")
	d.recognise(cfg)
	for {
		var next yaml.Node
		switch err := dec.Decode(&next); {
		case errors.Is(err, io.EOF):
			return
		case err != nil:
			d.syntax(doc, err)
			return
		case !isNull(next.Content[0]): // else it is a "---" at the end
			d.problem(next.Line, "", "a second document begins here; keep one")
			return
		}
	}
}

// recognise checks the two fields that say how to read all others.
func (d *decoder) recognise(cfg *node.Config) {
	d.recognised = cfg.APIVersion == node.APIVersion && cfg.Kind == node.Kind
	if d.recognised {
		return
	}
	// A header of a wrong type has its problem already.
	d.problems = slices.DeleteFunc(d.problems, func(p Problem) bool { return p.Field != "apiVersion" && p.Field != "kind" })
	if cfg.APIVersion != node.APIVersion {
		d.header("apiVersion", cfg.APIVersion, node.APIVersion)
	}
	if cfg.Kind != node.Kind {
		d.header("kind", cfg.Kind, node.Kind)
	}
}

func (d *decoder) header(field, got, want string) {
	if d.failed[field] {
		return
	}
	if got == "" {
		d.problem(d.line(field), field, "missing; %s", beginsWith)
	} else {
		d.problem(d.line(field), field, "found %s, this node image reads %q", quote(got), want)
	}
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?(?:line \d+: )?`)

// syntax reports what the YAML parser says, and where.
func (d *decoder) syntax(doc []byte, err error) {
	text := yamlLine.ReplaceAllString(err.Error(), "")
	d.problem(culprit(doc), "", "not YAML from here on: %s; check indentation and quotes", text)
}

// maxReparsed bounds the search for a culprit: NodeConfigs have some kilobytes
// and some hundred lines, and whoever sends more may look for himself.
const maxReparsed = 16 << 20

// culprit returns the line after the longest run of lines that is YAML, or 0 when
// the search takes too long. The parser itself names a line before or after it,
// or the one where what it was in begins, or none.
func culprit(doc []byte) int {
	lines := bytes.SplitAfter(doc, []byte("\n"))
	end, read := len(doc), 0
	for n := len(lines) - 1; n >= 0; n-- {
		end -= len(lines[n])
		if read += end; read > maxReparsed {
			return 0
		}
		if isYAML(doc[:end]) {
			return n + 1
		}
	}
	return 1
}

func isYAML(doc []byte) bool {
	for dec := yaml.NewDecoder(bytes.NewReader(doc)); ; {
		var n yaml.Node
		if err := dec.Decode(&n); err != nil {
			return errors.Is(err, io.EOF)
		}
	}
}

// value decodes n into v, which is the field at path.
func (d *decoder) value(n *yaml.Node, v reflect.Value, path string) {
	if v.Kind() == reflect.Pointer { // that it is there says something, even if it is empty
		v.Set(reflect.New(v.Type().Elem()))
		v = v.Elem()
	}
	n, ok := d.enter(n, path)
	if !ok {
		return
	}
	defer d.leave()
	if isNull(n) {
		return // as if the field were not there
	}
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		d.text(n, u, path)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.mapping(n, path, join, func(key, val *yaml.Node, at string) {
			if f, ok := fieldByKey(v, key.Value); ok {
				d.value(val, f, at)
			} else {
				meant, advice := didYouMean(key.Value, keys(v.Type()))
				d.problem(key.Line, at, "no such field%s", advice)
				d.failed[join(path, meant)] = meant != ""
			}
		})
	case reflect.Map:
		if v.Type().Elem().Kind() == reflect.Interface {
			if m, ok := d.free(n, path).(map[string]any); ok {
				v.Set(reflect.ValueOf(m))
			} else {
				d.notMapping(n, path)
			}
			return
		}
		m := reflect.MakeMap(v.Type())
		d.mapping(n, path, entry, func(key, val *yaml.Node, at string) {
			e := reflect.New(v.Type().Elem()).Elem()
			d.value(val, e, at)
			m.SetMapIndex(reflect.ValueOf(key.Value), e)
		})
		v.Set(m)
	case reflect.Slice:
		d.list(n, v, path)
	case reflect.String:
		if tag := n.ShortTag(); n.Kind != yaml.ScalarNode {
			d.problem(n.Line, path, "found %s, expected text", found(n))
		} else if tag != "!!str" && tag != "!!timestamp" {
			d.problem(n.Line, path, "found %s, expected text; put it in quotes: %q", found(n), n.Value)
		} else {
			v.SetString(n.Value)
		}
	case reflect.Bool:
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" {
			d.problem(n.Line, path, "found %s, expected true or false", found(n))
		} else {
			v.SetBool(n.Value[0] == 't' || n.Value[0] == 'T')
		}
	case reflect.Int:
		i, err := strconv.ParseInt(n.Value, 10, 32)
		switch {
		case n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || err != nil && !errors.Is(err, strconv.ErrRange):
			d.problem(n.Line, path, "found %s, expected a whole number", found(n))
		case octal(n.Value):
			d.octal(n, path)
		default:
			v.SetInt(i) // the nearest there is, if it is out of range: validation says what the range is
		}
	default:
		panic("nodeconfig: node.Config has a field of type " + v.Type().String() + " at " + path)
	}
}

// enter follows an alias and counts the value; ok is false when there are too many.
func (d *decoder) enter(n *yaml.Node, path string) (_ *yaml.Node, ok bool) {
	for n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	d.budget--
	switch {
	case d.budget < 0:
		if d.budget == -1 {
			d.problem(n.Line, path, "the document has more than %d values; write out its aliases and shorten it", maxValues)
		}
		return n, false
	case d.depth >= maxDepth:
		d.problem(n.Line, path, "nested deeper than %d levels", maxDepth)
		return n, false
	}
	d.depth++
	return n, true
}

func (d *decoder) leave() { d.depth-- }

// mapping calls each with the keys and values of n, and with the path of each,
// which step makes.
func (d *decoder) mapping(n *yaml.Node, path string, step func(path, key string) string, each func(key, val *yaml.Node, at string)) {
	if n.Kind != yaml.MappingNode {
		d.notMapping(n, path)
		return
	}
	if _, ok := d.lines[path]; !ok {
		d.lines[path] = n.Line
	}
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		if key.Kind == yaml.ScalarNode && key.ShortTag() == "!!merge" {
			d.problem(key.Line, path, "merge keys (<<) are not supported; write the fields out")
			continue
		}
		if key.Kind != yaml.ScalarNode || isNull(key) {
			d.problem(key.Line, path, "found %s as a key; keys are plain text", found(key))
			continue
		}
		at := step(path, key.Value)
		if first, dup := seen[key.Value]; dup {
			d.problem(key.Line, at, "is there twice, first on line %d; keep one", first)
			continue
		}
		seen[key.Value] = key.Line
		if !isNull(val) {
			d.lines[at] = key.Line
		}
		each(key, val, at)
	}
}

func (d *decoder) notMapping(n *yaml.Node, path string) {
	d.problem(n.Line, path, "found %s, expected a mapping (key: value)", found(n))
}

func (d *decoder) list(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.SequenceNode {
		d.problem(n.Line, path, "found %s, expected a list (- item)", found(n))
		return
	}
	for i, item := range n.Content {
		e := reflect.New(v.Type().Elem()).Elem()
		at := path + "[" + strconv.Itoa(i) + "]"
		d.lines[at] = item.Line
		if isNull(item) {
			d.problem(item.Line, at, "is empty; remove it or fill it in")
		}
		d.value(item, e, at)
		v.Set(reflect.Append(v, e))
	}
}

// text decodes the types that read themselves. Their values may be secret, and
// are shown only where they are not.
func (d *decoder) text(n *yaml.Node, u encoding.TextUnmarshaler, path string) {
	_, secret := u.(*node.Secret)
	switch {
	case n.Kind != yaml.ScalarNode && secret:
		d.problem(n.Line, path, "found something that is not text (not shown), expected text")
	case n.Kind != yaml.ScalarNode || u.UnmarshalText([]byte(n.Value)) != nil:
		d.problem(n.Line, path, "found %s, expected %s", found(n), expected(u))
	}
}

func expected(u encoding.TextUnmarshaler) string {
	switch u.(type) {
	case *node.Duration:
		return "a duration such as 15s or 1m30s"
	case *netip.Addr:
		return "an IP address such as 172.16.0.10"
	case *netip.Prefix:
		return "an address range such as 172.16.0.0/20"
	}
	return "text"
}

// free decodes a value of no fixed type to what JSON can carry.
func (d *decoder) free(n *yaml.Node, path string) any {
	n, ok := d.enter(n, path)
	if !ok {
		return nil
	}
	defer d.leave()
	switch n.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		d.mapping(n, path, join, func(key, val *yaml.Node, at string) { m[key.Value] = d.free(val, at) })
		return m
	case yaml.SequenceNode:
		l := make([]any, len(n.Content))
		for i, item := range n.Content {
			l[i] = d.free(item, path+"["+strconv.Itoa(i)+"]")
		}
		return l
	}
	switch n.ShortTag() {
	case "!!bool", "!!int", "!!float", "!!null":
		var x any
		if err := n.Decode(&x); err != nil {
			d.problem(n.Line, path, "found %s that cannot be read", found(n))
		}
		d.number(n, x, path)
		return x
	}
	return n.Value
}

// maxExact is the greatest number up to which JSON's readers tell all integers
// apart. Source: RFC 8259, 6.
const maxExact = 1 << 53

// number reports a number that would not be read back as it stands.
func (d *decoder) number(n *yaml.Node, x any, path string) {
	large := false
	switch x := x.(type) {
	case float64:
		if math.IsNaN(x) || math.IsInf(x, 0) {
			d.problem(n.Line, path, "found %s, expected a finite number", found(n))
			return
		}
		large = n.ShortTag() == "!!int"
	case int:
		large = x > maxExact || x < -maxExact
	case uint64:
		large = true // yaml takes int for what fits in one
	}
	switch {
	case large:
		d.problem(n.Line, path, "found %s, expected one of at most %d", found(n), maxExact)
	case n.ShortTag() == "!!int" && octal(n.Value):
		d.octal(n, path)
	}
}

// octal reports whether YAML takes what looks like a decimal number for an octal one.
func octal(text string) bool {
	digits := strings.TrimLeft(text, "+-")
	return len(digits) > 1 && digits[0] == '0' && strings.Trim(digits, "0123456789_") == ""
}

func (d *decoder) octal(n *yaml.Node, path string) {
	d.problem(n.Line, path, "found %s, which YAML takes for octal; write it without leading zeros", found(n))
}

func fieldByKey(v reflect.Value, key string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("yaml") == key {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

func keys(t reflect.Type) []string {
	var ks []string
	for i := range t.NumField() {
		ks = append(ks, t.Field(i).Tag.Get("yaml"))
	}
	return ks
}

func join(path, key string) string {
	if !plainKey.MatchString(key) {
		key = quote(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// plainKey is what a field may be called; anything else is quoted in paths.
var plainKey = regexp.MustCompile(`^[A-Za-z0-9_.-]{1,60}$`)

// entry is the path of a map's entry, whose key may hold dots.
func entry(path, key string) string { return path + "[" + strconv.Quote(clip(key)) + "]" }

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// found names what a YAML node is, for "found …".
func found(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	switch n.ShortTag() {
	case "!!bool":
		return "the boolean " + clip(n.Value)
	case "!!int", "!!float":
		return "the number " + clip(n.Value)
	case "!!null":
		return "nothing"
	}
	return "the text " + quote(n.Value)
}

// maxShown bounds what a message repeats of the document.
const maxShown = 60

func clip(s string) string {
	if len(s) <= maxShown {
		return s
	}
	return strings.ToValidUTF8(s[:maxShown], "") + "…"
}

func quote(s string) string { return strconv.Quote(clip(s)) }
