package nodeconfig

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/mail"
	"regexp"
	"strings"

	"github.com/tkenode/tkenode/agent/node"
)

// Tencent Cloud takes at most 16 KB of user-data
// (https://cloud.tencent.com/document/product/213/17525); unpacked it may be
// longer, but not by so much.
const (
	maxUserData = 1 << 20
	maxParts    = 64
	maxLayers   = 3 // base64 of gzip, and one to spare
)

const (
	fixMissing = "pass a NodeConfig document as user-data, alone or as a MIME part with Content-Type: " + MediaType
	fixCutOff  = "check that it was passed whole: Tencent Cloud takes at most 16 KB of user-data"
)

func missing(format string, args ...any) error {
	return node.Terminal(ReasonMissing, fixMissing, fmt.Errorf(format, args...))
}

func invalid(fix, format string, args ...any) error {
	return node.Terminal(ReasonInvalid, fix, fmt.Errorf(format, args...))
}

// find returns the NodeConfig document of user-data, and the number of the MIME
// part that holds it, or 0 when it stands alone.
func find(data []byte) (doc []byte, part int, err error) {
	if data, err = unpack("user-data", data); err != nil {
		return nil, 0, err
	}
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, 0, missing("user-data is empty")
	}
	// Writers of templates leave blank lines at the beginning.
	if begins := bytes.TrimLeft(data, " \t\r\n"); looksLikeMIME(begins) {
		return fromMIME(begins)
	}
	if what := cloudInitFormat(bytes.TrimLeft(data, " \t\r\n")); what != "" {
		return nil, 0, missing("user-data is %s and has no NodeConfig", what)
	}
	return data, 0, nil
}

// unpack takes gzip and base64 off, in any order.
func unpack(what string, data []byte) ([]byte, error) {
	for range maxLayers {
		if len(data) > maxUserData {
			return nil, invalid("", "%s has %d bytes, more than the %d that it may have", what, len(data), maxUserData)
		}
		var err error
		switch {
		case bytes.HasPrefix(data, []byte{0x1f, 0x8b}):
			if data, err = gunzip(data); err != nil {
				return nil, invalid(fixCutOff, "%s is gzip data that is cut off or damaged: %w", what, err)
			}
		case looksLikeBase64(data):
			text := bytes.Join(bytes.Fields(data), nil)
			if data, err = base64.StdEncoding.AppendDecode(nil, text); err != nil {
				return nil, invalid(fixCutOff, "%s is base64 text that is cut off or damaged: %w", what, err)
			}
		default:
			return bytes.TrimPrefix(data, []byte("\xef\xbb\xbf")), nil
		}
	}
	return nil, invalid("", "%s is packed more than %d times", what, maxLayers)
}

func gunzip(data []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	// One byte more than allowed, for unpack to see that there is more.
	return io.ReadAll(io.LimitReader(r, maxUserData+1))
}

var base64Text = regexp.MustCompile(`^\s*[A-Za-z0-9+/\r\n]{40,}={0,2}\s*$`)

// looksLikeBase64 is true for no NodeConfig: those have colons. Words have spaces.
func looksLikeBase64(data []byte) bool { return base64Text.Match(data) }

// cloudInitFormat names the user-data formats that only cloud-init reads.
// Source: https://cloudinit.readthedocs.io/en/latest/explanation/format.html
func cloudInitFormat(data []byte) string {
	for prefix, what := range map[string]string{
		"#cloud-config":   "a cloud-config",
		"#!":              "a script",
		"#include":        "an include list of cloud-init",
		"#cloud-boothook": "a boothook of cloud-init",
		"#part-handler":   "a part handler of cloud-init",
		"## template:":    "a template of cloud-init",
	} {
		if bytes.HasPrefix(data, []byte(prefix)) {
			return what
		}
	}
	return ""
}

var mimeHeader = regexp.MustCompile(`(?im)^(?:mime-version:|content-type:\s*(?:multipart/|application/vnd\.tkenode))`)

func looksLikeMIME(data []byte) bool {
	head, _, _ := bytes.Cut(bytes.ReplaceAll(data[:min(len(data), 4096)], []byte("\r\n"), []byte("\n")), []byte("\n\n"))
	return mimeHeader.Match(head)
}

