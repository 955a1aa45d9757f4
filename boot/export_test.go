package boot

import (
	"context"
	"os"

	"github.com/composefs-boot/composefs-boot/repo"
)

// ExecuteUntil carries out the first n steps only, and reports whether there are more.
func (p PrunePlan) ExecuteUntil(n int, r *repo.Repo) (more bool, err error) {
	esp, err := os.OpenRoot(p.ESP)
	if err != nil {
		return false, err
	}
	defer esp.Close()
	root, err := os.OpenRoot(p.Root)
	if err != nil {
		return false, err
	}
	defer root.Close()
	steps := p.steps(context.Background(), esp, root, r, repo.LockOptions{})
	for _, step := range steps[:min(n, len(steps))] {
		if err := step(); err != nil {
			return false, err
		}
	}
	return n < len(steps), nil
}

// MergeEtc is what a machine with all of /etc in its state gets.
var MergeEtc = mergeEtc
