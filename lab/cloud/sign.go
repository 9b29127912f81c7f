package cloud

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// signatureLife is how far the timestamp of a request may be from the cloud's
// clock. Source: AuthFailure.SignatureExpire in
// https://cloud.tencent.com/document/api/215/15693
const signatureLife = 5 * time.Minute

// authorization is the Authorization header taken apart.
type authorization struct {
	secretID, date, service string
	signed                  []string
	signature               string
}

func parseAuthorization(header string) (a authorization, err error) {
	malformed := refuse("AuthFailure.InvalidAuthorization", "the Authorization header is malformed")
	rest, ok := strings.CutPrefix(header, "TC3-HMAC-SHA256 ")
	if !ok {
		return a, malformed
	}
	fields := map[string]string{}
	for part := range strings.SplitSeq(rest, ",") {
		k, v, ok := strings.Cut(strings.TrimSpace(part), "=")
		if !ok || fields[k] != "" {
			return a, malformed
		}
		fields[k] = v
	}
	scope := strings.Split(fields["Credential"], "/")
	if len(fields) != 3 || len(scope) != 4 || scope[3] != "tc3_request" {
		return a, malformed
	}
	a = authorization{secretID: scope[0], date: scope[1], service: scope[2], signature: fields["Signature"]}
	a.signed = strings.Split(fields["SignedHeaders"], ";")
	if !slices.IsSorted(a.signed) || !slices.Contains(a.signed, "content-type") || !slices.Contains(a.signed, "host") {
		return a, malformed
	}
	return a, nil
}

// authenticate checks a request's signature, and returns the key that made it.
// Source: https://cloud.tencent.com/document/api/213/30654
func (r *Region) authenticate(req *http.Request, service string, body []byte) (*roleKey, error) {
	a, err := parseAuthorization(req.Header.Get("Authorization"))
	if err != nil {
		return nil, err
	}
	stamp := req.Header.Get("X-TC-Timestamp")
	seconds, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil {
		return nil, refuse("InvalidParameter", "X-TC-Timestamp %q is no number", stamp)
	}
	at, now := time.Unix(seconds, 0).UTC(), time.Now()
	if d := now.Sub(at); d > signatureLife || d < -signatureLife {
		return nil, refuse("AuthFailure.SignatureExpire", "the timestamp of the request and the server's clock differ by %s, more than %s: server time is %d",
			d.Abs().Truncate(time.Second), signatureLife, now.Unix())
	}
	if a.date != at.Format(time.DateOnly) || a.service != service {
		return nil, refuse("AuthFailure.SignatureFailure", "the credential scope %s/%s is not that of the request", a.date, a.service)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	k := r.keys[a.secretID]
	if k == nil {
		return nil, refuse("AuthFailure.SecretIdNotFound", "the SecretId is not found")
	}
	want := a.sign(k.SecretKey, canonicalRequest(req, a.signed, body), stamp)
	if !hmac.Equal([]byte(want), []byte(a.signature)) {
		return nil, refuse("AuthFailure.SignatureFailure", "the signature does not match the request")
	}
	if !hmac.Equal([]byte(req.Header.Get("X-TC-Token")), []byte(k.Token)) || !now.Before(k.Expires) {
		return nil, refuse("AuthFailure.TokenFailure", "the token is wrong or has expired")
	}
	return k, nil
}

func canonicalRequest(req *http.Request, signed []string, body []byte) string {
	var b strings.Builder
	b.WriteString(req.Method + "\n/\n\n")
	for _, name := range signed {
		value := req.Header.Get(name)
		if name == "host" {
			value = req.Host
		}
		b.WriteString(name + ":" + strings.ToLower(strings.TrimSpace(value)) + "\n")
	}
	b.WriteString("\n" + strings.Join(signed, ";") + "\n" + hexSHA256(body))
	return b.String()
}

func (a authorization) sign(key, canonical, stamp string) string {
	scope := a.date + "/" + a.service + "/tc3_request"
	k := sum([]byte("TC3"+key), a.date)
	k = sum(sum(k, a.service), "tc3_request")
	return hex.EncodeToString(sum(k, "TC3-HMAC-SHA256\n"+stamp+"\n"+scope+"\n"+hexSHA256([]byte(canonical))))
}

func sum(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

func hexSHA256(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}
