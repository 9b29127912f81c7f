package images

import (
	"math"
	"strings"
	"testing"
)

func TestSpaceIsSaidBeforeTheBuild(t *testing.T) {
	b := newBuilder(t)
	if err := b.space(math.MaxUint64); err == nil || !strings.Contains(err.Error(), "TKENODE_CACHE") {
		t.Errorf("error %v", err)
	}
	if err := b.space(0); err != nil {
		t.Error(err)
	}
}
