package cloud

import (
	"context"
	"errors"
	"time"
)

// States of a task.
const (
	taskRunning = "RUNNING"
	taskSuccess = "SUCCESS"
	taskFailed  = "FAILED"
)

// deviceTimeout bounds what the hypervisor is asked for: a guest that does not
// let go of a device keeps it.
const deviceTimeout = time.Minute

// task is asynchronous work. Its id is that of the request which started it.
type task struct {
	Action string
	Status string
	Output string
	Began  time.Time
}

// work is one asynchronous change of an ENI or a disk.
type work struct {
	action string
	target []string // what no other task may touch meanwhile
	takes  time.Duration
	// do talks to the hypervisor and the fabric; it runs without the lock.
	do func(ctx context.Context) error
	// done records what came of it; it runs with the lock.
	done func(err error)
}

var (
	errVanished  = errors.New("the task has vanished")
	errOnRequest = errors.New("the task fails on request")
)

// begin starts work as the task of a request, which never ends in a region that is
// closed. The caller holds mu.
func (r *Region) begin(id string, w work) {
	fault := r.faults.now
	t := &task{Action: w.action, Status: taskRunning, Began: time.Now()}
	r.tasks[id] = t
	for _, target := range w.target {
		r.claimed[target] = true
	}
	if r.ctx.Err() != nil {
		return
	}
	r.running.Go(func() {
		select {
		case <-time.After(w.takes + fault.Stuck):
		case <-r.ctx.Done():
			return
		}
		var err error
		switch {
		case fault.Vanish:
			err = errVanished
		case fault.Fail:
			err = errOnRequest
		case w.do != nil:
			ctx, cancel := context.WithTimeout(r.ctx, deviceTimeout)
			err = w.do(ctx)
			cancel()
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		t.Status = taskSuccess
		if err != nil {
			t.Status, t.Output = taskFailed, err.Error()
			if fault.Vanish {
				delete(r.tasks, id)
			}
			r.log.Warn("task failed", "task", id, "action", w.action, "target", w.target, "err", err)
		}
		for _, target := range w.target {
			delete(r.claimed, target)
		}
		w.done(err) // which may begin what the task goes on with
	})
}
