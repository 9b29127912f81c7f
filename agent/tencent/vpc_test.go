package tencent

import (
	"encoding/json"
	"testing"
)

// TestENIStates: an attached ENI is AVAILABLE, whichever of the two fields says so
// and in which word.
func TestENIStates(t *testing.T) {
	for text, want := range map[string]struct {
		state    string
		attached bool
	}{
		`{"State":"AVAILABLE","Attachment":{"InstanceId":"ins-1"}}`:                                 {StateAvailable, true},
		`{"State":"AVAILABLE","NetworkInterfaceState":"INUSE","Attachment":{"InstanceId":"ins-1"}}`: {StateAvailable, true},
		`{"NetworkInterfaceState":"INUSE","Attachment":{"InstanceId":"ins-1"}}`:                     {StateAvailable, true},
		`{"State":"INUSE","Attachment":{"InstanceId":"ins-2"}}`:                                     {StateAvailable, false},
		`{"NetworkInterfaceState":"AVAILABLE"}`:                                                     {StateAvailable, false},
		`{"State":"DETACHING","NetworkInterfaceState":"INUSE","Attachment":{"InstanceId":"ins-1"}}`: {StateDetaching, false},
		`{"State":"SOMETHING","Attachment":{"InstanceId":"ins-1"}}`:                                 {"SOMETHING", false},
	} {
		var e ENI
		if err := json.Unmarshal([]byte(text), &e); err != nil {
			t.Fatal(err)
		}
		if e = e.plain(); e.State != want.state || e.AttachedTo("ins-1") != want.attached {
			t.Errorf("%s: state %s, attached %v; want %+v", text, e.State, e.AttachedTo("ins-1"), want)
		}
	}
}
