//go:build !amd64

package fsverity

// engines are none: the standard library has the instructions for the hashes of these processors.
var engines [3]lanes
