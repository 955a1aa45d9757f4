package ostree

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/splitstream"
)

// journal is a file in tmp/ with the objects that a pull of a commit has brought and made durable, so that the next pull of it does not
// bring them again. It is there while the commit is partial. It is a sequence of records:
//
//	u64 little endian, size of what follows behind the checksum; SHA-256 of that; a stream as that of a commit
//
// A record that is torn ends the journal. The contents of files are objects of the repository, which nothing else may lead to: if
// garbage collection has removed them, they are brought again.
//
// Who has the journal open is the only one who pulls the commit. Others wait.
type journal struct {
	p   *repo.Partial
	end int64
}

const recordHeader = 8 + sha256.Size

// journalPrefix is the name of a journal, before the checksum of the commit.
const journalPrefix = "ostree-"

func journalName(c Checksum) string { return journalPrefix + c.String() }

// openJournal opens the journal of a commit, and returns what is in it.
func openJournal(ctx context.Context, r *repo.Repo, c Checksum, l repo.LockOptions) (*journal, *Objects, error) {
	p, err := r.OpenPartial(ctx, journalName(c), l)
	if err != nil {
		return nil, nil, err
	}
	j := &journal{p: p}
	have, err := j.read(r.Algorithm(), c)
	if err == nil {
		err = p.Truncate(j.end)
	}
	if err != nil {
		p.Close()
		return nil, nil, err
	}
	return j, have, nil
}

func (j *journal) read(a fsverity.Algorithm, c Checksum) (*Objects, error) {
	have := newObjects(a, c)
	info, err := j.p.Stat()
	if err != nil {
		return nil, err
	}
	for info.Size()-j.end >= recordHeader {
		var head [recordHeader]byte
		if _, err := j.p.ReadAt(head[:], j.end); err != nil {
			return nil, err
		}
		size := int64(binary.LittleEndian.Uint64(head[:]))
		if size < 0 || size > info.Size()-j.end-recordHeader {
			break
		}
		record := io.NewSectionReader(j.p, j.end+recordHeader, size)
		sum := sha256.New()
		if _, err := io.Copy(sum, record); err != nil {
			return nil, err
		}
		if !bytes.Equal(sum.Sum(nil), head[8:]) {
			break
		}
		s, err := splitstream.Open(record, size, a)
		if err != nil {
			break
		}
		some, err := readObjects(s, a, true)
		if err != nil {
			break
		}
		for c, e := range some.entries {
			have.entries[c] = e
		}
		j.end += recordHeader + size
	}
	return have, nil
}

// add writes objects, whose contents are durable.
func (j *journal) add(o *Objects) error {
	w := splitstream.NewWriter(o.alg, CommitContent)
	b, err := o.encode(w.Refer)
	if err != nil {
		return err
	}
	w.Write(b)
	content, size, err := w.Finish()
	if err != nil {
		return err
	}
	record := bytes.NewBuffer(make([]byte, recordHeader, recordHeader+size))
	if _, err := record.ReadFrom(content); err != nil {
		return err
	}
	out := record.Bytes()
	binary.LittleEndian.PutUint64(out, uint64(size))
	sum := sha256.Sum256(out[recordHeader:])
	copy(out[8:], sum[:])
	n, err := j.p.WriteAt(out, j.end)
	if err == nil {
		j.end += int64(n)
	}
	return err
}

// remove ends it: the commit is complete.
func (j *journal) remove() error { return j.p.Remove() }

// close leaves it for the next pull.
func (j *journal) close() error {
	if j.end == 0 {
		return j.p.Remove()
	}
	return j.p.Close()
}
