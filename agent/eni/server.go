package eni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tkenode/tkenode/agent/eni/cni"
	"github.com/tkenode/tkenode/agent/node"
)

const (
	maxCalls     = 256 // at once; more wait in the socket's backlog
	readTimeout  = 5 * time.Second
	writeTimeout = 5 * time.Second
	// addTimeout is how long an ADD waits for an address. kubelet gives a sandbox
	// 4 min and then tries again; an error before that tells people why.
	addTimeout = 30 * time.Second
)

// Serve carries out the DELs that are queued, and then answers the CNI plugin on a
// unix listener until ctx ends, and waits for the calls under way. It closes the
// listener.
func (n *Network) Serve(ctx context.Context, l net.Listener) error {
	n.drain()
	var sweeping sync.WaitGroup
	defer sweeping.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sweeping.Go(func() { n.sweep(ctx) })
	return n.serve(ctx, l, 0)
}

// serve takes calls of one user.
func (n *Network) serve(ctx context.Context, l net.Listener, uid uint32) error {
	ctx, cancel := context.WithCancel(ctx)
	var calls sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer func() {
		stop()
		cancel()
		l.Close()
		calls.Wait()
	}()
	slots := make(chan struct{}, maxCalls)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := n.accept(ctx, l)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept CNI call: %w", err)
		}
		calls.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			if err := n.answer(ctx, conn, uid); err != nil {
				n.log.Warn("CNI call ended", "err", err)
			}
		})
	}
}

// accept takes the next call. What only a lack of means keeps it from is tried
// again, with a pause as net/http makes it: the socket is the node's only way to
// a pod's network.
func (n *Network) accept(ctx context.Context, l net.Listener) (net.Conn, error) {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		conn, err := l.Accept()
		if err == nil || !slices.ContainsFunc(scarce, func(e error) bool { return errors.Is(err, e) }) {
			return conn, err
		}
		n.log.Warn("a CNI call waits", "err", err, "pause", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

var scarce = []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED}

// answer serves one call. It stops waiting when the caller hangs up, and hangs up
// without an answer when ctx ends: the plugin then asks the next agent.
func (n *Network) answer(ctx context.Context, conn net.Conn, uid uint32) error {
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := authorize(conn, uid); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(readTimeout)); err != nil {
		return err
	}
	var req cni.Request
	if err := cni.Read(conn, cni.MaxRequest, &req); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	var gone sync.WaitGroup
	gone.Go(func() {
		conn.Read(make([]byte, 1)) // returns when the caller hangs up, or we do
		cancel()
	})
	started := time.Now()
	resp := n.handle(ctx, req)
	if ctx.Err() == nil {
		if resp.Error != nil {
			n.log.Warn("CNI call refused", "command", req.Command, "container", req.ContainerID,
				"pod", req.PodNamespace+"/"+req.PodName, "err", resp.Error, "took", time.Since(started).Round(time.Millisecond))
		}
		conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if err := json.NewEncoder(conn).Encode(resp); err != nil {
			n.log.Warn("answer CNI call", "err", err)
		}
	}
	conn.Close()
	gone.Wait()
	return n.paths.reap()
}

func authorize(conn net.Conn, uid uint32) error {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("read peer credentials: %w", credErr)
	}
	if cred.Uid != uid {
		return fmt.Errorf("process %d of user %d may not make CNI calls", cred.Pid, cred.Uid)
	}
	return nil
}

// handle carries one request out.
func (n *Network) handle(ctx context.Context, req cni.Request) cni.Response {
	if err := validate(req); err != nil {
		return cni.Response{Error: err}
	}
	var result *cni.Result
	var err error
	switch req.Command {
	case cni.Add:
		result, err = n.add(ctx, req)
	case cni.Del:
		err = n.del(req.Attachment)
	case cni.Check:
		err = n.check(req)
	case cni.GC:
		err = n.gc(req.Valid)
	}
	if err == nil {
		return cni.Response{Result: result}
	}
	if e, ok := errors.AsType[*cni.Error](err); ok {
		return cni.Response{Error: e}
	}
	code := cni.CodeNetwork
	if _, ok := errors.AsType[ledgerError](err); ok {
		code = cni.CodeLedger
	}
	return cni.Response{Error: cni.Errorf(code, string(req.Command)+" of the pod's network", "%v", err)}
}

