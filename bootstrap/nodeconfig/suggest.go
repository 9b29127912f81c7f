package nodeconfig

import (
	"fmt"
	"slices"
	"strings"
)

// didYouMean returns advice for a name that is not one of known, and the one that
// may be meant, or "".
func didYouMean(name string, known []string) (meant, advice string) {
	best, distance := "", max(1, len(name)/3)+1
	for _, k := range known {
		if d := editDistance(strings.ToLower(name), strings.ToLower(k), distance); d < distance {
			best, distance = k, d
		}
	}
	if best != "" {
		return best, fmt.Sprintf("; did you mean %s?", best)
	}
	if len(known) > 20 {
		return "", ""
	}
	known = slices.Sorted(slices.Values(known))
	return "", "; known are " + strings.Join(known, ", ")
}

// editDistance counts the letters to insert, delete or replace between a and b;
// anything from limit on is limit.
func editDistance(a, b string, limit int) int {
	if max(len(a), len(b))-min(len(a), len(b)) >= limit {
		return limit
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return min(row[len(b)], limit)
}
