package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// lockFile is held by whoever prepares or runs the lab of this cache directory,
// and says who that is.
func lockFile() string { return filepath.Join(cacheDir(), "lab.lock") }

var errLocked = errors.New("another lab is running; stop it with: tkelab down")

// lock makes this process, which calls itself who, the one lab of this cache
// directory, until the file is closed here and by every process that was handed it.
func lock(who string) (*os.File, error) {
	f, err := os.OpenFile(lockFile(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, errLocked
		}
		return nil, fmt.Errorf("lock %s: %w", lockFile(), err)
	}
	return f, sign(f, who)
}

// sign writes down who holds the lock.
func sign(f *os.File, who string) error {
	if err := f.Truncate(0); err != nil {
		return err
	}
	_, err := f.WriteAt(fmt.Appendf(nil, "%s, process %d\n", who, os.Getpid()), 0)
	return err
}

// holder is who holds the lock, as far as the lock's file tells.
func holder() string {
	text, _ := os.ReadFile(lockFile()) // it can be between two holders
	if who := strings.TrimSpace(string(text)); who != "" {
		return who
	}
	return "an unknown process"
}

// locked reports whether there is a lab, or something that prepares one.
func locked() (bool, error) {
	f, err := lock("tkelab")
	switch {
	case err == nil:
		return false, f.Close()
	case errors.Is(err, os.ErrNotExist): // not even a cache directory
		return false, nil
	case errors.Is(err, errLocked):
		return true, nil
	}
	return false, err
}

// How long whoever holds the lock may be silent (it is about to listen, or to
// exit), and how long a lab may take to end.
var (
	silence  = 15 * time.Second
	patience = 90 * time.Second
)

// takeLab makes this process the one lab. A lab that was left running is stopped,
// one that ends is waited for; one that somebody else is starting is let alone.
func takeLab(ctx context.Context, who string, p *progress) (held *os.File, err error) {
	step := ""
	defer func() {
		if step != "" {
			p.End(step, err)
		}
	}()
	waitUntil := time.Now().Add(silence)
	wait := func(s string) {
		if step == "" {
			step, waitUntil = s, time.Now().Add(patience)
			p.Begin(s)
		}
	}
	for {
		held, err := lock(who)
		if !errors.Is(err, errLocked) {
			return held, err
		}
		var state stateAnswer
		// An error is that of one that does not listen yet, or no more.
		_ = ask(ctx, http.MethodGet, "/v1/state", nil, &state)
		switch state.State {
		case starting, attached:
			return nil, fmt.Errorf("another tkelab is starting a lab (%s): wait for it, or stop it with: tkelab down", holder())
		case detached:
			wait("stop the lab that runs")
			_ = ask(ctx, http.MethodPost, "/v1/down", nil, nil) // asked again if need be
		case stopping:
			wait("wait for an earlier lab to end")
		}
		if time.Now().After(waitUntil) {
			return nil, fmt.Errorf("the lab in %s is held by %s, which does not end", labDir(), holder())
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
}

// stopLab stops whatever lab there is, also one that is only starting, and waits
// until it is gone. It reports whether there was one.
func stopLab(ctx context.Context) (bool, error) {
	waitUntil, asked := time.Now().Add(silence), false
	for was := false; ; was = true {
		there, err := locked()
		if err != nil || !there {
			return was, err
		}
		// An error is that of one that does not listen yet, or no more.
		if err := ask(ctx, http.MethodPost, "/v1/down", nil, nil); err == nil && !asked {
			asked, waitUntil = true, time.Now().Add(patience)
		}
		if time.Now().After(waitUntil) {
			if asked {
				return true, fmt.Errorf("the lab (%s) does not end; its log is %s", holder(), logFile())
			}
			return true, fmt.Errorf("the lab is held by %s, which does not listen; end that, and the lab ends with it", holder())
		}
		if err := pause(ctx); err != nil {
			return true, err
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(50 * time.Millisecond):
		return nil
	}
}
