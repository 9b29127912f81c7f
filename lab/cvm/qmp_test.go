package cvm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}`

// fakeQEMU answers each command with what answer returns for its name and id.
func fakeQEMU(t testing.TB, answer func(command string, id json.Number) string) net.Conn {
	client, server := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer server.Close()
		io.WriteString(server, greeting+"\n")
		for lines := bufio.NewScanner(server); lines.Scan(); {
			var c struct {
				Execute string
				ID      json.Number
			}
			if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
				t.Errorf("command %s: %v", lines.Text(), err)
				return
			}
			reply := answer(c.Execute, c.ID)
			if c.Execute == "qmp_capabilities" {
				reply = `{"return": {}, "id": ` + c.ID.String() + `}`
			}
			if reply != "" {
				io.WriteString(server, reply+"\n")
			}
		}
	}()
	t.Cleanup(func() {
		client.Close()
		<-done
	})
	return client
}

func ignore(string, json.RawMessage) {}

func TestQMPAnswersAndEvents(t *testing.T) {
	var events []string
	conn := fakeQEMU(t, func(command string, id json.Number) string {
		switch command {
		case "query-status":
			return `{"event": "RESUME", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}}` + "\n" +
				`{"return": {"status": "running"}, "id": ` + id.String() + `}`
		default:
			return `{"id": ` + id.String() + `, "error": {"class": "DeviceNotFound", "desc": "Device 'disk-1' not found"}}`
		}
	})
	q, err := newQMP(t.Context(), conn, func(name string, _ json.RawMessage) { events = append(events, name) })
	if err != nil {
		t.Fatal(err)
	}
	var status struct{ Status string }
	if err := q.do(t.Context(), "query-status", nil, &status); err != nil || status.Status != "running" {
		t.Errorf("query-status = %+v, %v", status, err)
	}
	err = q.do(t.Context(), "device_del", map[string]any{"id": "disk-1"}, nil)
	if refusal, ok := errors.AsType[*qmpError](err); !ok || refusal.Class != "DeviceNotFound" {
		t.Errorf("device_del: %v", err)
	}
	if want := "QMP device_del: Device 'disk-1' not found"; err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
	q.close()
	if len(events) != 1 || events[0] != "RESUME" {
		t.Errorf("events = %q", events)
	}
	if err := q.do(t.Context(), "stop", nil, nil); err == nil {
		t.Error("a command succeeded on a closed connection")
	}
}

func TestQMPCommandWithoutAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, err := newQMP(t.Context(), fakeQEMU(t, func(string, json.Number) string { return "" }), ignore)
		if err != nil {
			t.Fatal(err)
		}
		defer q.close()
		began := time.Now()
		if err := q.do(t.Context(), "stop", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("err = %v", err)
		}
		if d := time.Since(began); d != qmpTimeout {
			t.Errorf("gave up after %v, not %v", d, qmpTimeout)
		}
	})
}

func TestQMPWithoutGreeting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server := net.Pipe()
		defer server.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := newQMP(ctx, client, ignore); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("err = %v", err)
		}
	})
}

func TestQMPRefusesALineWithoutEnd(t *testing.T) {
	client, server := net.Pipe()
	go func() {
		io.WriteString(server, strings.Repeat("x", qmpLine+1))
		server.Close()
	}()
	_, err := newQMP(t.Context(), client, ignore)
	if !errors.Is(err, bufio.ErrTooLong) {
		t.Errorf("err = %v", err)
	}
}

// Whatever arrives, the client ends with an error and leaves nothing running.
func FuzzQMP(f *testing.F) {
	f.Add([]byte(greeting + "\n"))
	f.Add([]byte(greeting + "\n" + `{"return": {}, "id": 1}` + "\n"))
	f.Add([]byte(`{"error": {"class": "GenericError", "desc": "JSON parse error"}}` + "\n"))
	f.Add([]byte(`{"event": "SHUTDOWN", "data": {"guest": true}}` + "\n" + greeting + "\n" + greeting + "\n"))
	f.Fuzz(func(t *testing.T, stream []byte) {
		client, server := net.Pipe()
		written := make(chan struct{})
		go func() {
			defer close(written)
			go io.Copy(io.Discard, server) // ends when server is closed
			server.Write(stream)
			server.Close()
		}()
		q, err := newQMP(t.Context(), client, ignore)
		if err == nil {
			q.close()
		}
		<-written
	})
}
