package node_test

import (
	"crypto/sha256"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

func sealed(t *testing.T) node.Sealed {
	t.Helper()
	cfg := node.Config{
		APIVersion: node.APIVersion, Kind: node.Kind,
		Cluster: node.ClusterConfig{
			ID: "cls-lab00001", BootstrapToken: node.NewSecret("abcdef.0123456789abcdef"),
			ServiceCIDR: netip.MustParsePrefix("172.16.0.0/20"),
		},
		Kubelet: node.KubeletConfig{Config: map[string]any{"maxOpenFiles": float64(1 << 20), "a": map[string]any{"b": "c"}}},
		Metrics: node.MetricsConfig{Interval: node.Duration(15 * time.Second)},
	}
	facts := node.Facts{InstanceID: "ins-lab00001", PrivateIP: netip.MustParseAddr("10.0.0.5"), ZoneID: 100003}
	s, err := node.Seal(1, cfg, facts, time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSealedRoundTrip(t *testing.T) {
	s := sealed(t)
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), "0123456789abcdef\"") || strings.Contains(string(b), "ootstrapToken") {
		t.Errorf("the bootstrap token is in the sealed file:\n%s", b)
	}
	got, err := node.DecodeSealed(b)
	if err != nil {
		t.Fatal(err)
	}
	s.Config.Cluster.BootstrapToken = node.Secret{}
	if !reflect.DeepEqual(got, s) {
		t.Errorf("got  %+v\nwant %+v", got, s)
	}
}

// TestDecodeSealedOfAnotherVersion: what counts is what was sealed, not what this
// program makes of it. The file has a field that is not known here, lacks one that
// is written here, and holds a number that a float64 cannot.
func TestDecodeSealedOfAnotherVersion(t *testing.T) {
	config, facts := `{"apiVersion":"v","kubelet":{"config":{"n":9007199254740993}},"later":[1]}`, `{"instanceID":"ins-lab00001"}`
	sum := sha256.Sum256([]byte(`{"Config":` + config + `,"Facts":` + facts + `}`))
	file := fmt.Sprintf("{\n  \"generation\": 3,\n  \"digest\": \"sha256:%x\",\n  \"config\": %s,\n  \"facts\": %s\n}\n", sum, config, facts)
	if s, err := node.DecodeSealed([]byte(file)); err != nil || s.Generation != 3 || s.Facts.InstanceID != "ins-lab00001" {
		t.Errorf("got %+v, %v", s, err)
	}
}

func TestDecodeSealedRefusesDamage(t *testing.T) {
	b, err := sealed(t).Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, damaged := range map[string]string{
		"empty":   "",
		"cut off": string(b[:len(b)/2]),
		"edited":  strings.Replace(string(b), "cls-lab00001", "cls-lab00002", 1),
		"digest":  strings.Replace(string(b), "sha256:", "sha256:0", 1),
	} {
		if _, err := node.DecodeSealed([]byte(damaged)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
