package cloud_test

import (
	"errors"
	"net/netip"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// TestENILife follows one ENI through its life with the delays of the lab, seen
// through the agent's client.
func TestENILife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, cloud.Default()), t.Context()
		state := func(want string, n int) tencent.ENI {
			t.Helper()
			got, err := l.api.DescribeTaggedENIs(ctx, map[string]string{"tkenode": "cls-lab00001"})
			if err != nil || len(got) != n || n == 1 && got[0].State != want {
				t.Fatalf("after %s described as %+v, %v; want %d %s", time.Now(), got, err, n, want)
			}
			if n == 0 {
				return tencent.ENI{}
			}
			return got[0]
		}
		eni, task, err := l.api.CreateENI(ctx, spec("create"))
		if err != nil || eni.State != tencent.StatePending || len(eni.IPs) != 1 {
			t.Fatalf("created %+v, %v", eni, err)
		}
		state("", 0) // not visible yet
		l.await(t, task, nil)
		time.Sleep(2 * time.Second)
		state(tencent.StateAvailable, 1)

		start := time.Now()
		task, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, "attach")
		if err != nil {
			t.Fatal(err)
		}
		state(tencent.StateAvailable, 1) // the change is not visible yet
		time.Sleep(2 * time.Second)
		if e := state(tencent.StateAttaching, 1); e.AttachedTo(l.instance.ID) || e.Attachment == nil {
			t.Errorf("while it attaches: %+v", e)
		}
		l.await(t, task, nil)
		if d := time.Since(start); d < 3*time.Second || d > 3200*time.Millisecond {
			t.Errorf("attach took %s", d)
		}
		if l.machines.holds(eni.ID) != l.instance.ID || len(l.machines.addrs(eni.ID)) != 1 {
			t.Error("the NIC is not plugged")
		}
		time.Sleep(2 * time.Second)
		if e := state(tencent.StateAvailable, 1); !e.AttachedTo(l.instance.ID) || e.Attachment.DeviceIndex != 1 {
			t.Errorf("after it attached: %+v", e)
		}
		if enis, err := l.api.DescribeENIs(ctx, l.instance.ID); err != nil || len(enis) != 2 {
			t.Errorf("the instance has %+v, %v", enis, err)
		}

		ips, task, err := l.api.AssignIPs(ctx, eni.ID, 8, "assign")
		if err != nil || len(ips) != 8 || ips[0].State != tencent.StatePending {
			t.Fatalf("assigned %+v, %v", ips, err)
		}
		if n := len(l.machines.addrs(eni.ID)); n != 1 {
			t.Errorf("packets may carry %d addresses while 8 are PENDING", n)
		}
		l.await(t, task, nil)
		if n := len(l.machines.addrs(eni.ID)); n != 9 {
			t.Errorf("packets may carry %d addresses, want 9", n)
		}
		task, err = l.api.UnassignIPs(ctx, eni.ID, []netip.Addr{ips[0].Addr, ips[1].Addr})
		l.await(t, task, err)
		time.Sleep(2 * time.Second)
		if e := state(tencent.StateAvailable, 1); len(e.IPs) != 7 || e.IPs[1].State != tencent.StateAvailable {
			t.Errorf("after unassigning two: %+v", e.IPs)
		}

		if _, err = l.api.DeleteENI(ctx, eni.ID); code(err) != "ResourceInUse" {
			t.Errorf("delete of an attached ENI: %v", err)
		}
		task, err = l.api.DetachENI(ctx, eni.ID, l.instance.ID, "detach")
		l.await(t, task, err)
		if l.machines.holds(eni.ID) != "" || l.machines.addrs(eni.ID) != nil {
			t.Error("the NIC or its port is still there")
		}
		task, err = l.api.DeleteENI(ctx, eni.ID)
		l.await(t, task, err)
		time.Sleep(2 * time.Second)
		state("", 0)
		subnets, err := l.api.DescribeSubnets(ctx, []string{"subnet-pods0001"})
		if err != nil || len(subnets) != 1 || subnets[0].AvailableIPs != 4093 {
			t.Errorf("subnet %+v, %v: want all of its 4093 addresses back", subnets, err)
		}
	})
}

func TestENIRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, cloud.Default()), t.Context()
		eni := l.attached(t, "one")
		_, task, err := l.api.AssignIPs(ctx, eni.ID, 1, "a1")
		if err != nil {
			t.Fatal(err)
		}
		refused := func(what, want string, err error) {
			t.Helper()
			if code(err) != want {
				t.Errorf("%s: %v, want %s", what, err, want)
			}
		}
		_, _, err = l.api.AssignIPs(ctx, eni.ID, 1, "a2")
		refused("assign while assigning", tencent.CodeMutexTaskRunning, err)
		_, err = l.api.DetachENI(ctx, eni.ID, l.instance.ID, "d1")
		refused("detach while assigning", "UnsupportedOperation.InvalidState", err)
		l.await(t, task, nil)
		_, _, err = l.api.AssignIPs(ctx, eni.ID, 9, "a3")
		refused("assign beyond the quota", "LimitExceeded", err)
		_, _, err = l.api.AssignIPs(ctx, "eni-00000000", 1, "a4")
		refused("assign to no ENI", tencent.CodeNotFound, err)
		_, err = l.api.UnassignIPs(ctx, eni.ID, []netip.Addr{netip.MustParseAddr("10.0.16.99")})
		refused("unassign what is not there", tencent.CodeNotFound, err)
		_, err = l.api.UnassignIPs(ctx, eni.ID, []netip.Addr{eni.IPs[0].Addr})
		refused("unassign the primary", "UnsupportedOperation", err)
		_, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, "t1")
		refused("attach again", tencent.CodeAttachmentAlreadyExists, err)

		spare, task, err := l.api.CreateENI(ctx, spec("two"))
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.api.AttachENI(ctx, spare.ID, l.instance.ID, "t2")
		refused("attach while PENDING", "UnsupportedOperation.InvalidState", err)
		l.await(t, task, nil)
		_, err = l.api.AttachENI(ctx, spare.ID, "ins-00000000", "t3")
		refused("attach to no instance", tencent.CodeNotFound, err)
		_, err = l.api.DetachENI(ctx, spare.ID, l.instance.ID, "d2")
		refused("detach what is not attached", "UnsupportedOperation.InvalidState", err)
		_, err = l.api.TaskResult(ctx, "no-such-task")
		refused("result of no task", tencent.CodeNotFound, err)

		bad := spec("three")
		bad.SubnetID = "subnet-00000000"
		_, _, err = l.api.CreateENI(ctx, bad)
		refused("create in no subnet", tencent.CodeNotFound, err)
	})
}

func TestENIQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, instant()), t.Context()
		limit, err := l.api.ENILimit(ctx, l.instance.ID)
		if err != nil || limit != (tencent.ENILimit{ENIs: 4, IPsPerENI: 10}) {
			t.Fatalf("limit %+v, %v", limit, err)
		}
		for i := 1; i < limit.ENIs; i++ {
			l.attached(t, "eni"+strconv.Itoa(i))
		}
		eni, task, err := l.api.CreateENI(ctx, spec("more"))
		l.await(t, task, err)
		if _, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, "more"); code(err) != "LimitExceeded" {
			t.Errorf("ENI beyond the quota: %v", err)
		}
	})
}

func TestSubnetExhausted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := instant()
		config.Subnets[1].CIDR = netip.MustParsePrefix("10.0.16.0/29") // .2 to .6
		l := newLab(t, config)
		eni, task, err := l.api.CreateENI(t.Context(), spec("c"))
		l.await(t, task, err)
		if eni.IPs[0].Addr != netip.MustParseAddr("10.0.16.2") {
			t.Errorf("first address %s", eni.IPs[0].Addr)
		}
		if _, _, err = l.api.AssignIPs(t.Context(), eni.ID, 5, "a"); code(err) != tencent.CodeSubnetExhausted {
			t.Errorf("5 of 4 addresses: %v", err)
		}
		ips, task, err := l.api.AssignIPs(t.Context(), eni.ID, 4, "b")
		l.await(t, task, err)
		if last := ips[3].Addr; last != netip.MustParseAddr("10.0.16.6") {
			t.Errorf("last address %s, want the one before broadcast", last)
		}
	})
}

