// Package tkenode holds no code: it is where the tests live that hold the
// repository itself to its rules (ARCHITECTURE.md, CONTRIBUTING.md).
package tkenode