var (
	// As CNI demands of container ids, and Linux of interface names.
	containerID = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,127}$`)
	ifName      = regexp.MustCompile(`^[a-zA-Z0-9_.\-]{1,15}$`)
	groupID     = regexp.MustCompile(`^sg-[a-z0-9]{6,16}$`)
	podName     = regexp.MustCompile(`^[a-zA-Z0-9_.\-]{0,253}$`)
)

func validate(req cni.Request) *cni.Error {
	invalid := func(format string, args ...any) *cni.Error {
		return cni.Errorf(cni.CodeInvalidEnvironment, "invalid environment", format, args...)
	}
	switch req.Command {
	case cni.GC:
		return nil
	case cni.Add, cni.Del, cni.Check:
	default:
		return invalid("CNI_COMMAND is %.32q", string(req.Command))
	}
	switch {
	case !containerID.MatchString(req.ContainerID):
		return invalid("CNI_CONTAINERID is %.64q", req.ContainerID)
	case !ifName.MatchString(req.IfName) || req.IfName == "." || req.IfName == ".." || req.IfName == "lo":
		return invalid("CNI_IFNAME is %.32q", req.IfName)
	case !podName.MatchString(req.PodNamespace) || !podName.MatchString(req.PodName):
		return invalid("CNI_ARGS names the pod %.64q/%.64q", req.PodNamespace, req.PodName)
	case len(req.Network) > 64 || len(req.SecurityGroups) > maxGroups || !allMatch(groupID, req.SecurityGroups):
		return cni.Errorf(cni.CodeRefused, "the pod's network is refused", "%s is %.64q and %s is %.200q, want at most %d ids such as sg-1a2b3c4d with commas between",
			cni.AnnotationNetwork, req.Network, cni.AnnotationGroups, strings.Join(req.SecurityGroups, ","), maxGroups)
	case req.Command != cni.Del && (!filepath.IsAbs(req.NetNS) || len(req.NetNS) > 4096):
		return invalid("CNI_NETNS is %.64q, want an absolute path", req.NetNS)
	}
	return nil
}

// maxGroups bounds the security groups that a pod asks for.
const maxGroups = 10

func allMatch(r *regexp.Regexp, all []string) bool {
	return !slices.ContainsFunc(all, func(s string) bool { return !r.MatchString(s) })
}

// add gives the pod an address and wires it.
func (n *Network) add(ctx context.Context, req cni.Request) (*cni.Result, error) {
	ns, err := openNetNS(req.NetNS)
	if err != nil {
		return nil, cni.Errorf(cni.CodeInvalidEnvironment, "open network namespace", "%v", err)
	}
	ns.Close()
	wanted := Pod{Attachment: req.Attachment, Namespace: req.PodNamespace, Name: req.PodName, NetNS: req.NetNS}
	if n.policy().dual {
		wanted.Addr6 = wantsIPv6
	}
	switch groups, whole, err := n.whole(req); {
	case err != nil:
		return nil, err
	case whole:
		return n.addWhole(ctx, wanted, groups)
	}
	pod, err := n.allocate(ctx, wanted)
	if err != nil {
		return nil, err
	}
	if err := n.whileSyncing(func() error { return n.paths.wire(pod) }); err != nil {
		return nil, errors.Join(err, n.del(req.Attachment))
	}
	host, hostMAC, mac := vethOf(pod.Attachment)
	result := &cni.Result{
		HostName: host, HostMAC: hostMAC, MAC: mac, MTU: pod.MTU,
		Addr: netip.PrefixFrom(pod.Addr, 32), Gateway: podGateway,
	}
	if pod.Addr6.IsValid() {
		result.Addr6, result.Gateway6 = netip.PrefixFrom(pod.Addr6, 128), podGateway6
	}
	return result, nil
}

// allocate waits for an address.
func (n *Network) allocate(ctx context.Context, p Pod) (Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, addTimeout)
	defer cancel()
	waiting := false
	defer func() {
		if waiting {
			n.waiting.Add(-1)
		}
	}()
	for {
		changed := n.ledger.wait()
		got, short, err := n.ledger.allocate(p, n.paths.readySlots(), time.Now())
		if err == nil && !got.Addr.IsValid() && !waiting {
			waiting = true
			n.waiting.Add(1)
		}
		if short.free() < n.warm() {
			select {
			case n.demand <- struct{}{}:
			default:
			}
		}
		if err != nil {
			return got, ledgerError{err}
		}
		if got.Addr.IsValid() {
			return got, nil
		}
		rested := time.NewTimer(addTimeout)
		if next := short.until(); !next.IsZero() {
			rested.Reset(time.Until(next))
		}
		select {
		case <-changed:
		case <-rested.C:
		case <-ctx.Done():
			rested.Stop()
			return Pod{}, n.noAddress(short)
		}
		rested.Stop()
	}
}

// warm is how many addresses are to be free.
func (n *Network) warm() int {
	sealed, ok := n.sealed()
	if !ok {
		return 0
	}
	return max(sealed.Config.Network.WarmIPs.Min, 1)
}

// noAddress says why, for whoever reads the pod's events.
func (n *Network) noAddress(short shortage) error {
	n.mu.Lock()
	blocked := n.blocked
	n.mu.Unlock()
	why := short.String()
	if _, ok := n.sealed(); !ok {
		why = "the node has no sealed configuration yet"
	} else if blocked != nil {
		why = fmt.Sprintf("%s; %s: %v", why, node.ReasonOf(blocked, "Error"), blocked)
	}
	return cni.Errorf(cni.CodeTryAgain, "no free VPC address", "%s", why)
}

// del takes the pod's network away. It succeeds if there is none.
func (n *Network) del(key cni.Attachment) error {
	pod, ok, err := n.ledger.pod(key)
	if err != nil {
		return ledgerError{err}
	}
	if !ok {
		return nil
	}
	if pod.exclusive() {
		return n.delWhole(pod)
	}
	if err := n.ledger.release(key, time.Now()); err != nil {
		return ledgerError{err}
	}
	return n.whileSyncing(func() error { return n.paths.unwire(pod) })
}

// whileSyncing works while what the ledger has goes to the disk: that takes as long
// as the kernel does, and neither needs the other.
func (n *Network) whileSyncing(work func() error) error {
	synced := make(chan error, 1)
	go func() { synced <- n.ledger.sync() }()
	err := work()
	if syncErr := <-synced; syncErr != nil {
		err = errors.Join(err, ledgerError{syncErr})
	}
	return err
}

// ledgerError is a call's failure for the ledger's sake: nothing is given away or
// taken back that is not on the disk.
type ledgerError struct{ error }

func (e ledgerError) Unwrap() error { return e.error }

// check compares the pod's network with what its ADD made.
func (n *Network) check(req cni.Request) error {
	pod, ok, err := n.ledger.pod(req.Attachment)
	if err != nil {
		return err
	}
	if !ok {
		return cni.Errorf(cni.CodeDrift, "pod is not wired", "no address is recorded for container %s", req.ContainerID)
	}
	for _, a := range req.Addrs {
		if !pod.has(a) {
			return cni.Errorf(cni.CodeDrift, "pod has another address", "prevResult says %s, its address is %s", a, pod.texts())
		}
	}
	if pod.NetNS == "" { // the ledger was rebuilt, and the kernel does not know it
		pod.NetNS = req.NetNS
	}
	steps, err := n.paths.check(pod)
	if err != nil {
		return err
	}
	if len(steps) == 0 {
		return nil
	}
	return cni.Errorf(cni.CodeDrift, "pod's network is not as it was made", "%d differences, the first: %s", len(steps), steps[0].text)
}

// gc takes away the network of every attachment that is not valid.
func (n *Network) gc(valid []cni.Attachment) error {
	keep := map[cni.Attachment]bool{}
	for _, a := range valid {
		keep[a] = true
	}
	s, err := n.ledger.state()
	if err != nil {
		return err
	}
	for _, p := range s.pods() {
		if keep[p.Attachment] {
			continue
		}
		n.log.Info("garbage collected", "pod", p.String(), "container", p.ContainerID, "addr", p.Addr)
		err = errors.Join(err, n.del(p.Attachment))
	}
	return err
}
