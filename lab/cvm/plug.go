package cvm

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// The arguments of QEMU's objects are strings throughout, so that the same ones
// serve on the command line and on the control socket; the few that QMP wants
// typed are nested by typed.

func (n NIC) backend() map[string]string {
	return map[string]string{
		"type": "stream", "id": netdev(n.ID), "server": "off", "addr.type": "unix", "addr.path": n.Socket,
	}
}

func (n NIC) device(slot int) map[string]string {
	// romfile: no network boot, so no boot ROM to load.
	return map[string]string{
		"driver": "virtio-net-pci", "id": n.ID, "netdev": netdev(n.ID), "mac": n.MAC.String(), "bus": rootPort(slot), "romfile": "",
	}
}

func netdev(id string) string { return "net-" + id }

func (d Disk) backend() map[string]string {
	return map[string]string{
		"driver": "raw", "node-name": blockNode(d.ID), "discard": "unmap", "file.driver": "file", "file.filename": d.Path,
	}
}

func (d Disk) device(slot int) map[string]string {
	serial := d.ID
	if d.Serial != nil {
		serial = *d.Serial
	}
	return map[string]string{
		"driver": "virtio-blk-pci", "id": d.ID, "drive": blockNode(d.ID), "serial": serial, "bus": rootPort(slot),
	}
}

func blockNode(id string) string { return "blk-" + id }

// typed turns the flat arguments of the command line into those of QMP: a dotted
// key is a member of an object, and "server" is a boolean.
func typed(flat map[string]string) map[string]any {
	args := map[string]any{}
	for key, value := range flat {
		object := args
		for {
			head, rest, dotted := strings.Cut(key, ".")
			if !dotted {
				break
			}
			if object[head] == nil {
				object[head] = map[string]any{}
			}
			object, key = object[head].(map[string]any), rest
		}
		switch key {
		case "server":
			object[key] = value == "on"
		default:
			object[key] = value
		}
	}
	return args
}

// takeSlot gives the device a free root port.
func (m *Machine) takeSlot(id string) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.slots[id]; ok {
		return 0, fmt.Errorf("device %s is already there", id)
	}
	var used [rootPorts]bool
	for _, slot := range m.slots {
		used[slot] = true
	}
	slot := slices.Index(used[:], false)
	if slot < 0 {
		return 0, fmt.Errorf("all %d slots are taken", rootPorts)
	}
	m.slots[id] = slot
	return slot, nil
}

func (m *Machine) freeSlot(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.slots, id)
}

// PlugNIC plugs a network interface into the running machine.
func (m *Machine) PlugNIC(ctx context.Context, n NIC) error {
	err := m.plug(ctx, n.ID, "netdev_add", n.backend(), n.device, m.removeNetdev)
	if err != nil {
		return fmt.Errorf("plug NIC %s into %s: %w", n.ID, m.spec.Name, err)
	}
	return nil
}

// PlugDisk plugs a disk into the running machine.
func (m *Machine) PlugDisk(ctx context.Context, d Disk) error {
	err := m.plug(ctx, d.ID, "blockdev-add", d.backend(), d.device, m.removeBlockNode)
	if err != nil {
		return fmt.Errorf("plug disk %s into %s: %w", d.ID, m.spec.Name, err)
	}
	return nil
}

func (m *Machine) plug(ctx context.Context, id, add string, backend map[string]string,
	device func(slot int) map[string]string, remove func(context.Context, string) error,
) error {
	slot, err := m.takeSlot(id)
	if err != nil {
		return err
	}
	if err := m.qmp.do(ctx, add, typed(backend), nil); err != nil {
		m.freeSlot(id)
		return err
	}
	if err := m.qmp.do(ctx, "device_add", typed(device(slot)), nil); err != nil {
		_ = remove(ctx, id) // the refusal of the device is what is worth saying
		m.freeSlot(id)
		return err
	}
	return nil
}

// UnplugNIC asks the guest to let go of a network interface, waits until it has,
// and removes it.
func (m *Machine) UnplugNIC(ctx context.Context, id string) error {
	if err := m.unplugDevice(ctx, id, m.removeNetdev); err != nil {
		return fmt.Errorf("unplug NIC %s from %s: %w", id, m.spec.Name, err)
	}
	return nil
}

// UnplugDisk asks the guest to let go of a disk, waits until it has, and removes
// it.
func (m *Machine) UnplugDisk(ctx context.Context, id string) error {
	if err := m.unplugDevice(ctx, id, m.removeBlockNode); err != nil {
		return fmt.Errorf("unplug disk %s from %s: %w", id, m.spec.Name, err)
	}
	return nil
}

