package api

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"net/netip"

	"github.com/tkenode/tkenode/agent/disk"
	"github.com/tkenode/tkenode/agent/eni"
	"github.com/tkenode/tkenode/agent/node"
)

// access says who may use a route.
type access int

const (
	read  access = iota // root and members of Group
	write               // root
)

// Route is one row of the table that the server and the manual are made from.
type Route struct {
	Method string
	Path   string
	Help   string // one line
	access access
	serve  func(*Server, http.ResponseWriter, *http.Request) error
}

// Root reports whether only root may use the route.
func (r Route) Root() bool { return r.access == write }

// Routes is everything that the socket answers to, sorted by path.
var Routes = []Route{
	{"GET", "/debug/pprof/", "the runtime's profiles, by name", write, profile(pprof.Index)},
	{"GET", "/debug/pprof/profile", "a CPU profile of ?seconds=", write, profile(pprof.Profile)},
	{"GET", "/debug/pprof/trace", "an execution trace of ?seconds=", write, profile(pprof.Trace)},
	{"GET", "/metrics", "what is pushed, in Prometheus' text format", read, (*Server).metrics},
	{"GET", "/v1/boot", "the ledger of this boot", read, (*Server).boot},
	{"GET", "/v1/config", "the sealed configuration, secrets left out", read, (*Server).config},
	{"GET", "/v1/disks", "the disks of the NodeConfig, and the evidence of each", read, (*Server).disks},
	{"POST", "/v1/disks", `adopt or format: {"act": "format", "diskID": "disk-1a2b3c4d", "serial": "disk-1a2b3c4d"}`, write, (*Server).decide},
	{"GET", "/v1/eni", "ENIs, their addresses, and the pods that have them", read, (*Server).eni},
	{"GET", "/v1/explain", "the way of packets of ?pod=NAMESPACE/NAME or ?ip=, with &to=", read, (*Server).explain},
	{"GET", "/v1/facts", "what the metadata service said of this instance", read, (*Server).facts},
	{"GET", "/v1/plan", "what every instance would change now", read, (*Server).plan},
	{"GET", "/v1/status", "conditions and instances", read, (*Server).status},
	{"GET", "/v1/volumes", "attached disks that are not of the NodeConfig, and how many volumes may be attached", read, (*Server).volumes},
	{"POST", "/v1/wake", `have {"instance": "disk/disk-1a2b3c4d"}, or {} all, look again`, write, (*Server).wake},
}

// errUnsealed is answered to questions about a configuration that is not there.
var errUnsealed = &httpError{http.StatusNotFound, "no configuration is sealed yet"}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) error {
	st := Status{
		Version:    s.source.Version,
		Now:        now(),
		Started:    s.started,
		Conditions: s.source.Conditions(),
		Instances:  s.source.Instances(),
		Warnings:   s.source.Warnings(),
	}
	for i, c := range st.Conditions {
		if c.Status != node.True {
			st.Unmet = &st.Conditions[i]
			break
		}
	}
	if sealed, ok := s.source.Sealed(); ok {
		st.Node = &Identity{
			Name:       sealed.Config.Name(sealed.Facts),
			InstanceID: sealed.Facts.InstanceID,
			Cluster:    sealed.Config.Cluster.ID,
			Zone:       sealed.Facts.Zone,
			Generation: sealed.Generation,
		}
	}
	return respond(w, st)
}

func (s *Server) plan(w http.ResponseWriter, r *http.Request) error {
	return respond(w, Plan{Instances: s.source.Plan(r.Context())})
}

func (s *Server) config(w http.ResponseWriter, _ *http.Request) error {
	sealed, ok := s.source.Sealed()
	if !ok {
		return errUnsealed
	}
	return respond(w, sealed)
}

func (s *Server) disks(w http.ResponseWriter, _ *http.Request) error {
	if _, ok := s.source.Sealed(); !ok {
		return errUnsealed
	}
	return respond(w, s.source.Disks())
}

