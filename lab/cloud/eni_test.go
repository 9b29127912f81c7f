package cloud_test

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tkenode/tkenode/agent/tencent"
	"github.com/tkenode/tkenode/lab/cloud"
)

// TestENILife follows one ENI through its life with the delays of the lab. It is
// created by the SDK, since the agent's client attaches what it creates.
func TestENILife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newSDK(t, cloud.Default()), t.Context()
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
		id, pending, task, err := l.create("create", "tkenode")
		if err != nil || pending != tencent.StatePending {
			t.Fatalf("created %s, %s, %v", id, pending, err)
		}
		state("", 0) // not visible yet
		l.await(t, task, nil)
		time.Sleep(2 * time.Second)
		eni := state(tencent.StateAvailable, 1)
		if eni.ID != id || eni.Attachment != nil || len(eni.IPs) != 1 {
			t.Errorf("created %+v", eni)
		}

		start := time.Now()
		task, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, 0, "attach")
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

// TestENICreatedAndAttached follows an ENI that is created and attached in one call:
// it is PENDING as long as a creation takes and ATTACHING as long as an attachment.
func TestENICreatedAndAttached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, cloud.Default()), t.Context()
		time.Sleep(10 * time.Second) // the launch is visible
		described := func(after time.Duration, want string, attached bool) {
			t.Helper()
			time.Sleep(after)
			enis, err := l.api.DescribeTaggedENIs(ctx, map[string]string{"tkenode": "cls-lab00001"})
			if err != nil || len(enis) > 1 || (len(enis) == 1) != (want != "") {
				t.Fatalf("described %+v, %v, want %q", enis, err, want)
			}
			here, err := l.api.DescribeENIs(ctx, l.instance.ID)
			if err != nil || (len(here) == 2) != attached {
				t.Errorf("the instance has %+v, %v; want the ENI among them: %v", here, err, attached)
			}
			if want != "" && (enis[0].State != want || (enis[0].Attachment != nil) != attached) {
				t.Errorf("described %+v, want %s, attached: %v", enis[0], want, attached)
			}
		}
		spec := l.spec("both")
		spec.SecondaryIPs = 3
		start := time.Now()
		eni, task, err := l.api.CreateENI(ctx, spec)
		if err != nil || eni.State != tencent.StatePending || eni.Attachment != nil || len(eni.IPs) != 4 || len(eni.Tags) != 1 {
			t.Fatalf("created %+v, %v", eni, err)
		}
		described(1900*time.Millisecond, "", false)
		described(200*time.Millisecond, tencent.StatePending, false)
		described(500*time.Millisecond, tencent.StateAttaching, true)
		if now := l.now(eni.ID); now.State != tencent.StateAttaching || l.machines.holds(eni.ID) != "" {
			t.Errorf("while it attaches: %+v, in %q", now, l.machines.holds(eni.ID))
		}
		l.await(t, task, nil)
		if d := time.Since(start); d < 3500*time.Millisecond || d > 3700*time.Millisecond {
			t.Errorf("took %s", d)
		}
		if l.machines.holds(eni.ID) != l.instance.ID || len(l.machines.addrs(eni.ID)) != 4 {
			t.Error("the NIC is not plugged, or packets may not carry its addresses")
		}
		described(0, tencent.StateAttaching, true) // the end is not visible yet
		described(2*time.Second, tencent.StateAvailable, true)
		if now := l.now(eni.ID); now.DeviceIndex != 1 || now.IPs[3].State != tencent.StateAvailable || now.Attached.Before(start) {
			t.Errorf("attached: %+v", now)
		}
	})
}

// TestENICreatedAndNotAttached: whatever ends the task, the ENI that it has created
// is there, detached, and can be attached.
func TestENICreatedAndNotAttached(t *testing.T) {
	for name, c := range map[string]struct {
		fault  cloud.Fault
		plug   error
		status string // of the task
		output string
	}{
		"fails":       {fault: cloud.Fault{Fail: true}, status: tencent.TaskFailed, output: "the task fails on request"},
		"vanishes":    {fault: cloud.Fault{Vanish: true}, status: tencent.CodeNotFound},
		"not plugged": {plug: errors.New("no slot"), status: tencent.TaskFailed, output: "no slot"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, ctx := newLab(t, cloud.Default()), t.Context()
				c.fault.Action, l.machines.fail = "vpc:CreateAndAttachNetworkInterface", c.plug
				l.Inject(c.fault)
				eni, task, err := l.api.CreateENI(ctx, l.spec("one"))
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(6 * time.Second)
				got, err := l.api.TaskResult(ctx, task)
				if status := got.Status; status != c.status && code(err) != c.status || got.Output != c.output {
					t.Errorf("task %+v, %v", got, err)
				}
				enis, err := l.api.DescribeTaggedENIs(ctx, map[string]string{"tkenode": "cls-lab00001"})
				if err != nil || len(enis) != 1 || enis[0].State != tencent.StateAvailable || enis[0].Attachment != nil || enis[0].IPs[0].State != tencent.StateAvailable {
					t.Fatalf("described %+v, %v", enis, err)
				}
				if l.machines.holds(eni.ID) != "" || l.machines.addrs(eni.ID) != nil {
					t.Error("the NIC or its port is there")
				}
				// Its token finds that ENI, and attaches nothing.
				if again, _, err := l.api.CreateENI(ctx, l.spec("one")); err != nil || again.ID != eni.ID || l.now(eni.ID).Instance != "" {
					t.Errorf("asked again: %+v, %v", again, err)
				}
				task, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, 0, "two")
				if l.await(t, task, err); l.machines.holds(eni.ID) != l.instance.ID {
					t.Error("the NIC is not plugged")
				}
			})
		})
	}
}

func TestENIRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := cloud.Default()
		config.Subnets = append(config.Subnets, cloud.Subnet{
			ID: "subnet-else0001", CIDR: netip.MustParsePrefix("10.0.48.0/24"), Zone: "ap-guangzhou-4", First: netip.MustParseAddr("10.0.48.2"),
		})
		l, ctx := newSDK(t, config), t.Context()
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
		_, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, 0, "t1")
		refused("attach again", tencent.CodeAttachmentAlreadyExists, err)

		spare, _, task, err := l.create("two", "spare")
		if err != nil {
			t.Fatal(err)
		}
		_, err = l.api.AttachENI(ctx, spare, l.instance.ID, 0, "t2")
		refused("attach while PENDING", "UnsupportedOperation.InvalidState", err)
		l.await(t, task, nil)
		_, err = l.api.AttachENI(ctx, spare, "ins-00000000", 0, "t3")
		refused("attach to no instance", tencent.CodeNotFound, err)
		_, err = l.api.DetachENI(ctx, spare, l.instance.ID, "d2")
		refused("detach what is not attached", "UnsupportedOperation.InvalidState", err)
		_, err = l.api.TaskResult(ctx, "no-such-task")
		refused("result of no task", tencent.CodeNotFound, err)

		both, task, err := l.api.CreateENI(ctx, l.spec("both"))
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // while it is PENDING, and while it is ATTACHING
			_, err = l.api.AttachENI(ctx, both.ID, l.instance.ID, 0, "t4")
			refused("attach what is being attached", "UnsupportedOperation.InvalidState", err)
			_, err = l.api.DeleteENI(ctx, both.ID)
			refused("delete what is being attached", "UnsupportedOperation.InvalidState", err)
			time.Sleep(time.Second)
		}
		l.await(t, task, nil)

		before := len(l.Snapshot().ENIs)
		for what, c := range map[string]struct {
			change func(s *tencent.ENISpec)
			want   string
		}{
			"in no subnet":      {func(s *tencent.ENISpec) { s.SubnetID = "subnet-00000000" }, tencent.CodeNotFound},
			"for no instance":   {func(s *tencent.ENISpec) { s.InstanceID = "ins-00000000" }, tencent.CodeNotFound},
			"with no group":     {func(s *tencent.ENISpec) { s.SecurityGroupIDs = nil }, "UnsupportedOperation"},
			"with many":         {func(s *tencent.ENISpec) { s.SecondaryIPs = 10 }, "LimitExceeded"},
			"in another zone":   {func(s *tencent.ENISpec) { s.SubnetID = "subnet-else0001" }, "UnsupportedOperation.ZoneMismatch"},
			"without a name":    {func(s *tencent.ENISpec) { s.Name = "" }, "MissingParameter"},
			"with a tag twice":  {func(s *tencent.ENISpec) { s.Tags = append(s.Tags, s.Tags...) }, "InvalidParameterValue.TagDuplicateKey"},
			"in a VPC not here": {func(s *tencent.ENISpec) { s.VPCID = "vpc-00000000" }, tencent.CodeNotFound},
		} {
			bad := l.spec(what)
			c.change(&bad)
			_, _, err = l.api.CreateENI(ctx, bad)
			refused("create "+what, c.want, err)
		}
		if after := len(l.Snapshot().ENIs); after != before {
			t.Errorf("%d ENIs after refusals, %d before", after, before)
		}
	})
}

