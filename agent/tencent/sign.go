package tencent

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"time"
)

const contentType = "application/json; charset=utf-8"

// authorization signs a POST of payload to host with TC3-HMAC-SHA256.
// Source: https://cloud.tencent.com/document/api/213/30654
func authorization(c Credentials, service, host, action string, payload []byte, now time.Time) string {
	const signed = "content-type;host;x-tc-action"
	date := now.UTC().Format(time.DateOnly)
	scope := date + "/" + service + "/tc3_request"
	canonical := "POST\n/\n\n" +
		"content-type:" + contentType + "\n" +
		"host:" + host + "\n" +
		"x-tc-action:" + strings.ToLower(action) + "\n\n" +
		signed + "\n" + hexSHA256(payload)
	toSign := fmt.Sprintf("TC3-HMAC-SHA256\n%d\n%s\n%s", now.Unix(), scope, hexSHA256([]byte(canonical)))

	key := mac([]byte("TC3"+c.SecretKey.Reveal()), date)
	key = mac(mac(key, service), "tc3_request")
	return fmt.Sprintf("TC3-HMAC-SHA256 Credential=%s/%s, SignedHeaders=%s, Signature=%x",
		c.SecretID, scope, signed, mac(key, toSign))
}

func hexSHA256(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}
