//go:build kernel

package eni

import (
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestKernelFight lets a process delete our rule and another one our nftables
// table, again and again: both are repaired, at most so often, and named.
func TestKernelFight(t *testing.T) {
	inNode(t, func(t *testing.T, n *testNode) {
		n.attach("eth1")
		n.converge()
		defer n.serve()()
		defer n.run()()
		web := newPod(t, "web")
		addr := web.add()
		n.await("pod", func() bool { return n.answers(addr) })
		other := newPod(t, "other")
		other.add()
		other.del()
		time.Sleep(200 * time.Millisecond) // until its veth is gone, too
		fights := &n.net.paths.fights
		fights.mu.Lock()
		for kind, c := range fights.culprit {
			t.Errorf("%s: %s is blamed for what is our own", kind, c)
		}
		fights.mu.Unlock()

		ip, say := batch(t, "ip", "-force", "-batch", "-")
		table := exec.Command("sh", "-c", "while sleep 0.02; do nft delete table inet tkenode; done 2>/dev/null")
		must(t, table.Start())
		stop := sync.OnceFunc(func() {
			must(t, table.Process.Kill())
			table.Wait()
		})
		defer stop()
		for began := time.Now(); time.Since(began) < 3*time.Second; time.Sleep(5 * time.Millisecond) {
			say("rule del pref 512")
		}
		c := n.net.Undone()
		if c == nil {
			t.Fatal("no warning")
		}
		t.Log(c.Message)
		for _, want := range []string{
			"rule 512 from all lookup 4000 had to be made ", fmt.Sprintf("Z, undone by ip (pid %d)", ip.Process.Pid),
			"nft table inet tkenode had to be made ", ", undone by nft (pid ",
		} {
			if !strings.Contains(c.Message, want) {
				t.Errorf("message %q, want in it %q", c.Message, want)
			}
		}
		fights.mu.Lock()
		for name, u := range fights.undone {
			// The first few come before it is known to be a fight.
			if most := int(3*time.Second/fightRest) + fightTimes + 1; u.times > most {
				t.Errorf("%s: repaired %d times in 3 s, at most %d are allowed", name, u.times, most)
			}
		}
		fights.mu.Unlock()

		stop()
		n.await("pod after the fight", func() bool { return n.answers(addr) })
		n.await("an empty plan", func() bool { return n.plan().Empty() })
		if c := fights.warning(time.Now().Add(2 * fightQuiet)); c != nil {
			t.Errorf("long after the fight: %s", c.Message)
		}
	})
}

// batch starts a program that carries out one line after the other.
func batch(t *testing.T, name string, args ...string) (*exec.Cmd, func(line string)) {
	cmd := exec.Command(name, args...)
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() {
		in.Close()
		cmd.Wait() // it has failed where there was nothing to delete
	})
	return cmd, func(line string) {
		if _, err := io.WriteString(in, line+"\n"); err != nil {
			t.Error(err)
		}
	}
}
