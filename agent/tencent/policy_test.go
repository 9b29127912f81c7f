package tencent

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestPolicyIsWhatClientCalls reads the actions out of the calls in this
// package's source, so that the policies are neither too narrow nor too wide.
func TestPolicyIsWhatClientCalls(t *testing.T) {
	called := calledActions(t)
	observing := slices.DeleteFunc(slices.Clone(called), func(a string) bool { return !strings.Contains(a, ":Describe") })
	for name, c := range map[string]struct {
		document []byte
		want     []string
	}{"Policy": {Policy, called}, "PolicyObserve": {PolicyObserve, observing}} {
		if got := allowedActions(t, c.document); !slices.Equal(got, c.want) {
			t.Errorf("%s allows\n%s\nClient calls\n%s", name, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
		}
	}
}

func allowedActions(t *testing.T, document []byte) []string {
	t.Helper()
	var policy struct {
		Version   string
		Statement []struct {
			Effect           string
			Action, Resource []string
		}
	}
	if err := json.Unmarshal(document, &policy); err != nil {
		t.Fatal(err)
	}
	if len(policy.Statement) != 1 || policy.Statement[0].Effect != "allow" {
		t.Fatalf("policy has the statements %+v, want one that allows", policy.Statement)
	}
	return policy.Statement[0].Action
}

func calledActions(t *testing.T) []string {
	t.Helper()
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var actions []string
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") {
			continue
		}
		tree, err := parser.ParseFile(token.NewFileSet(), f.Name(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			if sel, ok := call.Fun.(*ast.SelectorExpr); !ok || sel.Sel.Name != "call" {
				return true
			}
			service, ok1 := call.Args[1].(*ast.BasicLit)
			action, ok2 := call.Args[2].(*ast.BasicLit)
			if !ok1 || !ok2 {
				t.Fatalf("%s: a call names its action by other than two literals", f.Name())
			}
			s, _ := strconv.Unquote(service.Value)
			a, _ := strconv.Unquote(action.Value)
			actions = append(actions, "name/"+s+":"+a)
			return true
		})
	}
	slices.Sort(actions)
	return slices.Compact(actions)
}