// fromMIME finds the one part that is a NodeConfig.
func fromMIME(data []byte) (doc []byte, part int, err error) {
	if bytes.HasPrefix(data, []byte("From ")) { // the mbox separator that some writers put first
		_, data, _ = bytes.Cut(data, []byte("\n"))
	}
	msg, err := mail.ReadMessage(bytes.NewReader(data))
	if err != nil {
		return nil, 0, invalid(fixCutOff, "user-data begins like a MIME message and is none: %w", err)
	}
	mediaType, params, err := mime.ParseMediaType(msg.Header.Get("Content-Type"))
	if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) {
		return nil, 0, invalid("", "user-data is a MIME message with an unreadable Content-Type: %w", err)
	}
	if !strings.HasPrefix(mediaType, "multipart/") {
		if mediaType != MediaType {
			return nil, 0, missing("user-data is a MIME message of type %s and has no NodeConfig", quote(mediaType))
		}
		doc, err = body("user-data", msg.Body, msg.Header.Get("Content-Transfer-Encoding"))
		return doc, 0, err
	}
	if params["boundary"] == "" {
		return nil, 0, invalid("", "user-data is a MIME multipart without a boundary in its Content-Type")
	}
	content, err := io.ReadAll(msg.Body)
	if err != nil {
		return nil, 0, invalid(fixCutOff, "user-data cannot be read as a MIME message: %w", err)
	}
	if err := closed(content, params["boundary"]); err != nil {
		return nil, 0, err
	}
	return fromParts(multipart.NewReader(bytes.NewReader(content), params["boundary"]))
}

// closed makes sure that a multipart message is whole: its reader takes one that
// ends behind a boundary, or in the headers of a part, for a shorter one.
func closed(content []byte, boundary string) error {
	opened := false
	for line := range bytes.Lines(content) {
		switch string(bytes.TrimRight(line, " \t\r\n")) {
		case "--" + boundary:
			opened = true
		case "--" + boundary + "--":
			return nil
		}
	}
	if !opened {
		return invalid("check what puts the message together", "user-data is a MIME multipart, and no line is the boundary %s of its Content-Type", quote("--"+boundary))
	}
	return invalid(fixCutOff, "user-data is cut off: a MIME multipart that ends without the line %s", quote("--"+boundary+"--"))
}

func fromParts(r *multipart.Reader) (doc []byte, part int, err error) {
	var types []string
	for n := 1; ; n++ {
		p, err := r.NextRawPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, 0, invalid("check what puts the message together", "user-data is damaged after %d MIME parts: %w", n-1, err)
		}
		if n > maxParts {
			return nil, 0, invalid("", "user-data has more than %d MIME parts", maxParts)
		}
		mediaType, _, err := mime.ParseMediaType(p.Header.Get("Content-Type"))
		if err != nil && !errors.Is(err, mime.ErrInvalidMediaParameter) {
			mediaType = "text/plain" // as RFC 2045, 5.2 says
		}
		types = append(types, clip(mediaType))
		what := fmt.Sprintf("user-data part %d", n)
		content, err := body(what, p, p.Header.Get("Content-Transfer-Encoding"))
		switch {
		case mediaType != MediaType:
			// Somebody else's part, however strange.
		case err != nil:
			return nil, 0, err
		case part != 0:
			return nil, 0, invalid("keep one of them", "user-data parts %d and %d are both a NodeConfig", part, n)
		default:
			doc, part = content, n
		}
	}
	if part == 0 {
		return nil, 0, missing("user-data has %d MIME parts (%s) and none is a NodeConfig", len(types), strings.Join(types, ", "))
	}
	if len(bytes.TrimSpace(doc)) == 0 {
		return nil, 0, missing("user-data part %d is empty", part)
	}
	return doc, part, nil
}

// body reads and unpacks a part.
func body(what string, r io.Reader, encoding string) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, maxUserData+1))
	if err != nil {
		return nil, invalid(fixCutOff, "%s cannot be read: %w", what, err)
	}
	switch strings.ToLower(strings.TrimSpace(encoding)) {
	case "", "7bit", "8bit", "binary":
	case "base64":
		text := bytes.Join(bytes.Fields(raw), nil)
		if raw, err = base64.StdEncoding.AppendDecode(nil, text); err != nil {
			return nil, invalid(fixCutOff, "%s is base64 text that is cut off or damaged: %w", what, err)
		}
	case "quoted-printable":
		if raw, err = io.ReadAll(quotedprintable.NewReader(bytes.NewReader(raw))); err != nil {
			return nil, invalid(fixCutOff, "%s is quoted-printable text that is cut off or damaged: %w", what, err)
		}
	default:
		return nil, invalid("use base64", "%s has the unknown Content-Transfer-Encoding %s", what, quote(encoding))
	}
	return unpack(what, raw)
}
