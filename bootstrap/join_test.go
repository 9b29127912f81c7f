package bootstrap

import (
	"bytes"
	"testing"
)

// TestNewClientKey: two machines that draw the same random numbers do not share a key.
func TestNewClientKey(t *testing.T) {
	random := bytes.Repeat([]byte{7}, 32)
	one, err := newClientKey(bytes.NewReader(random), "ins-00000001")
	if err != nil {
		t.Fatal(err)
	}
	other, err := newClientKey(bytes.NewReader(random), "ins-00000002")
	if err != nil {
		t.Fatal(err)
	}
	if one.Equal(other) {
		t.Error("two instances have one key")
	}
	random[0]++
	later, err := newClientKey(bytes.NewReader(random), "ins-00000001")
	if err != nil {
		t.Fatal(err)
	}
	if one.Equal(later) {
		t.Error("an instance has the same key with other random numbers")
	}
	if _, err := newClientKey(bytes.NewReader(random[:31]), "ins-00000001"); err == nil {
		t.Error("a key of too few random numbers")
	}
}
