package lab

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
)

// LoginUser is the default user of the node image.
const LoginUser = "root"

// loginKey is the key pair with which the lab logs in to its CVMs.
type loginKey struct {
	path   string // of the private key, for ssh(1)
	signer ssh.Signer
	public string // one line of authorized_keys
}

// newLoginKey reads the key pair in dir, or makes one. It stays the same from lab
// to lab, since snapshots of machines know its public half.
func newLoginKey(dir string) (loginKey, error) {
	path := filepath.Join(dir, "ssh_key")
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		if err = writeLoginKey(path); err == nil {
			text, err = os.ReadFile(path)
		}
	}
	if err != nil {
		return loginKey{}, fmt.Errorf("make login key: %w", err)
	}
	signer, err := ssh.ParsePrivateKey(text)
	if err != nil {
		return loginKey{}, fmt.Errorf("read login key %s: %w", path, err)
	}
	return loginKey{path, signer, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))}, nil
}

// writeLoginKey makes a key pair, unless another process is faster: the file
// appears whole, and once.
func writeLoginKey(path string) error {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	block, err := ssh.MarshalPrivateKey(private, "tkelab")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "ssh_key-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(pem.EncodeToMemory(block))
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// SSH runs a command on the CVM as the image's default user,
// and returns what it prints. It keeps trying to log in until ctx ends, since a
// machine that boots has no sshd yet. A command that fails is an *ssh.ExitError.
func (l *Lab) SSH(ctx context.Context, ip netip.Addr, command string) (string, error) {
	client, err := l.login(ctx, ip)
	if err != nil {
		return "", fmt.Errorf("log in to %s: %w", ip, err)
	}
	defer client.Close()
	stop := context.AfterFunc(ctx, func() { client.Close() })
	defer stop()
	session, err := client.NewSession()
	if err != nil {
		return "", fmt.Errorf("open session on %s: %w", ip, err)
	}
	defer session.Close()
	var out, errs bytes.Buffer
	session.Stdout, session.Stderr = &out, &errs
	if err := session.Run(command); err != nil {
		return out.String(), fmt.Errorf("run %q on %s: %w: %s", command, ip, errors.Join(err, context.Cause(ctx)), strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

func (l *Lab) login(ctx context.Context, ip netip.Addr) (*ssh.Client, error) {
	config := &ssh.ClientConfig{
		User: LoginUser,
		Auth: []ssh.AuthMethod{ssh.PublicKeys(l.key.signer)},
		// The CVM was made a moment ago, on a network that exists in this process only.
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
		Timeout:         20 * time.Second,
	}
	var last error
	for {
		client, err := l.tryLogin(ctx, netip.AddrPortFrom(ip, 22).String(), config)
		if err == nil {
			return client, nil
		}
		last = err
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), last)
		case <-time.After(time.Second):
		}
	}
}

func (l *Lab) tryLogin(ctx context.Context, addr string, config *ssh.ClientConfig) (*ssh.Client, error) {
	dctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := l.Dial(dctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	// A handshake has no context: a slow machine gets until here.
	conn.SetDeadline(time.Now().Add(config.Timeout))
	c, chans, reqs, err := ssh.NewClientConn(conn, addr, config)
	if err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	return ssh.NewClient(c, chans, reqs), nil
}