func TestENIQuota(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, instant()), t.Context()
		limit, err := l.api.ENILimit(ctx, l.instance.ID)
		if err != nil || limit != (tencent.ENILimit{ENIs: 4, IPsPerENI: 10, ExtendENIs: 10}) {
			t.Fatalf("limit %+v, %v", limit, err)
		}
		for i := 1; i < limit.ENIs; i++ {
			l.attached(t, "eni"+strconv.Itoa(i))
		}
		eni := l.detached(t)
		if _, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, 0, "more"); code(err) != "LimitExceeded" {
			t.Errorf("ENI beyond the quota: %v", err)
		}
		if _, _, err = l.api.CreateENI(ctx, l.spec("more")); code(err) != "LimitExceeded" || len(l.Snapshot().ENIs) != 5 {
			t.Errorf("ENI created beyond the quota: %v", err)
		}
		// Extension ENIs have a quota of their own, and one address.
		spec := l.spec("extension")
		spec.AttachType = tencent.AttachExtension
		spec.SecondaryIPs = 1
		if _, _, err = l.api.CreateENI(ctx, spec); code(err) != "LimitExceeded" {
			t.Errorf("extension ENI with two addresses: %v", err)
		}
		spec.SecondaryIPs, spec.ClientToken = 0, "extension of one"
		made, _, err := l.api.CreateENI(ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		enis, err := l.api.DescribeENIs(ctx, l.instance.ID)
		if i := slices.IndexFunc(enis, func(e tencent.ENI) bool { return e.ID == made.ID }); err != nil || i < 0 || enis[i].AttachType != tencent.AttachExtension {
			t.Errorf("extension ENI: %+v, %v", enis, err)
		}
		for i := 1; i < limit.ExtendENIs; i++ {
			spec.ClientToken = "extension" + strconv.Itoa(i)
			if _, _, err = l.api.CreateENI(ctx, spec); err != nil {
				t.Fatal(err)
			}
		}
		if _, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, tencent.AttachExtension, "one more"); code(err) != "LimitExceeded" {
			t.Errorf("extension ENI beyond the quota: %v", err)
		}
		if _, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, 2, "another type"); code(err) != "InvalidParameterValue" {
			t.Errorf("ENI of type 2: %v", err)
		}
	})
}

// TestENIQuotaHolds: an ENI that is being created for an instance has its place.
func TestENIQuotaHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, ctx := newLab(t, cloud.Default()), t.Context()
		refused := 0
		for i := range 5 {
			_, _, err := l.api.CreateENI(ctx, l.spec(strconv.Itoa(i)))
			if err != nil && code(err) != "LimitExceeded" {
				t.Fatal(err)
			}
			if err != nil {
				refused++
			}
		}
		time.Sleep(time.Minute)
		indexes := map[int]bool{}
		for _, e := range l.Snapshot().ENIs {
			indexes[e.DeviceIndex] = l.machines.addrs(e.ID) != nil
		}
		if want := map[int]bool{0: true, 1: true, 2: true, 3: true}; refused != 2 || !maps.Equal(indexes, want) {
			t.Errorf("%d of 5 are refused; device indexes, and whether they have ports: %v", refused, indexes)
		}
	})
}

func TestSubnetExhausted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := instant()
		config.Subnets[1].CIDR = netip.MustParsePrefix("10.0.16.0/29") // .2 to .6
		l := newLab(t, config)
		many := l.spec("many")
		many.SecondaryIPs = 5
		if _, _, err := l.api.CreateENI(t.Context(), many); code(err) != tencent.CodeSubnetExhausted || len(l.Snapshot().ENIs) != 1 {
			t.Errorf("6 of 5 addresses: %v", err)
		}
		eni := l.attached(t, "c")
		if eni.IPs[0].Addr != netip.MustParseAddr("10.0.16.2") {
			t.Errorf("first address %s", eni.IPs[0].Addr)
		}
		if _, _, err := l.api.AssignIPs(t.Context(), eni.ID, 5, "a"); code(err) != tencent.CodeSubnetExhausted {
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
		eni := l.detached(t)
		l.machines.fail = errors.New("no slot")
		task, err := l.api.AttachENI(ctx, eni.ID, l.instance.ID, 0, "a")
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
		task, err = l.api.AttachENI(ctx, eni.ID, l.instance.ID, 0, "b")
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

// TestTaskFaults: a task that is stuck, one that vanishes, one that fails, and one that
// gives less than was asked for.
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
		now := func() cloud.ENI { return l.now(eni.ID) }

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
			call   func(token string) (string, error)
		}{
			{"AttachNetworkInterface", func(token string) (string, error) { return l.api.AttachENI(ctx, eni.ID, l.instance.ID, 0, token) }},
			{"UnassignPrivateIpAddresses", func(string) (string, error) { return l.api.UnassignIPs(ctx, eni.ID, []netip.Addr{ips[0].Addr}) }},
			{"DeleteNetworkInterface", func(string) (string, error) { return l.api.DeleteENI(ctx, eni.ID) }},
		} {
			for want, fault := range map[string]cloud.Fault{tencent.CodeNotFound: {Vanish: true}, tencent.TaskFailed: {Fail: true}} {
				before := now()
				fault.Action = "vpc:" + c.action
				l.Inject(fault)
				task, err := c.call(want)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
				if status(task) != want || now().State != tencent.StateAvailable || now().Instance != before.Instance || len(now().IPs) != len(before.IPs) {
					t.Errorf("%s: task %s, before %+v, after %+v", c.action, status(task), before, now())
				}
			}
		}
	})
}
