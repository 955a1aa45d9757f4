package remote

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
)

// keepLarger is the size in bytes from which on a content object is kept while it comes, so that the next pull goes on in the middle
// of it.
const keepLarger = 1 << 20

const keptPrefix = "ostree-file-"

// keeper keeps the beginnings of large content objects in tmp/ of the repository. Nothing vouches for them: if one is not what it
// should be, the object has another checksum, and it is gone.
type keeper struct {
	r     *repo.Repo
	known map[string]bool // that earlier pulls have left
}

func newKeeper(r *repo.Repo) *keeper {
	k := &keeper{r, map[string]bool{}}
	entries, err := os.ReadDir(filepath.Join(r.Path(), "tmp"))
	if err != nil {
		return k // without what there may be
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), keptPrefix) {
			k.known[e.Name()] = true
		}
	}
	return k
}

// open opens a content object, what has come of it first.
func (k *keeper) open(ctx context.Context, c *client, sum ostree.Checksum) (io.ReadCloser, error) {
	path := ostree.ObjectName{Checksum: sum, Kind: ostree.KindFile}.Path(true)
	if k == nil {
		return c.open(ctx, c.content, path, 0)
	}
	name := keptPrefix + sum.String()
	var p *repo.Partial
	var have int64
	if k.known[name] {
		if p = k.partial(ctx, name); p != nil {
			if info, err := p.Stat(); err == nil {
				have = info.Size()
			}
		}
	}
	b, err := c.open(ctx, c.content, path, have)
	if p != nil && errors.Is(err, errRange) {
		// There is not as much of it on the server: it is something else.
		have = 0
		if err = p.Truncate(0); err == nil {
			b, err = c.open(ctx, c.content, path, 0)
		}
	}
	if err != nil {
		if p != nil {
			p.Close()
		}
		return nil, err
	}
	if p == nil && b.size > keepLarger {
		if p = k.partial(ctx, name); p != nil {
			p.Truncate(0)
		}
	}
	if p == nil {
		return b, nil
	}
	return &kept{body: b, p: p, have: have}, nil
}

// partial opens the file for an object, nil if somebody else has it: who waited for one with another one open could wait for ever.
func (k *keeper) partial(ctx context.Context, name string) *repo.Partial {
	p, err := k.r.OpenPartial(ctx, name, repo.LockOptions{Timeout: time.Millisecond})
	if err != nil {
		return nil
	}
	return p
}

// kept is a body of which what comes is kept.
type kept struct {
	*body
	p    *repo.Partial
	have int64 // bytes of it that were there
	at   int64
	end  bool // it has been read to its end, or cannot be kept
}

func (k *kept) Read(b []byte) (int, error) {
	if k.at < k.have {
		n, err := k.p.ReadAt(b[:min(int64(len(b)), k.have-k.at)], k.at)
		k.at += int64(n)
		if n > 0 {
			err = nil
		}
		return n, err
	}
	n, err := k.body.Read(b)
	if n > 0 && !k.end {
		if _, err := k.p.WriteAt(b[:n], k.at); err != nil { // the disk is full, perhaps
			k.end = true
		}
	}
	k.at += int64(n)
	if err == io.EOF || k.body.size >= 0 && k.at == k.body.size {
		k.end = true
	}
	return n, err
}

// Close removes what was kept if all of it has been read: it is where it should be, or it is not what it should be.
func (k *kept) Close() error {
	if k.end {
		k.p.Remove()
	} else {
		k.p.Close()
	}
	return k.body.Close()
}
