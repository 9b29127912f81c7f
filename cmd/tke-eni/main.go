// Command tke-eni is the CNI plugin of tkenode. It decides nothing: it checks
// what the runtime hands it, asks the agent over /run/tkenode/cni.sock, and
// prints the answer in the version of CNI that was asked for. It has no netlink
// and no log. A DEL that nobody answers it leaves in a queue for the next agent:
// a runtime must be able to remove a pod whatever the node's agent does.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/tkenode/tkenode/agent/eni/cni"
)

// callTimeout is longer than the agent waits for an address, so that its reason
// reaches the pod's events, and an agent that is being restarted is waited for.
const callTimeout = 50 * time.Second

// delTimeout is how long a DEL waits before it is queued: longer than an agent
// takes for it, even for many at once, and long enough for one that is restarted
// by a package's upgrade.
const delTimeout = 5 * time.Second

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	p := plugin{env: os.Getenv, socket: cni.Socket, configured: cni.ConfiguredFile, queue: cni.QueueDir, patience: delTimeout}
	os.Exit(p.run(ctx, os.Stdin, os.Stdout))
}

// plugin is one call.
type plugin struct {
	env        func(string) string
	socket     string
	configured string
	queue      cni.Queue
	patience   time.Duration // of a DEL
}

// run carries the call out and prints its result, or its error as CNI wants it.
func (p plugin) run(ctx context.Context, in io.Reader, out io.Writer) int {
	version := latest
	result, err := p.call(ctx, in, &version)
	var printed any = result
	code := 0
	if err != nil {
		e, ok := errors.AsType[*cni.Error](err)
		if !ok {
			e = cni.Errorf(cni.CodeIO, "ask the agent", "%v", err)
		}
		printed, code = failure{CNIVersion: version, Error: e}, 1
	}
	if printed == nil {
		return code
	}
	if err := json.NewEncoder(out).Encode(printed); err != nil {
		return 1
	}
	return code
}

// call returns what to print; nil is nothing.
func (p plugin) call(ctx context.Context, in io.Reader, version *string) (any, error) {
	command := p.env("CNI_COMMAND")
	if command == "VERSION" {
		return supported{CNIVersion: latest, SupportedVersions: versions[:]}, nil
	}
	var conf config
	if err := cni.Read(in, maxConfig, &conf); err != nil {
		return nil, cni.Errorf(cni.CodeDecode, "decode network configuration", "%v", err)
	}
	if err := conf.check(command); err != nil {
		return nil, err
	}
	*version = conf.CNIVersion
	switch command {
	case "STATUS":
		return nil, p.status()
	case "ADD", "DEL", "CHECK", "GC":
	default:
		return nil, cni.Errorf(cni.CodeInvalidEnvironment, "invalid environment", "CNI_COMMAND is %q", command)
	}
	req, err := p.request(cni.Command(command), conf)
	if err != nil {
		return nil, err
	}
	if req.Command == cni.Del {
		return nil, p.del(ctx, req)
	}
	resp, err := ask(ctx, p.socket, req)
	if err != nil {
		return nil, silent(err)
	}
	if resp.Error != nil {
		return nil, resp.Error
	}
	if resp.Result == nil {
		return nil, nil
	}
	return resultFor(conf.CNIVersion, *resp.Result, req), nil
}

func silent(err error) *cni.Error {
	return cni.Errorf(cni.CodeNoAgent, "tkenode's agent does not answer", "%v; look at `systemctl status tkenode-agent`", err)
}

// del asks the agent, or leaves the DEL to it.
func (p plugin) del(ctx context.Context, req cni.Request) error {
	at := time.Now().UTC()
	ctx, cancel := context.WithTimeout(ctx, p.patience)
	defer cancel()
	resp, err := ask(ctx, p.socket, req)
	if err == nil && resp.Error != nil {
		return resp.Error
	}
	if err == nil {
		return nil
	}
	if queueErr := p.queue.Put(cni.Deletion{Attachment: req.Attachment, At: at}); queueErr != nil {
		return silent(fmt.Errorf("%w; nor can the DEL be queued: %w", err, queueErr))
	}
	return nil
}

// status fails only until the network was configured for the first time since
// the node booted: later trouble is a condition of the node, not a reason to
// evict its pods.
func (p plugin) status() error {
	_, err := os.Stat(p.configured)
	if errors.Is(err, os.ErrNotExist) {
		return cni.Errorf(cni.CodeNotAvailable, "the node's network is not configured yet", "look at `tkenode status`")
	}
	return err
}

func (p plugin) request(command cni.Command, conf config) (cni.Request, error) {
	req := cni.Request{
		Command:    command,
		Attachment: cni.Attachment{ContainerID: p.env("CNI_CONTAINERID"), IfName: p.env("CNI_IFNAME")},
		NetNS:      p.env("CNI_NETNS"),
		Valid:      conf.ValidAttachments,
	}
	for key, value := range args(p.env("CNI_ARGS")) {
		switch key {
		case "K8S_POD_NAMESPACE":
			req.PodNamespace = value
		case "K8S_POD_NAME":
			req.PodName = value
		}
	}
	if command == cni.Add {
		asks(conf.RuntimeConfig.Annotations, &req)
	}
	if command == cni.GC && conf.ValidAttachments == nil {
		return req, cni.Errorf(cni.CodeInvalidConfig, "GC without cni.dev/valid-attachments", "nothing is removed")
	}
	if command == cni.Check {
		if conf.PrevResult == nil {
			return req, cni.Errorf(cni.CodeInvalidConfig, "CHECK without prevResult", "it says what to compare with")
		}
		for _, ip := range conf.PrevResult.IPs {
			req.Addrs = append(req.Addrs, ip.Address.Addr())
		}
	}
	return req, nil
}

// failure is an error as CNI prints it.
type failure struct {
	CNIVersion string `json:"cniVersion"`
	*cni.Error
}

// supported answers VERSION.
type supported struct {
	CNIVersion        string   `json:"cniVersion"`
	SupportedVersions []string `json:"supportedVersions"`
}