// PullDisk takes a disk away by surprise: from now on every access fails with an
// I/O error, and only then the guest is told that the device is gone.
func (m *Machine) PullDisk(ctx context.Context, id string) error {
	if err := m.pullDisk(ctx, id); err != nil {
		return fmt.Errorf("pull disk %s from %s: %w", id, m.spec.Name, err)
	}
	return nil
}

func (m *Machine) pullDisk(ctx context.Context, id string) error {
	broken := map[string]any{
		"driver": "blkdebug", "node-name": brokenNode(id), "image": blockNode(id),
		"inject-error": []any{
			map[string]any{"event": "none", "iotype": "read", "errno": eio},
			map[string]any{"event": "none", "iotype": "write", "errno": eio},
			map[string]any{"event": "none", "iotype": "flush", "errno": eio},
			map[string]any{"event": "none", "iotype": "discard", "errno": eio},
			map[string]any{"event": "none", "iotype": "write-zeroes", "errno": eio},
		},
	}
	if err := m.qmp.do(ctx, "blockdev-add", broken, nil); err != nil {
		return err
	}
	swap := map[string]any{"path": "/machine/peripheral/" + id, "property": "drive", "value": brokenNode(id)}
	if err := m.qmp.do(ctx, "qom-set", swap, nil); err != nil {
		return err
	}
	return m.unplugDevice(ctx, id, func(ctx context.Context, id string) error {
		if err := m.qmp.do(ctx, "blockdev-del", map[string]any{"node-name": brokenNode(id)}, nil); err != nil {
			return err
		}
		return m.removeBlockNode(ctx, id)
	})
}

// HangDisk makes a disk answer no read and no write, until it is told otherwise. What
// has been asked meanwhile is answered then.
func (m *Machine) HangDisk(ctx context.Context, id string, hang bool) error {
	limit := 0 // bytes in a second; none
	if hang {
		limit = 1
	}
	// The disk's backend is not of the PCI device, but of the virtio device on it.
	args := map[string]any{"id": "/machine/peripheral/" + id + "/virtio-backend", "bps": 0, "bps_rd": limit, "bps_wr": limit, "iops": 0, "iops_rd": 0, "iops_wr": 0}
	if err := m.qmp.do(ctx, "block_set_io_throttle", args, nil); err != nil {
		return fmt.Errorf("throttle disk %s of %s: %w", id, m.spec.Name, err)
	}
	return nil
}

// eio is EIO as Linux and so blkdebug count it.
const eio = 5

func brokenNode(id string) string { return "bad-" + id }

func (m *Machine) unplugDevice(ctx context.Context, id string, remove func(context.Context, string) error) error {
	released, err := m.expectRelease(id)
	if err != nil {
		return err
	}
	if err := m.qmp.do(ctx, "device_del", map[string]any{"id": id}, nil); err != nil {
		return err
	}
	select {
	case <-released:
	case <-m.qmp.done:
		return m.qmp.err
	case <-ctx.Done():
		return fmt.Errorf("the guest has not let go of it: %w", ctx.Err())
	}
	if err := remove(ctx, id); err != nil {
		return err
	}
	m.freeSlot(id)
	return nil
}

// expectRelease returns a channel that is closed when QEMU has removed the
// device.
func (m *Machine) expectRelease(id string) (<-chan struct{}, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.slots[id]; !ok {
		return nil, fmt.Errorf("there is no device %s", id)
	}
	if m.unplug[id] == nil {
		m.unplug[id] = make(chan struct{})
	}
	return m.unplug[id], nil
}

func (m *Machine) removeNetdev(ctx context.Context, id string) error {
	return m.qmp.do(ctx, "netdev_del", map[string]any{"id": netdev(id)}, nil)
}

func (m *Machine) removeBlockNode(ctx context.Context, id string) error {
	return m.qmp.do(ctx, "blockdev-del", map[string]any{"node-name": blockNode(id)}, nil)
}

// ResizeDisk makes a disk larger while the guest uses it.
func (m *Machine) ResizeDisk(ctx context.Context, id string, bytes int64) error {
	args := map[string]any{"node-name": blockNode(id), "size": bytes}
	if err := m.qmp.do(ctx, "block_resize", args, nil); err != nil {
		return fmt.Errorf("resize disk %s of %s: %w", id, m.spec.Name, err)
	}
	return nil
}
