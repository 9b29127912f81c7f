package tencent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/tkenode/tkenode/agent/node"
)

// Credentials are the short-lived credentials of the instance's CAM role.
type Credentials struct {
	SecretID  string
	SecretKey node.Secret
	Token     node.Secret
	Expires   time.Time
}

// When credentials are asked for again: the service hands out new ones some time
// before the old ones expire; while it still hands out the old ones, or none,
// they are asked for at credentialsRetry.
const (
	credentialsMargin = 5 * time.Minute
	credentialsRetry  = 15 * time.Second
)

// credentialCache holds the last credentials; its lock is a channel, so that who
// waits for it honours its context.
type credentialCache struct {
	lock  chan struct{}
	last  *Credentials
	again time.Time // when to ask for newer ones
}

func newCredentialCache() credentialCache {
	return credentialCache{lock: make(chan struct{}, 1)}
}

// Credentials returns the credentials of the instance's CAM role, the newest that
// are to be had, and never ones that have expired.
func (m *Metadata) Credentials(ctx context.Context) (Credentials, error) {
	c := &m.creds
	select {
	case c.lock <- struct{}{}:
		defer func() { <-c.lock }()
	case <-ctx.Done():
		return Credentials{}, fmt.Errorf("read credentials: %w", ctx.Err())
	}
	now := time.Now()
	if c.last != nil && now.Before(c.again) && now.Before(c.last.Expires) {
		return *c.last, nil
	}
	if c.last != nil && now.Before(c.last.Expires) {
		// The old ones still work: do not hold the caller up for long.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, metadataTimeout)
		defer cancel()
	}
	fresh, err := m.fetchCredentials(ctx)
	switch {
	case err == nil && now.Before(fresh.Expires):
		c.last, c.again = &fresh, fresh.Expires.Add(-credentialsMargin)
	case c.last != nil && now.Before(c.last.Expires):
		slog.WarnContext(ctx, "credentials of the CAM role are not renewed", "expires", c.last.Expires, "err", err)
	case err == nil:
		return Credentials{}, node.Waiting("CredentialsExpired", "metadata service hands out credentials that expired at %s, by the clock of this node",
			fresh.Expires.UTC().Format(time.RFC3339))
	default:
		return Credentials{}, err
	}
	if !now.Before(c.again) {
		c.again = now.Add(credentialsRetry)
	}
	return *c.last, nil
}

// forgetCredentials drops the cached credentials if they are the given ones. When
// ctx ends first it leaves them: the next refusal drops them.
func (m *Metadata) forgetCredentials(ctx context.Context, secretID string) {
	select {
	case m.creds.lock <- struct{}{}:
		defer func() { <-m.creds.lock }()
	case <-ctx.Done():
		return
	}
	if m.creds.last != nil && m.creds.last.SecretID == secretID {
		m.creds.last = nil
	}
}

// fetchCredentials reads the role and its credentials.
// Source: https://cloud.tencent.com/document/product/213/4934
func (m *Metadata) fetchCredentials(ctx context.Context) (Credentials, error) {
	role, err := m.role(ctx)
	if errors.Is(err, ErrNotFound) {
		return Credentials{}, node.Terminal("NoCAMRole", "bind a CAM role with the policy of tkenode to the instance", err)
	}
	if err != nil {
		return Credentials{}, err
	}
	b, err := m.get(ctx, "/latest/meta-data/cam/security-credentials/"+role, maxMetadataBytes)
	if err != nil {
		return Credentials{}, err
	}
	return decodeCredentials(role, b)
}

func decodeCredentials(role string, b []byte) (Credentials, error) {
	var v struct {
		TmpSecretId, Code   string
		TmpSecretKey, Token node.Secret
		ExpiredTime         int64
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return Credentials{}, fmt.Errorf("credentials of role %s: %w", role, jsonError(err))
	}
	if v.Code != "Success" {
		return Credentials{}, fmt.Errorf("credentials of role %s: code %.80q", role, v.Code)
	}
	if !isWord(v.TmpSecretId) || v.TmpSecretKey.IsZero() || v.Token.IsZero() || !isHeaderText(v.Token.Reveal()) {
		return Credentials{}, fmt.Errorf("credentials of role %s are incomplete", role)
	}
	return Credentials{SecretID: v.TmpSecretId, SecretKey: v.TmpSecretKey, Token: v.Token, Expires: time.Unix(v.ExpiredTime, 0)}, nil
}

// isHeaderText reports whether s may stand in an HTTP header.
func isHeaderText(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// jsonError is err without the text that it may quote.
func jsonError(err error) error {
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("JSON is wrong at byte %d", e.Offset)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("JSON field %s has the wrong type", e.Field)
	}
	return errors.New("JSON is wrong")
}
