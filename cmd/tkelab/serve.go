package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/tkenode/tkenode/lab"
)

// event is what the process in the background tells the one in the foreground,
// one JSON object a line.
type event struct {
	Begin string    `json:"begin,omitempty"` // a step of the start
	End   string    `json:"end,omitempty"`
	Ready bool      `json:"ready,omitempty"` // the lab is up
	Mark  *lab.Mark `json:"mark,omitempty"`  // of a launch
	Error string    `json:"error,omitempty"`
}

// info is what the lab says of itself.
type info struct {
	Kubeconfig string `json:"kubeconfig"`
	Key        string `json:"key"` // for ssh
	Page       string `json:"page"`
	CVMs       []cvm  `json:"cvms"` // oldest first
}

type cvm struct {
	ID      string     `json:"id"`
	IP      string     `json:"ip"`
	Node    string     `json:"node"`
	Console string     `json:"console"`
	Marks   []lab.Mark `json:"marks"`
}

// detach, written to the background process by the one that started it, makes it
// stay. If the pipe ends without it, the starter is gone and the lab ends, too.
const detach = 'd'

// lockFD is the lock, as the starter hands it on.
const lockFD = 3

// state is how far the life of a lab is.
type state string

const (
	starting state = "starting"
	attached state = "attached" // up, and whoever started it is there
	detached state = "detached" // up by itself
	stopping state = "stopping"
)

type stateAnswer struct {
	State state `json:"state"`
}

// serve is the background process: the lab and its control socket. Its standard
// input is the pipe from the starter, its standard output carries events.
func serve(ctx context.Context, _ []string) (err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	syscall.CloseOnExec(lockFD) // no child may hold it
	held := os.NewFile(lockFD, lockFile())
	defer held.Close() // last: whoever waits for the end of the lab waits for this
	if err := sign(held, "tkelab serve"); err != nil {
		return fmt.Errorf("serve is started by demo and up: %w", err)
	}
	out := json.NewEncoder(os.Stdout)
	tell := func(e event) { _ = out.Encode(e) } // whoever listened may be gone
	defer func() {
		if err != nil {
			tell(event{Error: err.Error()})
		}
	}()
	s := &server{log: slog.New(slog.NewTextHandler(os.Stderr, nil)), stop: stop, state: starting}
	go func() { // ends with the pipe
		b := make([]byte, 1)
		if n, _ := os.Stdin.Read(b); n != 1 || b[0] != detach {
			stop()
			return
		}
		s.detach()
	}()
	return s.run(ctx, tell)
}

// server answers on the control socket.
type server struct {
	log  *slog.Logger
	stop context.CancelFunc

	mu    sync.Mutex // guards the rest
	state state
	lab   *lab.Lab // nil unless the lab is up
	page  string
	cvms  []*lab.CVM
}

// run is the life of the lab. The control socket is there before the lab and
// after it, so that whoever asks hears how far it is. Both sockets are this
// user's alone.
func (s *server) run(ctx context.Context, tell func(event)) (err error) {
	control, err := net.Listen("unix", socket())
	if err != nil {
		return fmt.Errorf("listen on control socket: %w", err)
	}
	defer s.serve(ctx, control, &http.Server{Handler: s.mux()})()
	l, err := lab.Start(ctx, lab.Options{
		Dir: labDir(), Cache: cacheDir(), Bin: binDir(), Image: os.Getenv("TKELAB_IMAGE"), Log: s.log,
		Begin: func(s string) { tell(event{Begin: s}) },
		End: func(s string, err error) {
			e := event{End: s}
			if err != nil {
				e.Error = err.Error()
			}
			tell(e)
		},
	})
	if err != nil {
		return err
	}
	defer func() {
		sctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err = errors.Join(err, l.Stop(sctx))
	}()
	page, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen for the monitoring page: %w", err)
	}
	defer s.serve(ctx, page, &http.Server{Handler: l.Monitor.Handler(), ReadHeaderTimeout: 10 * time.Second})()
	s.mu.Lock()
	s.state, s.lab, s.page = attached, l, "http://"+page.Addr().String()+"/"
	s.mu.Unlock()
	tell(event{Ready: true})
	<-ctx.Done()
	s.mu.Lock()
	s.state, s.lab = stopping, nil
	s.mu.Unlock()
	return nil
}

// serve answers on a listener until the returned function is called; requests
// end with ctx.
func (s *server) serve(ctx context.Context, l net.Listener, server *http.Server) (end func()) {
	server.BaseContext = func(net.Listener) context.Context { return ctx }
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	return func() {
		// Answers under way get a moment, such as the one to whoever asked for the end.
		sctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(sctx) != nil {
			server.Close()
		}
		<-done
	}
}

func (s *server) mux() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		answer(w, stateAnswer{s.state})
	})
	mux.HandleFunc("POST /v1/down", func(w http.ResponseWriter, _ *http.Request) { s.down() })
	for pattern, f := range map[string]func(*lab.Lab, http.ResponseWriter, *http.Request){
		"GET /v1/lab":        s.info,
		"POST /v1/launch":    s.launch,
		"POST /v1/terminate": s.terminate,
		"POST /v1/pod":       s.pod,
		"GET /v1/connect":    s.connect,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			s.mu.Lock()
			l, state := s.lab, s.state
			s.mu.Unlock()
			if l == nil {
				refuse(w, http.StatusServiceUnavailable, fmt.Errorf("the lab is %s", state))
				return
			}
			f(l, w, r)
		})
	}
	return mux
}

