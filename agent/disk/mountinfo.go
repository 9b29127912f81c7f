package disk

import (
	"fmt"
	"slices"
	"strings"
)

// parseMountinfo reads /proc/<pid>/mountinfo.
// Source: linux Documentation/filesystems/proc.rst, 3.5
func parseMountinfo(text string) ([]mount, error) {
	var all []mount
	for line := range strings.Lines(text) {
		// 36 35 98:0 /root /mnt rw,noatime master:1 - ext3 /dev/root rw,errors=continue
		left, right, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		l, r := strings.Split(left, " "), strings.Split(right, " ")
		if !ok || len(l) < 6 || len(r) < 3 {
			return nil, fmt.Errorf("read mountinfo: unexpected line %q", line)
		}
		subdir := unescape(l[3])
		if subdir == "/" {
			subdir = ""
		}
		all = append(all, mount{
			Dev: l[2], Subdir: subdir, Target: unescape(l[4]), FSType: r[0], Source: unescape(r[1]),
			ReadOnly: readOnly(l[5]) || readOnly(r[2]),
		})
	}
	return all, nil
}

// readOnly knows both words: since Linux 6.15 ext4 says emergency_ro of what it has
// made read-only itself.
func readOnly(options string) bool {
	return slices.ContainsFunc(strings.Split(options, ","), func(o string) bool { return o == "ro" || o == "emergency_ro" })
}

// unescape undoes \040 and the like.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && octal(s[i+1]) && octal(s[i+2]) && octal(s[i+3]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
		} else {
			b.WriteByte(s[i])
		}
	}
	return b.String()
}

func octal(c byte) bool { return '0' <= c && c <= '7' }
