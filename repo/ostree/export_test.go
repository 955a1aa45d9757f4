package ostree

import "github.com/composefs-boot/composefs-boot/repo/fsverity"

// Decode reads the content of a stream that refers to no object of the repository, and writes it again.
func Decode(b []byte) ([]byte, error) {
	o, err := decode(b, fsverity.SHA256, nil, false)
	if err != nil {
		return nil, err
	}
	return o.encode(func(fsverity.Digest) int { return 0 })
}

// JournalName is the name of a journal in tmp/.
func JournalName(c Checksum) string { return journalName(c) }
