package cloud

import (
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// serveMetadata answers as the metadata service of a CVM does: plain text, a
// directory as a list whose directories end in "/", 404 for what is not there,
// and paths that are case-sensitive.
// Source: https://cloud.tencent.com/document/product/213/4934
func (r *Region) serveMetadata(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	fault, left := r.faults.metadata, time.Until(r.faults.until)
	r.mu.Unlock()
	if left <= 0 {
		fault = MetadataFault{}
	}
	switch {
	case fault.Silent:
		_ = pause(req.Context(), left) // either way there is no answer
		panic(http.ErrAbortHandler)
	case fault.Status != 0:
		http.Error(w, http.StatusText(fault.Status), fault.Status)
		return
	case req.Method != http.MethodGet:
		http.Error(w, "only GET is supported", http.StatusMethodNotAllowed)
		return
	}
	addr, err := sourceAddr(req.RemoteAddr)
	if err != nil {
		http.Error(w, "bad source address", http.StatusBadRequest)
		return
	}
	body, ok := r.metadata(addr, req.URL.Path, fault.Stale)
	if !ok {
		http.Error(w, "404 Not Found", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	_, _ = w.Write(body) // the client is gone; there is nobody to tell
}

func sourceAddr(remote string) (netip.Addr, error) {
	host, _, err := net.SplitHostPort(remote)
	if err != nil {
		return netip.Addr{}, err
	}
	addr, err := netip.ParseAddr(host)
	return addr.Unmap(), err
}

// metadata returns what a path holds for the instance at addr.
func (r *Region) metadata(addr netip.Addr, path string, stale time.Duration) ([]byte, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	in, ok := r.instanceAt(addr)
	if !ok {
		return nil, false
	}
	path, ok = strings.CutPrefix(path, "/latest/")
	switch {
	case !ok:
		return nil, false
	case path == "user-data" && in.userData != nil:
		return in.userData, true
	}
	path, ok = strings.CutPrefix(path, "meta-data")
	if !ok || path != "" && path[0] != '/' {
		return nil, false
	}
	return lookup(r.tree(in, stale), strings.TrimPrefix(path, "/"))
}

// instanceAt is InstanceAt for who holds mu.
func (r *Region) instanceAt(addr netip.Addr) (Instance, bool) {
	for _, e := range r.enis.all() {
		if e.Instance != "" && e.hasAddr(addr) {
			return r.instances.get(e.Instance)
		}
	}
	return Instance{}, false
}

// InstanceAt returns the instance that has an address, on any of its ENIs.
func (r *Region) InstanceAt(addr netip.Addr) (Instance, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.instanceAt(addr)
}

// lookup returns a leaf, or lists a directory.
func lookup(leaves map[string]string, path string) ([]byte, bool) {
	if v, ok := leaves[path]; ok {
		return []byte(v), true
	}
	dir := strings.TrimSuffix(path, "/")
	if dir != "" {
		dir += "/"
	}
	var entries []string
	for leaf := range leaves {
		rest, ok := strings.CutPrefix(leaf, dir)
		if !ok {
			continue
		}
		name, _, deeper := strings.Cut(rest, "/")
		if deeper {
			name += "/"
		}
		entries = append(entries, name)
	}
	slices.Sort(entries)
	return []byte(strings.Join(slices.Compact(entries), "\n")), len(entries) > 0
}

// tree returns every leaf below meta-data. ENIs and disks are as late as what the
// API describes, and later when that is injected. The caller holds mu.
func (r *Region) tree(in Instance, stale time.Duration) map[string]string {
	at := r.visible().Add(-stale)
	t := map[string]string{
		"instance-id":             in.ID,
		"instance-name":           in.Name,
		"uuid":                    in.UUID,
		"local-ipv4":              in.PrivateIP.String(),
		"app-id":                  r.config.AppID,
		"placement/region":        r.config.Region,
		"placement/zone":          in.Zone,
		"instance/instance-type":  in.Type,
		"instance/image-id":       in.Image,
		"instance/security-group": r.config.SecurityGroups[0],
		"payment/charge-type":     "POSTPAID_BY_HOUR",
		"payment/create-time":     beijing(in.Created),
	}
	if !in.SpotTermination.IsZero() {
		t["spot/termination-time"] = beijing(in.SpotTermination)
	}
	for _, e := range r.enis.asOf(at) {
		if e.Instance == in.ID && e.State == available {
			r.addENI(t, e)
		}
	}
	// The primary ENI is part of the instance from its first moment.
	for _, e := range r.attachedENIs(in.ID) {
		if e.Primary {
			t["mac"] = strings.ToUpper(e.MAC)
			r.addENI(t, e)
		}
	}
	for _, d := range r.disks.all() {
		if d.Instance == in.ID && d.Created.Equal(in.Created) && !d.System {
			t["volumes/"+d.ID+"/disk-type"] = d.Type
		}
	}
	for _, d := range r.disks.asOf(at) {
		if d.Instance == in.ID && d.State == attached && !d.System {
			t["volumes/"+d.ID+"/disk-type"] = d.Type
		}
	}
	if r.config.Role != "" {
		t["cam/security-credentials/"+r.config.Role] = r.credentials(in.ID)
	}
	return t
}

func (r *Region) addENI(t map[string]string, e ENI) {
	s, _ := r.subnet(e.Subnet)
	mac := strings.ToUpper(e.MAC)
	dir := "network/interfaces/macs/" + mac + "/"
	t[dir+"mac"] = mac
	t[dir+"vpc-id"] = r.config.VPCID
	t[dir+"subnet-id"] = e.Subnet
	t[dir+"owner-id"] = r.config.AppID
	for _, ip := range e.IPs {
		a := ip.Addr.String()
		if ip.Primary {
			t[dir+"primary-local-ipv4"] = a
		}
		if ip.State != available {
			continue
		}
		t[dir+"local-ipv4s/"+a+"/local-ipv4"] = a
		t[dir+"local-ipv4s/"+a+"/gateway"] = s.Gateway().String()
		t[dir+"local-ipv4s/"+a+"/subnet-mask"] = net.IP(net.CIDRMask(s.CIDR.Bits(), 32)).String()
	}
}

// credentials returns the JSON that the SDK's CvmRoleProvider reads. The caller
// holds mu.
func (r *Region) credentials(instance string) string {
	k := r.roleKey(instance)
	b, err := json.MarshalIndent(struct {
		TmpSecretId, TmpSecretKey string
		ExpiredTime               int64
		Expiration, Token, Code   string
	}{k.SecretID, k.SecretKey, k.Expires.Unix(), k.Expires.UTC().Format(time.RFC3339), k.Token, "Success"}, "", "  ")
	if err != nil {
		panic(err) // strings and a number
	}
	return string(b)
}
