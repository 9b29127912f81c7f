package cloud

import (
	"context"
	"path"
	"time"
)

// Fault is something that goes wrong with the API on request.
type Fault struct {
	Action  string        // vpc:AttachNetworkInterface; a pattern of path.Match, so * is every action
	Times   int           // how often; 0 is once
	Delay   time.Duration // before anything else
	Code    string        // refuse with it instead of doing anything
	Message string
	Drop    bool // lose the answer after the work is done

	// What goes wrong after the request is taken:
	Stuck   time.Duration // the task runs so much longer
	Vanish  bool          // the task ends without effect, and then nobody knows of it
	Fail    bool          // the task ends FAILED, without effect
	Partial int           // so many of the addresses asked for are not given
}

// MetadataFault is something that goes wrong with the metadata service.
type MetadataFault struct {
	For    time.Duration // from now on
	Status int           // answer with it, as 500
	Silent bool          // do not answer before For is over
	Stale  time.Duration // answer what was so that long ago, at most 10 min
}

// faults are those that are waiting to happen.
type faults struct {
	api      []Fault
	now      Fault // of the action that is being done
	metadata MetadataFault
	until    time.Time // the end of metadata
}

// Inject makes the API fail.
func (r *Region) Inject(f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f.Times = max(f.Times, 1)
	r.faults.api = append(r.faults.api, f)
}

// InjectMetadata makes the metadata service fail, for every instance. It takes
// the place of what was injected before.
func (r *Region) InjectMetadata(f MetadataFault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults.metadata, r.faults.until = f, time.Now().Add(f.For)
}

// ClearFaults ends every fault that was injected.
func (r *Region) ClearFaults() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = faults{}
}

// fault takes the first fault that is waiting for the action.
func (r *Region) fault(action string) Fault {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.faults.api {
		f := r.faults.api[i]
		if ok, err := path.Match(f.Action, action); err != nil || !ok {
			continue
		}
		if r.faults.api[i].Times--; r.faults.api[i].Times == 0 {
			r.faults.api = append(r.faults.api[:i:i], r.faults.api[i+1:]...)
		}
		return f
	}
	return Fault{}
}

// pause waits, unless ctx ends before.
func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
