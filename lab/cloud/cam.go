package cloud

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// policy is a CAM policy document. Resources and conditions are not looked at:
// the documents of the lab name every resource.
// Source: https://cloud.tencent.com/document/product/598/10604
type policy struct {
	Version   string      `json:"version"`
	Statement []statement `json:"statement"`
}

type statement struct {
	Effect   string `json:"effect"`
	Action   words  `json:"action"`
	Resource words  `json:"resource"`
}

// words is a list, or one word in its place.
type words []string

func (w *words) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*w = words{one}
		return nil
	}
	return json.Unmarshal(b, (*[]string)(w))
}

func parsePolicy(document []byte) (policy, error) {
	var p policy
	d := json.NewDecoder(strings.NewReader(string(document)))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return p, err
	}
	if p.Version != "2.0" || len(p.Statement) == 0 {
		return p, fmt.Errorf("version %q with %d statements, want 2.0 with some", p.Version, len(p.Statement))
	}
	for i, s := range p.Statement {
		if s.Effect != "allow" && s.Effect != "deny" {
			return p, fmt.Errorf("statement %d: effect %q is neither allow nor deny", i, s.Effect)
		}
		if len(s.Action) == 0 || len(s.Resource) != 1 || s.Resource[0] != "*" {
			return p, fmt.Errorf("statement %d: want actions, and * as the resource", i)
		}
	}
	return p, nil
}

// allows reports whether the policy allows an action, as vpc:DescribeSubnets.
// What no statement allows is denied, and deny is stronger than allow.
func (p policy) allows(action string) bool {
	allowed := false
	for _, s := range p.Statement {
		for _, pattern := range s.Action {
			if !matches(strings.TrimPrefix(pattern, "name/"), action) {
				continue
			}
			if s.Effect == "deny" {
				return false
			}
			allowed = true
		}
	}
	return allowed
}

// matches compares an action with a pattern that may end in a star.
func matches(pattern, action string) bool {
	if prefix, star := strings.CutSuffix(pattern, "*"); star {
		return strings.HasPrefix(action, prefix)
	}
	return pattern == action
}

// roleKey is what an instance signs with on behalf of its role.
type roleKey struct {
	SecretID  string
	SecretKey string
	Token     string
	Expires   time.Time
	Instance  string
}

// roleKey returns the newest credentials of an instance, which are replaced in
// the last quarter of their life. The old ones stay good until they expire. The
// caller holds mu.
func (r *Region) roleKey(instance string) *roleKey {
	now := time.Now()
	var newest *roleKey
	for id, k := range r.keys {
		switch {
		case !k.Expires.After(now.Add(-remembered)):
			delete(r.keys, id)
		case k.Instance == instance && (newest == nil || k.Expires.After(newest.Expires)):
			newest = k
		}
	}
	if newest != nil && newest.Expires.Sub(now) > r.config.CredentialLife/4 {
		return newest
	}
	k := &roleKey{
		SecretID:  "AKID" + base64.RawURLEncoding.EncodeToString(randomBytes(32)),
		SecretKey: base64.StdEncoding.EncodeToString(randomBytes(32)),
		Token:     hex.EncodeToString(randomBytes(96)),
		Expires:   now.Add(r.config.CredentialLife).Truncate(time.Second),
		Instance:  instance,
	}
	r.keys[k.SecretID] = k
	return k
}

// ExpireCredentials makes every credential that was handed out useless at once.
func (r *Region) ExpireCredentials() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range r.keys {
		k.Expires = time.Now()
	}
}

var errNoInstance = errors.New("no such instance")
