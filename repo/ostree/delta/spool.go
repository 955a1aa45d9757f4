package delta

import (
	"bytes"
	"io"
	"os"
)

// maxInMemory is what a spool holds in memory, in bytes.
const maxInMemory = 4 << 20

// spool keeps what is written to it, in memory or, if that is more, in a file without a name.
type spool struct {
	mem  []byte
	file *os.File
	size int64
}

func (s *spool) Write(b []byte) (int, error) {
	if s.file == nil && len(s.mem)+len(b) <= maxInMemory {
		s.mem = append(s.mem, b...)
		s.size += int64(len(b))
		return len(b), nil
	}
	if s.file == nil {
		f, err := temporary()
		if err != nil {
			return 0, err
		}
		s.file = f
		if _, err := f.Write(s.mem); err != nil {
			return 0, err
		}
		s.mem = nil
	}
	n, err := s.file.Write(b)
	s.size += int64(n)
	return n, err
}

// reader returns all that was written.
func (s *spool) reader() *io.SectionReader {
	if s.file != nil {
		return io.NewSectionReader(s.file, 0, s.size)
	}
	return io.NewSectionReader(bytes.NewReader(s.mem), 0, s.size)
}

func (s *spool) Close() error {
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}

// temporary makes a file that has no name. It lies in TMPDIR or in /var/tmp, since /tmp may be in memory.
func temporary() (*os.File, error) {
	dir := os.Getenv("TMPDIR")
	if dir == "" {
		dir = "/var/tmp"
	}
	f, err := os.CreateTemp(dir, "composefs-boot-delta-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
