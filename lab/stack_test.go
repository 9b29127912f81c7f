//go:build node

package lab

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tkenode/tkenode/agent/node"
	"github.com/tkenode/tkenode/lab/cloud"
	"github.com/tkenode/tkenode/lab/cvm"
)

// stacks is a node with three disks that are one at /data, and an encrypted one at
// /secret.
type stacks struct {
	*Lab
	t *testing.T
	c *CVM
}

const (
	stripe0, stripe1, stripe2 = "disk-stripe00", "disk-stripe01", "disk-stripe02"
	secretDisk                = "disk-secret00"
)

var stackDisks = []string{stripe0, stripe1, stripe2, secretDisk}

const stackConfig = `disks:
  - diskIDs: [` + stripe0 + `, ` + stripe1 + `, ` + stripe2 + `]
    fileSystem: ext4
    mountPoint: /data
  - diskID: ` + secretDisk + `
    fileSystem: ext4
    mountPoint: /secret
    encryption:
      keyFrom: instance
`

// killers stand in the way of the programs that make a stack, and kill the agent, once
// each: when the ledger is written; when one disk of three has a superblock; when the
// array is made, and no file system; when that is made, and the ledger does not say so;
// when there is a LUKS header; when it is open.
const killers = `
mkdir -p /usr/local/sbin /run/killed
cat > /usr/local/sbin/mdadm <<'END'
#!/bin/sh
once() { [ "$1" = --create ] && [ ! -e /run/killed/$2 ] && touch /run/killed/$2; }
if once "$1" ledger; then kill -9 $PPID; exit 1; fi
if once "$1" one-superblock; then
	/sbin/mdadm "$@" || exit
	kill -9 $PPID
	echo clear > /sys/block/${2#/dev/}/md/array_state
	for fd in 4 5; do dd if=/dev/zero of=/proc/self/fd/$fd bs=4096 seek=1 count=1 conv=notrunc,fsync; done
	exit 1
fi
if once "$1" array; then /sbin/mdadm "$@" || exit; kill -9 $PPID; exit 1; fi
exec /sbin/mdadm "$@"
END
cat > /usr/local/sbin/mkfs.ext4 <<'END'
#!/bin/sh
/sbin/mkfs.ext4 "$@" || exit
if [ ! -e /run/killed/file-system ]; then touch /run/killed/file-system; kill -9 $PPID; exit 1; fi
END
cat > /usr/local/sbin/cryptsetup <<'END'
#!/bin/sh
/sbin/cryptsetup "$@" || exit
case "$1" in luksFormat | open)
	if [ ! -e /run/killed/$1 ]; then touch /run/killed/$1; kill -9 $PPID; exit 1; fi
esac
END
chmod +x /usr/local/sbin/*`

// TestCampaignDiskStack: a stripe and an encrypted disk are made by an agent that is killed
// at every step of it, live through what happens to machines, and are left alone when
// a disk is not what it was.
func TestCampaignDiskStack(t *testing.T) {
	l := startLab(t)
	if err := l.FromSnapshot(within(t, 8*time.Minute), 2); err != nil {
		t.Fatal(err)
	}
	n := &stacks{l, t, launchWith(t, l, stackConfig)}
	began := time.Now()
	for _, step := range []struct {
		name string
		run  func()
	}{{"made", n.make}, {"restarted", n.restart}, {"grown", n.grow}, {"power cycle", n.powerCycle}, {"torn out", n.tornOut}, {"swapped", n.swap}, {"keys", n.keys}} {
		step.run()
		t.Logf("%s after %s", step.name, time.Since(began).Round(time.Second))
	}
}

