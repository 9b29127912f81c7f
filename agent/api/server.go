package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"strconv"
	"time"
)

// Limits of the socket. A client is local but not trusted: it may hold a
// connection, send slowly, or send without end.
const (
	maxBody       = 64 << 10
	maxHeader     = 8 << 10
	maxConns      = 32 // of readers that are not root
	headerTimeout = 5 * time.Second
	readTimeout   = 10 * time.Second
	// A plan may take the engine's 30 s, a profile as long as it is asked for.
	writeTimeout = 70 * time.Second
	idleTimeout  = 2 * time.Minute
	stopTimeout  = 3 * time.Second
)

// Server answers on the socket.
type Server struct {
	log     *slog.Logger
	source  Source
	started time.Time
	mux     *http.ServeMux
	group   int // whose members may read; -1: there is no such group
}

// New returns a server that tells what source knows.
func New(log *slog.Logger, source Source) *Server {
	s := &Server{log: log, source: source, started: now(), mux: http.NewServeMux(), group: lookupGroup(Group)}
	for _, route := range Routes {
		s.mux.Handle(route.Method+" "+route.Path, s.handler(route))
	}
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, &httpError{http.StatusNotFound, fmt.Sprintf("there is no %s %s; `man tkenode` lists what there is", r.Method, r.URL.Path)})
	})
	return s
}

// Run listens on path until ctx ends, and waits for the answers under way.
func (s *Server) Run(ctx context.Context, path string) error {
	l, err := s.listen(path)
	if err != nil {
		return err
	}
	srv := &http.Server{
		Handler:           s.mux,
		ConnContext:       withPeer,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(guard(l, maxConns, s.log)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", path, err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if srv.Shutdown(stop) != nil {
		_ = srv.Close() // whoever still reads is cut off
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", path, err)
	}
	return nil
}

// listen binds path in place of whatever an earlier agent left there. Only one
// agent runs: systemd sees to that.
func (s *Server) listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("replace socket: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("open socket: %w", err)
	}
	// The mode is the first gate: to connect is to have write permission. Each
	// request is checked by the peer's credentials nevertheless.
	if s.group >= 0 {
		err = os.Chown(path, -1, s.group)
	}
	if err == nil {
		err = os.Chmod(path, 0o660)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open socket: %w", err), l.Close())
	}
	return l, nil
}

// handler checks who asks, and turns errors into answers.
func (s *Server) handler(route Route) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := r.Context().Value(peerKey{}).(peer)
		if !p.may(route.access, s.group) {
			fail(w, &httpError{http.StatusForbidden, fmt.Sprintf("%s %s is not for user id %d: be root%s", route.Method, route.Path, p.uid, orGroup(route.access))})
			return
		}
		if route.Method == http.MethodPost {
			s.log.Info("asked to act", "path", route.Path, "uid", p.uid, "pid", p.pid)
		}
		if err := route.serve(s, w, r); err != nil {
			fail(w, err)
		}
	})
}

func orGroup(a access) string {
	if a == read {
		return " or a member of the group " + Group
	}
	return ""
}

// decode reads a JSON body strictly: one value, no field that is not known.
func decode(w http.ResponseWriter, r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	err := d.Decode(v)
	if err == nil {
		if _, more := d.Token(); more != io.EOF {
			err = errors.New("something follows the value")
		}
	}
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return &httpError{http.StatusRequestEntityTooLarge, fmt.Sprintf("the request is larger than %d bytes", maxBody)}
	}
	return &httpError{http.StatusBadRequest, fmt.Sprintf("read the request: %v", err)}
}

// respond writes v. It is encoded whole first, so that an error can still be one.
func respond(w http.ResponseWriter, v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = b.WriteTo(w) // the client has gone: nobody to tell
	return nil
}

func fail(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(codeOf(err))
	_ = json.NewEncoder(w).Encode(failure{err.Error()}) // as above
}

// now is when an answer is made, in the zone that logs are written in.
func now() time.Time { return time.Now().UTC() }

// lookupGroup returns the id of the named group, or -1.
func lookupGroup(name string) int {
	g, err := user.LookupGroup(name)
	if err != nil {
		return -1
	}
	id, err := strconv.Atoi(g.Gid)
	if err != nil {
		return -1
	}
	return id
}
