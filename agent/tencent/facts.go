package tencent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// Facts reads what the metadata service knows of this instance. It leaves out
// ZoneID: the service has the zone's name only, as ap-guangzhou-3, while provider
// ids carry its number, 100003. The numbers follow no rule that holds for every
// region (Guangzhou's start at 100001, Beijing's at 800001, Chengdu's at 160001)
// and a table would be wrong for the next region, so Client.ZoneID asks the API
// once, before the Facts are sealed, as Client.Facts does for the quota, too. The
// host name is the machine's own.
func (m *Metadata) Facts(ctx context.Context) (node.Facts, error) {
	var f node.Facts
	var mac, ip string
	for _, k := range []struct {
		key string
		to  *string
	}{
		{"instance-id", &f.InstanceID},
		{"instance/instance-type", &f.InstanceType},
		{"placement/region", &f.Region},
		{"placement/zone", &f.Zone},
		{"mac", &mac},
		{"local-ipv4", &ip},
	} {
		var err error
		if *k.to, err = m.value(ctx, k.key); err != nil {
			return node.Facts{}, err
		}
	}
	hw, err := net.ParseMAC(mac)
	if err != nil {
		return node.Facts{}, fmt.Errorf("metadata mac: %w", err)
	}
	f.MAC = hw.String()
	if f.PrivateIP, err = netip.ParseAddr(ip); err != nil {
		return node.Facts{}, fmt.Errorf("metadata local-ipv4: %w", err)
	}
	if err := m.network(ctx, &f); err != nil {
		return node.Facts{}, err
	}
	f.DataDisks = m.volumes(ctx)
	if f.CAMRole, err = m.role(ctx); err != nil && !errors.Is(err, ErrNotFound) {
		return node.Facts{}, err
	}
	if f.Hostname, err = os.Hostname(); err != nil {
		return node.Facts{}, fmt.Errorf("read host name: %w", err)
	}
	return f, nil
}

// network fills in where the primary ENI is. Paths hold MACs in upper case, and
// are case-sensitive, so the service's own spelling is used.
func (m *Metadata) network(ctx context.Context, f *node.Facts) error {
	const dir = "network/interfaces/macs/"
	macs, err := m.list(ctx, dir)
	if err != nil {
		return err
	}
	for _, e := range macs {
		if !strings.EqualFold(strings.TrimSuffix(e, "/"), f.MAC) {
			continue
		}
		base := dir + strings.TrimSuffix(e, "/")
		if f.VPCID, err = m.value(ctx, base+"/vpc-id"); err != nil {
			return err
		}
		f.SubnetID, err = m.value(ctx, base+"/subnet-id")
		return err
	}
	return fmt.Errorf("metadata %s lists %q, and not the primary %s", dir, macs, f.MAC)
}

// volumes returns the ids of the CBS disks that are attached, or none: they are a
// help to tell one disk from others, and no reason not to join.
func (m *Metadata) volumes(ctx context.Context) []string {
	ctx, cancel := context.WithTimeout(ctx, metadataTimeout)
	defer cancel()
	ids, err := m.list(ctx, "volumes/")
	if err != nil {
		if !errors.Is(err, ErrNotFound) {
			slog.WarnContext(ctx, "metadata service does not list the disks", "err", err)
		}
		return nil
	}
	for i := range ids {
		ids[i] = strings.TrimSuffix(ids[i], "/")
	}
	return ids
}

// role returns the name of the instance's CAM role.
func (m *Metadata) role(ctx context.Context) (string, error) {
	const dir = "cam/security-credentials/"
	names, err := m.list(ctx, dir)
	if err != nil {
		return "", err
	}
	if len(names) == 0 {
		return "", fmt.Errorf("metadata %s: %w", dir, ErrNotFound)
	}
	return strings.TrimSuffix(names[0], "/"), nil
}

// Facts returns f with what the metadata service does not know: the zone's number,
// and how many ENIs and addresses the instance may have.
func (c *Client) Facts(ctx context.Context, f node.Facts) (node.Facts, error) {
	id, err := c.ZoneID(ctx, f.Zone)
	if err != nil {
		return f, err
	}
	limit, err := c.ENILimit(ctx, f.InstanceID)
	if err != nil {
		return f, err
	}
	f.ZoneID, f.ENIQuota, f.IPQuota, f.ExtendENIQuota = id, limit.ENIs, limit.IPsPerENI, limit.ExtendENIs
	return f, nil
}

// ZoneID returns the number of a zone, 100003 for ap-guangzhou-3; see
// Metadata.Facts.
func (c *Client) ZoneID(ctx context.Context, zone string) (int, error) {
	var out struct {
		ZoneSet []struct{ Zone, ZoneId string }
	}
	if err := c.call(ctx, "cvm", "DescribeZones", struct{}{}, &out); err != nil {
		return 0, err
	}
	for _, z := range out.ZoneSet {
		if z.Zone == zone {
			id, err := strconv.ParseUint(z.ZoneId, 10, 31)
			if err != nil {
				return 0, fmt.Errorf("cvm DescribeZones: id of zone %s: %w", zone, err)
			}
			return int(id), nil
		}
	}
	return 0, fmt.Errorf("cvm DescribeZones: region %s has no zone %s", c.region, zone)
}
