package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

// ask sends the request and returns the response. All operations are idempotent,
// so an agent that goes away in between is asked again: systemd holds the socket,
// and the next agent answers. ask gives up when ctx ends.
func ask(ctx context.Context, socket string, req cni.Request) (cni.Response, error) {
	const pauseMax = time.Second
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, pauseMax) {
		resp, err := askOnce(ctx, socket, req)
		if err == nil {
			return resp, nil
		}
		select {
		case <-ctx.Done():
			return cni.Response{}, err
		case <-time.After(pause):
		}
	}
}

func askOnce(ctx context.Context, socket string, req cni.Request) (resp cni.Response, err error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return resp, err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return resp, err
		}
	}
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return resp, fmt.Errorf("send request: %w", err)
	}
	if err := cni.Read(conn, cni.MaxResponse, &resp); err != nil {
		return resp, fmt.Errorf("read response: %w", err)
	}
	return resp, nil
}