func (s *Server) volumes(w http.ResponseWriter, _ *http.Request) error {
	if _, ok := s.source.Sealed(); !ok {
		return errUnsealed
	}
	return respond(w, s.source.Volumes())
}

func (s *Server) decide(w http.ResponseWriter, r *http.Request) error {
	var o disk.Order
	if err := decode(w, r, &o); err != nil {
		return err
	}
	p := r.Context().Value(peerKey{}).(peer)
	o.UID, o.PID = p.uid, p.pid
	err := s.source.Decide(r.Context(), o)
	if errors.Is(err, disk.ErrRefused) {
		return &httpError{http.StatusConflict, err.Error()}
	}
	if err != nil {
		return err
	}
	return respond(w, struct{}{})
}

func (s *Server) eni(w http.ResponseWriter, _ *http.Request) error {
	if _, ok := s.source.Sealed(); !ok {
		return errUnsealed
	}
	st, err := s.source.ENI()
	if err != nil {
		return err
	}
	return respond(w, st)
}

func (s *Server) explain(w http.ResponseWriter, r *http.Request) error {
	bad := func(format string, args ...any) error {
		return &httpError{http.StatusBadRequest, fmt.Sprintf(format, args...)}
	}
	asked := r.URL.Query()
	q := eni.Question{Pod: asked.Get("pod")}
	for name, dst := range map[string]*netip.Addr{"ip": &q.IP, "to": &q.To} {
		text := asked.Get(name)
		if text == "" {
			continue
		}
		a, err := netip.ParseAddr(text)
		if err != nil || !eni.Explicable(a) {
			return bad("%s=%.64q is not an address of a VPC", name, text)
		}
		*dst = a
	}
	if (q.Pod == "") == !q.IP.IsValid() {
		return bad("ask for ?pod=NAMESPACE/NAME or for ?ip=ADDRESS")
	}
	e, err := s.source.Explain(r.Context(), q)
	if errors.Is(err, eni.ErrNotHere) {
		return &httpError{http.StatusNotFound, err.Error()}
	}
	if err != nil {
		return err
	}
	return respond(w, e)
}

func (s *Server) facts(w http.ResponseWriter, _ *http.Request) error {
	sealed, ok := s.source.Sealed()
	if !ok {
		return errUnsealed
	}
	return respond(w, sealed.Facts)
}

func (s *Server) boot(w http.ResponseWriter, _ *http.Request) error {
	return respond(w, s.source.Boot())
}

func (s *Server) metrics(w http.ResponseWriter, r *http.Request) error {
	s.source.Metrics.ServeHTTP(w, r)
	return nil
}

func (s *Server) wake(w http.ResponseWriter, r *http.Request) error {
	var body Wake
	if err := decode(w, r, &body); err != nil {
		return err
	}
	woken := []string{}
	for _, in := range s.source.Instances() {
		if (body.Instance == "" || body.Instance == in.Name) && s.source.Wake(in.Name) {
			woken = append(woken, in.Name)
		}
	}
	if body.Instance != "" && len(woken) == 0 {
		return &httpError{http.StatusNotFound, fmt.Sprintf("there is no instance %q", body.Instance)}
	}
	return respond(w, map[string][]string{"woken": woken})
}

// profile serves one of net/http/pprof's handlers.
func profile(h http.HandlerFunc) func(*Server, http.ResponseWriter, *http.Request) error {
	return func(_ *Server, w http.ResponseWriter, r *http.Request) error {
		h(w, r)
		return nil
	}
}

// httpError is an error with the status code to answer it with.
type httpError struct {
	code int
	text string
}

func (e *httpError) Error() string { return e.text }

// codeOf returns the status code for err; an error that has none is ours.
func codeOf(err error) int {
	if e, ok := errors.AsType[*httpError](err); ok {
		return e.code
	}
	return http.StatusInternalServerError
}
