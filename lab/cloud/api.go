package cloud

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

const (
	apiVersion     = "2017-03-12" // of vpc, cbs and cvm alike
	maxRequestBody = 10 << 20
	maxClientToken = 64
)

// handler does what an action does, with the lock held. id is the request's, and
// so that of the task it starts.
type handler func(r *Region, id string, body []byte) (any, error)

// action is one action of the API.
type action struct {
	rate       int // requests a second
	idempotent bool
	do         handler
}

// actions are those that the region has. Rates are the vendor's defaults where
// it states one: "默认接口请求频率限制" on each action's page below
// https://cloud.tencent.com/document/api/215
var actions = map[string]action{
	"vpc:CreateNetworkInterface":          {20, true, handle((*Region).createNetworkInterface)},
	"vpc:AttachNetworkInterface":          {50, true, handle((*Region).attachNetworkInterface)},
	"vpc:CreateAndAttachNetworkInterface": {20, true, handle((*Region).createAndAttachNetworkInterface)},
	"vpc:DetachNetworkInterface":          {50, true, handle((*Region).detachNetworkInterface)},
	"vpc:DeleteNetworkInterface":          {20, false, handle((*Region).deleteNetworkInterface)},
	"vpc:AssignPrivateIpAddresses":        {100, true, handle((*Region).assignPrivateIPAddresses)},
	"vpc:UnassignPrivateIpAddresses":      {100, false, handle((*Region).unassignPrivateIPAddresses)},
	"vpc:AssignIpv6Addresses":             {20, true, handle((*Region).assignIPv6Addresses)},
	"vpc:UnassignIpv6Addresses":           {20, false, handle((*Region).unassignIPv6Addresses)},
	"vpc:DescribeNetworkInterfaces":       {100, false, handle((*Region).describeNetworkInterfaces)},
	"vpc:DescribeNetworkInterfaceLimit":   {20, false, handle((*Region).describeNetworkInterfaceLimit)},
	"vpc:DescribeSubnets":                 {100, false, handle((*Region).describeSubnets)},
	"vpc:DescribeVpcTaskResult":           {20, false, handle((*Region).describeVpcTaskResult)},
	"cbs:DescribeDisks":                   {20, false, handle((*Region).describeDisks)},
	"cbs:AttachDisks":                     {20, false, handle((*Region).attachDisks)},
	"cbs:DetachDisks":                     {20, false, handle((*Region).detachDisks)},
	"cbs:CreateDisks":                     {20, true, handle((*Region).createDisks)},
	"cbs:ResizeDisk":                      {20, false, handle((*Region).resizeDisk)},
	"cbs:DescribeInstancesDiskNum":        {20, false, handle((*Region).describeInstancesDiskNum)},
	"cvm:DescribeInstances":               {40, false, handle((*Region).describeInstances)},
	"cvm:DescribeZones":                   {20, false, handle((*Region).describeZones)},
}

// handle decodes the parameters of an action strictly, as the API does.
func handle[In any](f func(r *Region, id string, in *In) (any, error)) handler {
	return func(r *Region, id string, body []byte) (any, error) {
		in := new(In)
		d := json.NewDecoder(bytes.NewReader(body))
		d.DisallowUnknownFields()
		if err := d.Decode(in); err != nil {
			if field, ok := strings.CutPrefix(err.Error(), "json: unknown field "); ok {
				return nil, refuse("UnknownParameter", "the parameter %s is not recognized", field)
			}
			return nil, refuse("InvalidParameter", "the request's JSON: %v", err)
		}
		return f(r, id, in)
	}
}

// reply is what a ClientToken has been answered with.
type reply struct {
	params string
	body   []byte // nil while the request is being worked on
}

// rate counts the requests of one second.
type rate struct {
	second int64
	n      int
}

