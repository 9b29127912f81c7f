package tencent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// MetadataURL is where the metadata service of a CVM answers; its name,
// metadata.tencentyun.com, needs a resolver that may not be there yet.
// Source: https://cloud.tencent.com/document/product/213/4934
const MetadataURL = "http://169.254.0.23"

// Bounds of what is read from the metadata service. CVM accepts user-data of up
// to 16 KiB (https://cloud.tencent.com/document/product/213/17525).
const (
	maxMetadataBytes = 16 << 10
	maxUserDataBytes = 64 << 10
)

// Pace of the metadata client. The service is on the host of the CVM: what has
// not come after 5 s is lost.
const (
	metadataTimeout  = 5 * time.Second
	metadataBackoff  = 200 * time.Millisecond
	metadataMaxPause = 5 * time.Second
	metadataNoRoute  = 100 * time.Millisecond // the pause while nothing can be sent
	metadataNagEvery = 30 * time.Second
)

// ErrNotFound says that the metadata service has answered, and does not have what
// was asked for. It is fs.ErrNotExist, too.
var ErrNotFound error = notFound{}

type notFound struct{}

func (notFound) Error() string        { return "not in the metadata service" }
func (notFound) Is(target error) bool { return target == fs.ErrNotExist }

// Metadata is a client of the instance metadata service. It repeats what fails,
// with jitter, until its context ends; only 404 is an answer.
type Metadata struct {
	// HTTP may be replaced before the first use.
	HTTP *http.Client

	url   string
	creds credentialCache
}

// NewMetadata returns a client of the service at url, which is MetadataURL if
// empty. It ignores proxy settings.
func NewMetadata(url string) *Metadata {
	return &Metadata{
		url:   strings.TrimSuffix(cmp.Or(url, MetadataURL), "/"),
		creds: newCredentialCache(),
		HTTP: &http.Client{
			Transport:     &http.Transport{MaxIdleConnsPerHost: 1, IdleConnTimeout: 10 * time.Second},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// UserData returns the user-data as it was given at launch, decoded from the
// base64 of the launching API. Without any the error is ErrNotFound.
func (m *Metadata) UserData(ctx context.Context) ([]byte, error) {
	b, err := m.get(ctx, "/latest/user-data", maxUserDataBytes)
	if errors.Is(err, errTooLong) {
		return nil, node.Terminal("UserDataTooLong", "shorten it or pack it with gzip: Tencent Cloud takes at most 16 KB",
			fmt.Errorf("the instance's user-data has more than %d bytes", maxUserDataBytes))
	}
	return b, err
}

// value reads one key of /latest/meta-data/ that holds a word.
func (m *Metadata) value(ctx context.Context, key string) (string, error) {
	b, err := m.get(ctx, "/latest/meta-data/"+key, maxMetadataBytes)
	if err != nil {
		return "", err
	}
	v := strings.TrimSpace(string(b))
	if !isWord(v) {
		return "", fmt.Errorf("metadata %s: %.80q is no value", key, v)
	}
	return v, nil
}

// list reads a directory of /latest/meta-data/; entries that are directories
// themselves end in "/".
func (m *Metadata) list(ctx context.Context, dir string) ([]string, error) {
	b, err := m.get(ctx, "/latest/meta-data/"+dir, maxMetadataBytes)
	if err != nil {
		return nil, err
	}
	entries := strings.Fields(string(b))
	for _, e := range entries {
		if !isWord(strings.TrimSuffix(e, "/")) {
			return nil, fmt.Errorf("metadata %s: %.80q is no entry", dir, e)
		}
	}
	return entries, nil
}

// isWord reports whether s may be the name of something in the cloud: an id, an
// address, a MAC. Anything else is not from a metadata service.
func isWord(s string) bool {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._:+@-"
	return s != "" && s != "." && s != ".." && len(s) <= 256 && strings.Trim(s, allowed) == ""
}

// get reads path until it is answered, and returns a *node.Error of class
// waiting when ctx ends before that.
func (m *Metadata) get(ctx context.Context, path string, limit int64) ([]byte, error) {
	start, pause, nag := time.Now(), metadataBackoff, time.Duration(0)
	var last error
	for {
		b, again, err := m.once(ctx, path, limit)
		if err == nil {
			if nag > 0 {
				slog.InfoContext(ctx, "metadata service answers", "path", path, "took", time.Since(start))
			}
			return b, nil
		}
		if !again {
			return nil, fmt.Errorf("read metadata %s: %w", path, err)
		}
		if ctx.Err() != nil && last != nil {
			err = last // this try was cut off, and says nothing
		}
		last = err
		if ctx.Err() == nil && time.Since(start) >= nag {
			nag = time.Since(start) + metadataNagEvery
			slog.WarnContext(ctx, "metadata service is late", "path", path, "took", time.Since(start), "err", err)
		}
		wait := pause/2 + rand.N(pause/2)
		if errors.Is(err, syscall.ENETUNREACH) {
			// Not the service but this node's address is late: asking disturbs nobody, and
			// the whole first boot waits.
			wait = metadataNoRoute
		} else {
			pause = min(2*pause, metadataMaxPause)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, node.Waiting("MetadataLate", "metadata service %s gives no %s: %w", m.url, path, err)
		}
	}
}

// once reads path, and says whether it is worth asking again.
func (m *Metadata) once(ctx context.Context, path string, limit int64) (body []byte, again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, metadataTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, m.url+path, nil)
	if err != nil {
		return nil, false, err
	}
	resp, err := m.HTTP.Do(req)
	if err != nil {
		return nil, true, plain(err)
	}
	defer resp.Body.Close()
	switch body, err = io.ReadAll(io.LimitReader(resp.Body, limit+1)); {
	case err != nil:
		return nil, true, plain(err)
	case resp.StatusCode == http.StatusNotFound:
		return nil, false, ErrNotFound
	case resp.StatusCode != http.StatusOK:
		return nil, true, fmt.Errorf("HTTP %d", resp.StatusCode)
	case int64(len(body)) > limit:
		return nil, false, fmt.Errorf("%w: more than %d bytes", errTooLong, limit)
	}
	return body, false, nil
}

// plain takes off what the message says anyway: method and URL, and Go's words
// for a time that is up.
func plain(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return errTimeUp
	}
	return err
}

var errTooLong = errors.New("too long")

var errTimeUp = errors.New("no answer in time")