// TestPlugFails: a NIC that the machine does not take leaves nothing behind.
func TestPlugFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, instant()), t.Context()
		eni, task, err := l.api.CreateENI(ctx, spec("c"))
		l.await(t, task, err)
		l.machines.fail = errors.New("no slot")
		task, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, "a")
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		got, err := l.api.TaskResult(ctx, task)
		if err != nil || got.Status != tencent.TaskFailed || got.Output != "no slot" {
			t.Errorf("task %+v, %v", got, err)
		}
		if l.machines.addrs(eni.ID) != nil {
			t.Error("the port is still there")
		}
		task, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, "b")
		l.await(t, task, err)
		l.machines.fail = errors.New("guest keeps it")
		task, err = l.api.DetachENI(ctx, eni.ID, l.instance.ID, "d")
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		enis, err := l.api.DescribeENIs(ctx, l.instance.ID)
		if err != nil || len(enis) != 2 || l.machines.addrs(eni.ID) == nil {
			t.Errorf("after a failed detach the instance has %+v, %v", enis, err)
		}
		if got, err := l.api.TaskResult(ctx, task); err != nil || got.Status != tencent.TaskFailed {
			t.Errorf("detach task %+v, %v", got, err)
		}
	})
}

// TestTaskFaults: a task that is stuck, one that vanishes, and one that gives less
// than was asked for.
func TestTaskFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, instant()), t.Context()
		eni := l.attached(t, "one")
		status := func(task string) string {
			t.Helper()
			got, err := l.api.TaskResult(ctx, task)
			if err != nil {
				return code(err)
			}
			return got.Status
		}
		now := func() cloud.ENI {
			for _, e := range l.Snapshot().ENIs {
				if e.ID == eni.ID {
					return e
				}
			}
			return cloud.ENI{}
		}

		l.Inject(cloud.Fault{Action: "vpc:AssignPrivateIpAddresses", Partial: 3})
		ips, task, err := l.api.AssignIPs(ctx, eni.ID, 5, "partial")
		l.await(t, task, err)
		if len(ips) != 2 || len(now().IPs) != 3 {
			t.Errorf("partial: %d addresses, and the ENI has %d", len(ips), len(now().IPs))
		}

		l.Inject(cloud.Fault{Action: "vpc:DetachNetworkInterface", Stuck: 5 * time.Minute})
		task, err = l.api.DetachENI(ctx, eni.ID, l.instance.ID, "stuck")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(299 * time.Second)
		if status(task) != tencent.TaskRunning || now().State != tencent.StateDetaching {
			t.Errorf("stuck: %s, the ENI is %s", status(task), now().State)
		}
		time.Sleep(2 * time.Second)
		if status(task) != tencent.TaskSuccess || now().Instance != "" {
			t.Errorf("no longer stuck: %s, the ENI is of %q", status(task), now().Instance)
		}

		for _, c := range []struct {
			action string
			call   func() (string, error)
		}{
			{"AttachNetworkInterface", func() (string, error) { return l.api.AttachENI(ctx, eni.ID, l.instance.ID, "vanish") }},
			{"UnassignPrivateIpAddresses", func() (string, error) { return l.api.UnassignIPs(ctx, eni.ID, []netip.Addr{ips[0].Addr}) }},
			{"DeleteNetworkInterface", func() (string, error) { return l.api.DeleteENI(ctx, eni.ID) }},
		} {
			before := now()
			l.Inject(cloud.Fault{Action: "vpc:" + c.action, Vanish: true})
			task, err := c.call()
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			if status(task) != tencent.CodeNotFound || now().State != tencent.StateAvailable || now().Instance != before.Instance || len(now().IPs) != len(before.IPs) {
				t.Errorf("%s vanished: task %s, before %+v, after %+v", c.action, status(task), before, now())
			}
		}
	})
}