func (r *Region) serveAPI(w http.ResponseWriter, req *http.Request) {
	id := newUUID()
	body, drop, err := r.answer(req, id)
	if drop {
		panic(http.ErrAbortHandler) // the answer is lost on the way
	}
	if err != nil {
		var e *refusal
		if !errors.As(err, &e) {
			r.log.Error("API request failed", "action", req.Header.Get("X-TC-Action"), "err", err)
			e = &refusal{"InternalError", "internal error"}
		}
		body = envelope(map[string]any{"Error": e}, id)
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(body) // the client is gone; there is nobody to tell
}

// answer carries a request out, and says whether its answer is to be lost.
func (r *Region) answer(req *http.Request, id string) (body []byte, drop bool, err error) {
	params, err := io.ReadAll(io.LimitReader(req.Body, maxRequestBody+1))
	if err != nil {
		return nil, true, err
	}
	name, act, err := r.route(req, params)
	if err != nil {
		return nil, false, err
	}
	key, err := r.authenticate(req, strings.Split(name, ":")[0], params)
	if err != nil {
		return nil, false, err
	}
	if !r.policy.allows(name) {
		r.log.Warn("CAM denies", "action", name, "instance", key.Instance)
		return nil, false, refuse("AuthFailure.UnauthorizedOperation", "the role %s is not authorized to perform %s", r.config.Role, name)
	}
	if err := r.throttle(name, act); err != nil {
		return nil, false, err
	}
	token, err := clientToken(name, act, params)
	if err != nil {
		return nil, false, err
	}
	known, err := r.reserve(token, params)
	if err != nil || known != nil {
		return known, false, err
	}
	fault := r.fault(name)
	if err := pause(req.Context(), fault.Delay); err != nil {
		r.settle(token, nil)
		return nil, true, err
	}
	if fault.Code != "" {
		r.settle(token, nil)
		return nil, fault.Drop, refuse(fault.Code, "%s", fault.Message)
	}
	r.mu.Lock()
	r.faults.now = fault
	out, err := act.do(r, id, params)
	r.faults.now = Fault{}
	r.mu.Unlock()
	if err == nil {
		body = envelope(out, id)
	}
	r.settle(token, body)
	return body, fault.Drop, err
}

// route finds the action that a request is for.
func (r *Region) route(req *http.Request, body []byte) (string, action, error) {
	host, _, err := net.SplitHostPort(req.Host)
	if err != nil {
		host = req.Host
	}
	service, ok := strings.CutSuffix(host, "."+r.config.Domain)
	name := service + ":" + req.Header.Get("X-TC-Action")
	act, known := actions[name]
	switch {
	case len(body) > maxRequestBody:
		return "", act, refuse("RequestSizeLimitExceeded", "the request is larger than %d bytes", maxRequestBody)
	case req.Method != http.MethodPost || req.URL.Path != "/":
		return "", act, refuse("UnsupportedProtocol", "%s %s is not supported here, only POST /", req.Method, req.URL.Path)
	case !strings.HasPrefix(req.Header.Get("Content-Type"), "application/json"):
		return "", act, refuse("UnsupportedProtocol", "content type %q is not supported here, only application/json", req.Header.Get("Content-Type"))
	case !ok || service != "vpc" && service != "cbs" && service != "cvm":
		return "", act, refuse("NoSuchProduct", "no product answers at %s", host)
	case req.Header.Get("X-TC-Version") != apiVersion:
		return "", act, refuse("NoSuchVersion", "%s has no version %q", service, req.Header.Get("X-TC-Version"))
	case !known:
		return "", act, refuse("InvalidAction", "%s has no action %q", service, req.Header.Get("X-TC-Action"))
	case req.Header.Get("X-TC-Region") != r.config.Region:
		return "", act, refuse("UnsupportedRegion", "region %q is not this one, %s", req.Header.Get("X-TC-Region"), r.config.Region)
	}
	return name, act, nil
}

// throttle counts a request, and refuses it where there are too many a second.
func (r *Region) throttle(name string, act action) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls[name]++
	now := time.Now().Unix()
	c := r.rates[name]
	if c == nil || c.second != now {
		c = &rate{second: now}
		r.rates[name] = c
	}
	if c.n++; c.n > act.rate {
		return refuse("RequestLimitExceeded", "%s exceeds the limit of %d requests a second", name, act.rate)
	}
	return nil
}

// clientToken returns what a request's ClientToken is known by, or nothing.
func clientToken(name string, act action, body []byte) (string, error) {
	if !act.idempotent {
		return "", nil
	}
	var in struct{ ClientToken string }
	// What is wrong with the rest is for the action to say.
	if err := json.Unmarshal(body, &in); err != nil || in.ClientToken == "" {
		return "", nil
	}
	if len(in.ClientToken) > maxClientToken {
		return "", refuse("InvalidParameterValue.TooLong", "ClientToken is longer than %d characters", maxClientToken)
	}
	return name + "/" + in.ClientToken, nil
}

// reserve takes a token, or returns what it has been answered with already.
func (r *Region) reserve(token string, params []byte) ([]byte, error) {
	if token == "" {
		return nil, nil
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, params); err != nil {
		return nil, refuse("InvalidParameter", "the request's JSON: %v", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	known := r.replies[token]
	switch {
	case known == nil:
		r.replies[token] = &reply{params: compact.String()}
		return nil, nil
	case known.params != compact.String():
		return nil, refuse("UnsupportedOperation.IdempotentParameterMismatch", "the ClientToken was used with other parameters")
	case known.body == nil:
		return nil, refuse("UnsupportedOperation.IdempotentProcessing", "a request with this ClientToken is being processed")
	}
	return known.body, nil
}

// settle keeps the answer to a token, or frees the token where there is none: a
// refused request may be made again.
func (r *Region) settle(token string, body []byte) {
	if token == "" {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if body == nil {
		delete(r.replies, token)
		return
	}
	r.replies[token].body = body
}

// envelope wraps an answer as every answer is: {"Response":{...,"RequestId":...}}.
func envelope(out any, id string) []byte {
	raw, err := json.Marshal(out)
	if err != nil {
		panic(err) // answers are plain structs
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		panic(err)
	}
	fields["RequestId"] = json.RawMessage(`"` + id + `"`)
	body, err := json.Marshal(map[string]any{"Response": fields})
	if err != nil {
		panic(err)
	}
	return body
}
