package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// CordonedBy is the annotation of a Node by which the agent knows its own cordon: it
// says why. One that somebody else has made is not undone.
const CordonedBy = "tkenode.io/cordoned"

// patch changes the Node by a strategic merge patch, of its status or of the rest, and
// returns what it is then.
func (c *Client) patch(ctx context.Context, name, part string, change any) (object, error) {
	var o object
	body, err := json.Marshal(change)
	if err != nil {
		return o, fmt.Errorf("encode patch of Node %s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	path := nodesPath + "/" + url.PathEscape(name) + part
	req, err := http.NewRequestWithContext(ctx, http.MethodPatch, c.base.JoinPath(path).String(), bytes.NewReader(body))
	if err != nil {
		return o, err
	}
	req.Header.Set("Content-Type", "application/strategic-merge-patch+json")
	answer, err := c.do(req, path)
	if err != nil {
		return o, err
	}
	defer answer.Close()
	if err := json.NewDecoder(io.LimitReader(answer, maxAnswer)).Decode(&o); err != nil {
		return o, fmt.Errorf("decode Node %s: %w", name, err)
	}
	return o, nil
}

// conditionPatch is a condition as it is written. The API server merges by type, so
// kubelet's are left as they are.
type conditionPatch struct {
	Type               string    `json:"type"`
	Status             string    `json:"status"`
	Reason             string    `json:"reason"`
	Message            string    `json:"message"`
	LastHeartbeatTime  time.Time `json:"lastHeartbeatTime"`
	LastTransitionTime time.Time `json:"lastTransitionTime,omitzero"`
}

// setConditions writes conditions into the Node's status. The time of a transition is
// only written with one.
func (c *Client) setConditions(ctx context.Context, name string, all []node.Condition, transition func(node.ConditionType) bool) (object, error) {
	var list []conditionPatch
	now := time.Now().UTC().Truncate(time.Second)
	for _, k := range all {
		p := conditionPatch{Type: string(k.Type), Status: string(k.Status), Reason: k.Reason, Message: k.Message, LastHeartbeatTime: now}
		if transition(k.Type) {
			p.LastTransitionTime = k.Since.UTC().Truncate(time.Second)
		}
		list = append(list, p)
	}
	return c.patch(ctx, name, "/status", map[string]any{"status": map[string]any{"conditions": list}})
}

// cordon makes the Node unschedulable, and says why in the annotation.
func (c *Client) cordon(ctx context.Context, name, why string) (object, error) {
	return c.patch(ctx, name, "", map[string]any{
		"metadata": map[string]any{"annotations": map[string]any{CordonedBy: why}},
		"spec":     map[string]any{"unschedulable": true},
	})
}

// uncordon takes the annotation away, and with it the cordon, unless somebody has
// done that already.
func (c *Client) uncordon(ctx context.Context, name string) (object, error) {
	return c.patch(ctx, name, "", map[string]any{
		"metadata": map[string]any{"annotations": map[string]any{CordonedBy: nil}},
		"spec":     map[string]any{"unschedulable": nil},
	})
}
