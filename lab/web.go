package lab

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"

	"github.com/tkenode/tkenode/images"
	"github.com/tkenode/tkenode/lab/kube"
)

// webPort is where the pods of the web image serve their page.
const webPort = 8080

// serverStarts is how long the page of a pod that runs is asked for.
const serverStarts = 30 * time.Second

// Web is a pod that serves a page, and how it was reached.
type Web struct {
	Name string        `json:"name"`
	IP   netip.Addr    `json:"ip"`
	From netip.Addr    `json:"from"`
	Took time.Duration `json:"took"` // to fetch the page
}

// RunWeb runs a pod of the web image on a node and fetches its page from another
// address of the VPC.
func (l *Lab) RunWeb(ctx context.Context, name, nodeName string) (Web, error) {
	if err := l.Cluster.RunPod(ctx, kube.Pod{Name: name, Image: images.Web, Node: nodeName}); err != nil {
		return Web{}, err
	}
	p, err := l.Cluster.WaitPodRunning(ctx, name)
	if err != nil {
		return Web{}, err
	}
	w := Web{Name: name, IP: p.Status.PodIP, From: ProbeAddr}
	// A pod is Running before its server listens.
	try, cancel := context.WithTimeout(ctx, serverStarts)
	defer cancel()
	for {
		began := time.Now()
		err := l.fetch(try, w.IP)
		if err == nil {
			w.Took = time.Since(began)
			return w, nil
		}
		select {
		case <-try.Done():
			return w, fmt.Errorf("pod %s runs, but %w", name, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// fetch gets the page of a pod of the web image.
func (l *Lab) fetch(ctx context.Context, ip netip.Addr) error {
	url := fmt.Sprintf("http://%s/", netip.AddrPortFrom(ip, webPort))
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := l.HTTPClient().Do(r)
	if err != nil {
		return fmt.Errorf("its page was not fetched: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil || resp.StatusCode != http.StatusOK || len(body) == 0 {
		return fmt.Errorf("%s answered %s with %d bytes: %w", url, resp.Status, len(body), err)
	}
	return nil
}
