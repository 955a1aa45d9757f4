package ostree

import (
	"context"
	"fmt"

	"github.com/composefs-boot/composefs-boot/repo"
)

// SetDetached replaces the detached metadata of a commit that is here, an a{sv}: it gets a signature more, for example.
func SetDetached(ctx context.Context, r *repo.Repo, s *Stored, detached []byte, l repo.LockOptions) error {
	i, err := r.Begin(ctx, l)
	if err != nil {
		return err
	}
	defer i.Abort()
	p := &pull{r: r, i: i}
	if err := p.complete(ctx, s, link{c: s.Checksum, detached: detached}, nil, nil); err != nil {
		return fmt.Errorf("commit %v: %w", s.Checksum, err)
	}
	return i.Commit()
}