// TestCampaignDiskStackLent: the agent attaches the disks of a stripe, and gives them back,
// with nothing standing on them, once the NodeConfig no longer lists it.
func TestCampaignDiskStackLent(t *testing.T) {
	l := startLab(t)
	if err := l.FromSnapshot(within(t, 8*time.Minute), 2); err != nil {
		t.Fatal(err)
	}
	one, two := l.Region.CreateDisk("", cloud.DiskSpec{SizeGiB: 1}).ID, l.Region.CreateDisk("", cloud.DiskSpec{SizeGiB: 1}).ID
	n := &stacks{l, t, launchWith(t, l, fmt.Sprintf("disks:\n  - {diskIDs: [%s, %s], attach: true, fileSystem: xfs, mountPoint: /lent, encryption: {keyFrom: instance}}\n", one, two))}
	ready(t, l, n.c, 12*time.Minute)
	converged(t, l, n.c)
	n.until("findmnt -rno TARGET,SOURCE,FSTYPE /lent; tkenode explain disk "+two, "/lent /dev/dm-0 xfs", "and attached by the agent", "layer raid0 /dev/md128 of 2 disks", "layer LUKS2 /dev/dm-0")
	n.sh(without(t, l, n.c, two) + "; systemctl restart tkenode-bootstrap tkenode-agent")
	givenBack(t, l, n.c, one, two)
	converged(t, l, n.c)
	if out := n.sh("findmnt /lent; ls -d /sys/block/dm-* 2>/dev/null; cat /sys/block/md*/md/array_state 2>/dev/null | grep -v clear; ls /var/lib/tkenode/disk | grep attached; true"); out != "" {
		t.Errorf("of what was lent there is:\n%s", out)
	}
}

func (n *stacks) sh(command string) string {
	n.t.Helper()
	return n.mustRun(n.t, n.c, command)
}

