//go:build containers_image_openpgp

package transport

import (
	"context"
	"errors"
	"fmt"

	"go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage/pkg/configfile"
)

// allow asks the policy of the machine whether an image may be used.
func allow(ctx context.Context, sys *types.SystemContext, image types.UnparsedImage) error {
	policy, err := signature.DefaultPolicy(sys)
	if errors.Is(err, configfile.ErrConfigFileNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("signature policy: %w", err)
	}
	c, err := signature.NewPolicyContext(policy)
	if err != nil {
		return fmt.Errorf("signature policy: %w", err)
	}
	defer c.Destroy()
	if ok, err := c.IsRunningImageAllowed(ctx, image); !ok {
		return fmt.Errorf("the signature policy of this machine, policy.json, refuses it: %w", err)
	}
	return nil
}
