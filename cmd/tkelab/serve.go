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

// serve is the background process: the lab and its control socket. Its standard
// input is the pipe from the starter, its standard output carries events.
func serve(ctx context.Context, _ []string) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	held, err := lock()
	if err != nil {
		return err
	}
	defer held.Close() // last: whoever waits for the end of the lab waits for this
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	out := json.NewEncoder(os.Stdout)
	tell := func(e event) { _ = out.Encode(e) } // whoever listened may be gone

	go func() { // ends with the pipe
		b := make([]byte, 1)
		if n, _ := os.Stdin.Read(b); n != 1 || b[0] != detach {
			stop()
		}
	}()
	l, err := lab.Start(ctx, lab.Options{
		Dir: labDir(), Cache: cacheDir(), Bin: binDir(), Image: os.Getenv("TKELAB_IMAGE"), Log: log,
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
		tell(event{Error: err.Error()})
		return err
	}
	s := &server{lab: l, log: log, stop: stop}
	err = s.run(ctx, func() { tell(event{Ready: true}) })
	sctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return errors.Join(err, l.Stop(sctx))
}

// server answers on the control socket.
type server struct {
	lab  *lab.Lab
	log  *slog.Logger
	stop context.CancelFunc
	page string

	mu   sync.Mutex // guards cvms
	cvms []*lab.CVM
}

// run serves until ctx ends. Both sockets are this user's alone.
func (s *server) run(ctx context.Context, ready func()) error {
	page, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen for the monitoring page: %w", err)
	}
	s.page = "http://" + page.Addr().String() + "/"
	control, err := net.Listen("unix", socket())
	if err != nil {
		return errors.Join(fmt.Errorf("listen on control socket: %w", err), page.Close())
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/lab", s.info)
	mux.HandleFunc("POST /v1/launch", s.launch)
	mux.HandleFunc("POST /v1/terminate", s.terminate)
	mux.HandleFunc("POST /v1/pod", s.pod)
	mux.HandleFunc("GET /v1/connect", s.connect)
	mux.HandleFunc("POST /v1/down", func(w http.ResponseWriter, _ *http.Request) { s.stop() })
	servers := []*http.Server{{Handler: mux}, {Handler: s.lab.Monitor.Handler(), ReadHeaderTimeout: 10 * time.Second}}
	listeners := []net.Listener{control, page}
	var wg sync.WaitGroup
	for i, server := range servers {
		wg.Go(func() { _ = server.Serve(listeners[i]) })
	}
	ready()
	<-ctx.Done()
	// Answers under way get a moment, such as the one to whoever asked for the end.
	sctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	for _, server := range servers {
		if server.Shutdown(sctx) != nil {
			server.Close()
		}
	}
	wg.Wait()
	return nil
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client may be gone
}

func refuse(w http.ResponseWriter, code int, err error) {
	http.Error(w, err.Error(), code)
}

func (s *server) info(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := info{Kubeconfig: s.lab.Cluster.Kubeconfig(), Key: s.lab.LoginKey(), Page: s.page, CVMs: []cvm{}}
	for _, c := range s.cvms {
		marks, _ := c.Timeline.Marks()
		i.CVMs = append(i.CVMs, cvm{c.ID, c.IP.String(), c.Name(), c.Console(), marks})
	}
	answer(w, i)
}

// launch launches a CVM and tells of every step until the Node is Ready or the
// client goes away. The body is the user-data; an empty one is the lab's own.
func (s *server) launch(w http.ResponseWriter, r *http.Request) {
	userData, err := io.ReadAll(io.LimitReader(r.Body, 64<<10))
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	spec := lab.LaunchSpec{DataDisks: []int{20}}
	if len(userData) > 0 {
		spec.UserData = userData
	}
	c, err := s.lab.Launch(r.Context(), spec)
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
		case <-r.Context().Done():
			return
		case <-changed:
		case <-s.lab.Gone(c):
			_ = enc.Encode(event{Error: "the machine is off; its last words:\n" + lab.Tail(c.Console(), 15)})
			return
		}
	}
}

func (s *server) terminate(w http.ResponseWriter, r *http.Request) {
	id := r.FormValue("id")
	if err := s.lab.Terminate(r.Context(), id); err != nil {
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
func (s *server) pod(w http.ResponseWriter, r *http.Request) {
	p, err := s.lab.RunWeb(r.Context(), r.FormValue("name"), r.FormValue("node"))
	if err != nil {
		refuse(w, http.StatusInternalServerError, err)
		return
	}
	answer(w, p)
}

// connect turns the request into a connection to an address of the VPC.
func (s *server) connect(w http.ResponseWriter, r *http.Request) {
	out, err := s.lab.Dial(r.Context(), "tcp", r.FormValue("addr"))
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