// down ends the lab, at whatever point of its life it is.
func (s *server) down() {
	s.mu.Lock()
	s.state = stopping
	s.mu.Unlock()
	s.stop()
}

// detach takes down that whoever started the lab leaves it running.
func (s *server) detach() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state == attached {
		s.state = detached
	}
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client may be gone
}

func refuse(w http.ResponseWriter, code int, err error) {
	http.Error(w, err.Error(), code)
}

func (s *server) info(l *lab.Lab, w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := info{Kubeconfig: l.Cluster.Kubeconfig(), Key: l.LoginKey(), Page: s.page, CVMs: []cvm{}}
	for _, c := range s.cvms {
		marks, _ := c.Timeline.Marks()
		i.CVMs = append(i.CVMs, cvm{c.ID, c.IP.String(), c.Name(), c.Console(), marks})
	}
	answer(w, i)
}

// launchLimit is many times what a launch takes without hardware virtualisation.
const launchLimit = 30 * time.Minute

// launch launches a CVM and tells of every step until the Node is Ready or the
// client goes away. The body is the user-data; an empty one is the lab's own.
func (s *server) launch(l *lab.Lab, w http.ResponseWriter, r *http.Request) {
	userData, err := io.ReadAll(io.LimitReader(r.Body, 64<<10))
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	spec := lab.LaunchSpec{DataDisks: []int{20}}
	if len(userData) > 0 {
		spec.UserData = userData
	}
	c, err := l.Launch(r.Context(), spec)
	if err != nil {
		refuse(w, http.StatusInternalServerError, err)
		return
	}
	s.mu.Lock()
	s.cvms = append(s.cvms, c)
	s.mu.Unlock()
	s.log.Info("launched", "instance", c.ID, "ip", c.IP)

	w.Header().Set("X-Instance", c.ID)
	w.Header().Set("X-Node", c.Name())
	w.Header().Set("X-Console", c.Console())
	out := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	tooLong := time.After(launchLimit)
	told := 0
	for {
		marks, changed := c.Timeline.Marks()
		for _, m := range marks[told:] {
			told++
			if enc.Encode(event{Mark: &m}) != nil || out.Flush() != nil {
				return
			}
			if m.Step == lab.NodeReady {
				return
			}
		}
		select {
		case <-r.Context().Done(): // the client is gone, or the lab is being stopped
			_ = enc.Encode(event{Error: "the lab was stopped"})
			return
		case <-changed:
			continue
		case <-l.Gone(c):
			err = errors.New("the machine is off")
		case <-l.Cluster.Failed():
			err = fmt.Errorf("the control plane has failed: %w", l.Cluster.Err())
		case <-tooLong:
			err = fmt.Errorf("the node is not Ready after %v", launchLimit)
		}
		_ = enc.Encode(event{Error: err.Error() + "; the machine's last words:\n" + lab.Tail(c.Console(), 15)})
		return
	}
}

func (s *server) terminate(l *lab.Lab, w http.ResponseWriter, r *http.Request) {
	id := r.FormValue("id")
	if err := l.Terminate(r.Context(), id); err != nil {
		refuse(w, http.StatusNotFound, err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, c := range s.cvms {
		if c.ID == id {
			s.cvms = append(s.cvms[:i], s.cvms[i+1:]...)
			break
		}
	}
}

// pod runs a pod of the lab's web image and fetches its page from another address
// of the VPC.
func (s *server) pod(l *lab.Lab, w http.ResponseWriter, r *http.Request) {
	const limit = 10 * time.Minute // its image is there; a slow machine takes one
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	p, err := l.RunWeb(ctx, r.FormValue("name"), r.FormValue("node"))
	if err != nil {
		refuse(w, http.StatusInternalServerError, err)
		return
	}
	answer(w, p)
}

// connect turns the request into a connection to an address of the VPC.
func (s *server) connect(l *lab.Lab, w http.ResponseWriter, r *http.Request) {
	out, err := l.Dial(r.Context(), "tcp", r.FormValue("addr"))
	if err != nil {
		refuse(w, http.StatusBadGateway, err)
		return
	}
	defer out.Close()
	in, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		refuse(w, http.StatusInternalServerError, err)
		return
	}
	defer in.Close()
	if _, err := io.WriteString(in, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: tcp\r\nConnection: Upgrade\r\n\r\n"); err != nil {
		return
	}
	_ = lab.Splice(r.Context(), buffered{in, buf.Reader}, out)
}

// buffered reads first what the HTTP server has read already.
type buffered struct {
	net.Conn
	r *bufio.Reader
}

func (b buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

// cleanLabDir removes what an earlier lab left, which is of no use to a new one.
func cleanLabDir() error {
	if err := os.RemoveAll(labDir()); err != nil {
		return fmt.Errorf("remove earlier lab: %w", err)
	}
	return os.MkdirAll(filepath.Join(labDir(), "net"), 0o700)
}
