package cloud

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestTable: what was so a while ago can be seen for ten minutes, and takes no
// memory after that.
func TestTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var rows table[string]
		ago := func(d time.Duration, want string) {
			t.Helper()
			if got := fmt.Sprint(rows.asOf(time.Now().Add(-d))); got != want {
				t.Errorf("%s ago: %s, want %s", d, got, want)
			}
		}
		rows.put("b", "b1")
		ago(time.Nanosecond, "[]")
		time.Sleep(time.Second)
		rows.put("a", "a1")
		rows.put("b", "b2")
		ago(0, "[a1 b2]")
		ago(time.Second, "[b1]")
		time.Sleep(time.Second)
		rows.drop("b")
		ago(0, "[a1]")
		ago(time.Second, "[a1 b2]")
		if _, ok := rows.get("b"); ok {
			t.Error("a dropped row is there")
		}
		for range 100 {
			time.Sleep(time.Minute)
			rows.put("a", "a2")
		}
		ago(remembered, "[a2]")
		if len(rows.rows) != 1 || len(rows.rows["a"]) > 12 {
			t.Errorf("%d rows, %d versions are kept", len(rows.rows), len(rows.rows["a"]))
		}
	})
}
