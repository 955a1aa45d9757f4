package oci

import (
	"bytes"
	"io"
)

// Decompress returns the content of a layer that is not larger than the limit.
func Decompress(b []byte, limit int64) ([]byte, error) {
	r, end, err := decompress(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	defer end()
	return io.ReadAll(&atMost{r, limit})
}
