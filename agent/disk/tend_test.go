package disk

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/agent/tencent"
)

// asked is a cloud that says what a test wants, of a disk alone.
type asked struct {
	Cloud // nil: nothing else is asked for
	disk  tencent.Disk
	err   error
	times int
}

func (a *asked) DescribeDisk(context.Context, string) (tencent.Disk, error) {
	a.times++
	return a.disk, a.err
}

// TestBehind: the cloud is asked soon after the start and then rarely, an encrypted
// disk is warned of at once, another one once it is sure, and neither when the
// guest has seen the new size.
func TestBehind(t *testing.T) {
	const id = "disk-abc12345"
	for name, c := range map[string]struct {
		disk        tencent.Disk
		err         error
		soon, later string // reasons after a minute, and after ten
		times       int    // that the cloud was asked in a day
	}{
		"as large":         {disk: tencent.Disk{ID: id, SizeGiB: 20}, times: 5},
		"encrypted":        {disk: tencent.Disk{ID: id, SizeGiB: 40, Encrypt: true}, soon: ReasonNeedsReattach, later: ReasonNeedsReattach, times: 5},
		"not seen":         {disk: tencent.Disk{ID: id, SizeGiB: 40}, later: ReasonNotSeen, times: 6},
		"smaller":          {disk: tencent.Disk{ID: id, SizeGiB: 10, Encrypt: true}, times: 5},
		"of another disk":  {disk: tencent.Disk{ID: "disk-other000", SizeGiB: 40, Encrypt: true}, times: 5},
		"the role may not": {err: errors.New("AuthFailure.UnauthorizedOperation"), times: 5},
	} {
		synctest.Test(t, func(t *testing.T) {
			cloud := &asked{disk: c.disk, err: c.err}
			var log strings.Builder
			d := New(Options{Want: node.DiskConfig{DiskID: id, MountPoint: "/data"}, Cloud: cloud, Ledger: t.TempDir(), Log: slog.New(slog.NewTextHandler(&log, nil))})
			d.sys = t.TempDir()
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { d.Tend(ctx); close(ended) }()
			time.Sleep(time.Hour)
			if cloud.times > 0 {
				t.Errorf("%s: asked while it is not mounted", name)
			}
			d.account.stand(State{DiskID: id, Device: "/dev/vdb", SizeBytes: 20 << 30, State: Mounted}, nil)
			reason := func(after time.Duration) string {
				time.Sleep(after)
				synctest.Wait()
				w := Warnings([]State{d.State()})
				if len(w) == 0 {
					return ""
				}
				return w[0].Reason
			}
			if got := reason(time.Minute); got != c.soon {
				t.Errorf("%s: %q after a minute, want %q", name, got, c.soon)
			}
			since := time.Time{}
			if w := d.State().Warnings; len(w) > 0 {
				since = w[0].Since
			}
			if got := reason(10 * time.Minute); got != c.later {
				t.Errorf("%s: %q after ten minutes, want %q", name, got, c.later)
			}
			if w := d.State().Warnings; len(w) > 0 && (w[0].Since.IsZero() || c.soon != "" && !w[0].Since.Equal(since)) {
				t.Errorf("%s: since %s, then since %s", name, since, w[0].Since)
			}
			time.Sleep(24*time.Hour - 11*time.Minute)
			synctest.Wait()
			if cloud.times < c.times-1 || cloud.times > c.times+1 {
				t.Errorf("%s: asked %d times in a day, want about %d", name, cloud.times, c.times)
			}
			if said := strings.Contains(log.String(), "level=WARN"); said != (c.later != "") {
				t.Errorf("%s: log\n%s", name, &log)
			}
			d.account.stand(State{DiskID: id, Device: "/dev/vdc", SizeBytes: 40 << 30, State: Mounted}, nil)
			if got := reason(0); got != "" {
				t.Errorf("%s: %q when the guest has seen it", name, got)
			}
			cancel()
			<-ended
		})
	}
}