// plug plugs a disk, which is small and blank if it was never there.
func (n *stacks) plug(id string) {
	n.t.Helper()
	f, err := os.OpenFile(n.host.diskPath(id), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		err = errors.Join(f.Truncate(128<<20), f.Close())
	}
	if err == nil || errors.Is(err, fs.ErrExist) {
		err = n.host.PlugDisk(within(n.t, time.Minute), n.c.ID, cloud.Volume{Disk: id})
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *stacks) unplug(id string) {
	n.t.Helper()
	if err := n.host.UnplugDisk(within(n.t, time.Minute), n.c.ID, id); err != nil {
		n.t.Fatal(err)
	}
}

// until waits until a command prints all of want.
func (n *stacks) until(command string, want ...string) {
	n.t.Helper()
	ctx := within(n.t, 3*time.Minute)
	for {
		out := n.sh(command + " || true")
		missing := slices.DeleteFunc(slices.Clone(want), func(w string) bool { return strings.Contains(strings.Join(strings.Fields(out), " "), w) })
		if len(missing) == 0 {
			return
		}
		if ctx.Err() != nil {
			n.t.Fatalf("%s: never %q in\n%s\n%s", command, missing, out,
				n.sh("tkenode disks; lsblk; cat /proc/mdstat; ls -A /run/killed; journalctl -b -u tkenode-agent -o cat --no-pager | grep -i disk | tail -60"))
		}
		time.Sleep(300 * time.Millisecond)
	}
}

const where = "findmnt -rno TARGET,SOURCE,FSTYPE /data; findmnt -rno TARGET,SOURCE,FSTYPE /secret"

// kept waits for both mounts and looks at what was written.
func (n *stacks) kept() {
	n.t.Helper()
	n.until(where, "/data /dev/md128 ext4", "/secret /dev/dm-0 ext4")
	n.sh("sha256sum --quiet -c /root/sums")
	if got := n.sh("tkenode plan | grep -A3 ^disk/ || true"); got != "" {
		n.t.Errorf("still planned:\n%s", got)
	}
	for unit, what := range map[string]string{"data.mount": "/dev/md128", "secret.mount": "/dev/dm-0"} {
		want := "FragmentPath=/run/systemd/system/" + unit + " ActiveState=active NeedDaemonReload=no What=" + what
		n.until("systemctl show -p FragmentPath -p ActiveState -p NeedDaemonReload -p What "+unit+" | sort -t= -k1,1", strings.Fields(want)...)
	}
}

func (n *stacks) make() {
	n.sh(killers)
	for _, id := range stackDisks {
		n.plug(id)
	}
	n.until(where, "/data /dev/md128 ext4", "/secret /dev/dm-0 ext4")
	if got := n.sh("ls -A /run/killed | xargs"); got != "array file-system ledger luksFormat one-superblock open" {
		n.t.Errorf("the agent was killed at: %s", got)
	}
	n.t.Logf("made:\n%s", n.sh("systemctl show -p NRestarts tkenode-agent; tkenode disks; tkenode explain disk "+stripe1+"; tkenode explain disk "+secretDisk+"; cat /proc/mdstat; journalctl -b -u tkenode-agent -o cat --no-pager | grep -iE 'disk|format' | tail -50"))
	n.sh("for d in data secret; do head -c 20M /dev/urandom > /$d/file; done; sha256sum /data/file /secret/file > /root/sums; rm -r /usr/local/sbin/*; sync")
	ready(n.t, n.Lab, n.c, 12*time.Minute)
	// The key is nowhere that a program's arguments or the log would be.
	if got := n.sh("k=$(od -An -tx1 -v /var/lib/tkenode/disk/" + secretDisk + ".key | tr -d ' \n' | head -c 32); journalctl -b -o cat | grep -c $k || true"); got != "0" {
		n.t.Errorf("the journal has the key %s times", got)
	}
}

func (n *stacks) restart() {
	n.sh("systemctl restart tkenode-agent")
	n.kept()
}

// grow makes disks larger under their mounts: what is encrypted follows, a stripe says
// that it does not.
func (n *stacks) grow() {
	n.resize(secretDisk, 384<<20)
	n.resize(stripe0, 384<<20)
	n.atLeast("/secret", 320)
	n.until("tkenode disks", "GrowRefused: the stripe on /data uses", "of "+stripe0+" (/dev/vd", "unused: a stripe does not grow")
	n.kept()
}

func (n *stacks) resize(id string, size int64) {
	n.t.Helper()
	m, err := n.host.machine(n.c.ID)
	if err == nil {
		err = m.ResizeDisk(within(n.t, time.Minute), id, size)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// atLeast waits until a file system has so many MiB.
func (n *stacks) atLeast(dir string, mib int) {
	n.t.Helper()
	n.until(fmt.Sprintf("[ $(($(stat -f -c '%%b*%%S' %s) >> 20)) -ge %d ] && echo grown", dir, mib), "grown")
}

// powerCycle cuts the power, and starts the machine with the disks in another order,
// one of them larger and one missing.
func (n *stacks) powerCycle() {
	m, err := n.host.machine(n.c.ID)
	if err == nil {
		err = errors.Join(n.host.Destroy(within(n.t, time.Minute), n.c.ID), os.Truncate(n.host.diskPath(secretDisk), 640<<20))
	}
	if err != nil {
		n.t.Fatal(err)
	}
	spec := m.spec
	spec.Disks = nil
	for _, id := range []string{secretDisk, stripe2, stripe0} {
		spec.Disks = append(spec.Disks, cvm.Disk{ID: id, Path: n.host.diskPath(id)})
	}
	if err := n.host.start(within(n.t, time.Minute), spec, n.c.Timeline); err != nil {
		n.t.Fatal(err)
	}
	n.until("tkenode disks", "Absent", stripe1+" is not attached", "never used without one of them")
	n.until(where, "/secret /dev/dm-0 ext4")
	if got := n.sh("findmnt /data; ls -d /sys/block/md* 2>/dev/null; true"); got != "" {
		n.t.Errorf("with a disk missing there is:\n%s", got)
	}
	n.atLeast("/secret", 560)
	n.plug(stripe1)
	n.kept()
}

// tornOut takes a disk of the stripe, and the encrypted one, away under their mounts:
// the node is fenced, and is as before once they are back.
func (n *stacks) tornOut() {
	n.sh("sync")
	fleet := &losses{n.Lab, n.t, n.c}
	fleet.cordoned(n.t, false)
	m, err := n.host.machine(n.c.ID)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, id := range []string{stripe2, secretDisk} {
		if err := m.PullDisk(within(n.t, time.Minute), id); err != nil {
			n.t.Fatal(err)
		}
	}
	fleet.cordoned(n.t, true)
	fleet.condition(n.t, node.IOError, node.True, "DiskGone")
	n.until("tkenode disks",
		stripe0+"+"+stripe1+"+"+stripe2+", which was mounted on /data, is gone since", "of "+stripe2+" its block device",
		secretDisk+", which was mounted on /secret, is gone since", "of "+secretDisk+" its block device")
	if out := n.sh("findmnt /data; findmnt /secret; touch /data/beneath /secret/beneath 2>/dev/null && echo written || true"); out != "" {
		n.t.Errorf("the bare directories: %s", out)
	}
	n.plug(stripe2)
	n.plug(secretDisk)
	fleet.cordoned(n.t, false)
	fleet.condition(n.t, node.IOError, node.False, "DiskAnswers")
	n.kept()
}

// down takes a stack apart that the agent is not there to put together again.
const down = `systemctl stop tkenode-agent
for i in 1 2 3 4 5; do umount /data && break; sleep 1; done
for i in 1 2 3 4 5; do echo clear > /sys/block/md128/md/array_state && break; sleep 1; done`

// swap puts a blank disk, and then somebody's, in the place of a disk of the stripe.
func (n *stacks) swap() {
	n.sh("sync; " + down)
	n.unplug(stripe1)
	path := n.host.diskPath(stripe1)
	if err := os.Rename(path, path+".right"); err != nil {
		n.t.Fatal(err)
	}
	before := n.hashes(stripe0, stripe2)
	n.plug(stripe1) // of which there is no file now
	n.sh("systemctl start tkenode-agent")
	n.until("tkenode disks", "Lost", stripe1+" (/dev/vd", "read as blank", "tkenode disk format "+stripe0)
	n.unplug(stripe1)
	if st, err := os.Stat(path); err != nil || st.Sys().(*syscall.Stat_t).Blocks != 0 {
		n.t.Errorf("the blank disk was written to: %v", err)
	}
	if !bytes.Equal(before, n.hashes(stripe0, stripe2)) {
		n.t.Error("the other disks of the stripe were written to")
	}
	if err := os.Rename(path+".right", path); err != nil {
		n.t.Fatal(err)
	}
	n.plug(stripe1)
	n.kept()
}

func (n *stacks) hashes(ids ...string) []byte {
	n.t.Helper()
	h := sha256.New()
	for _, id := range ids {
		f, err := os.Open(n.host.diskPath(id))
		if err == nil {
			_, err = io.Copy(h, f)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			n.t.Fatal(err)
		}
	}
	return h.Sum(nil)
}

// keys takes the key away, and then puts another one in its place.
func (n *stacks) keys() {
	const key = "/var/lib/tkenode/disk/" + secretDisk + ".key"
	n.sh("systemctl stop tkenode-agent; umount /secret; cryptsetup close tke-secret00; mv " + key + " /root/key")
	before := n.hashes(secretDisk)
	n.sh("systemctl start tkenode-agent")
	n.until("tkenode disks", "KeyLost", "system disk which is no more")
	n.sh("systemctl stop tkenode-agent; (umask 077; head -c 32 /dev/urandom > " + key + "); systemctl start tkenode-agent")
	n.until("tkenode disks", "WrongKey", "does not open "+secretDisk)
	if !bytes.Equal(before, n.hashes(secretDisk)) {
		n.t.Error("the disk was written to")
	}
	n.sh("systemctl stop tkenode-agent; mv /root/key " + key + "; systemctl start tkenode-agent")
	n.kept()
}
