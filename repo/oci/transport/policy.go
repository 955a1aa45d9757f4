//go:build containers_image_openpgp

package transport

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage/pkg/configfile"
)

// allow asks the policy of the machine whether an image may be used. An artifact that refers to an image may be if nothing from there is
// rejected; that it is signed is not asked for.
func allow(ctx context.Context, sys *types.SystemContext, image types.UnparsedImage, artifact bool) error {
	policy, err := signature.DefaultPolicy(sys)
	if errors.Is(err, configfile.ErrConfigFileNotFound) {
		return nil
	}
	if err == nil && artifact {
		policy, err = withoutSignatures(policy)
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

// withoutSignatures returns a policy that accepts unsigned what another one wants signatures of. What that rejects it rejects.
func withoutSignatures(p *signature.Policy) (*signature.Policy, error) {
	relax := func(list signature.PolicyRequirements) (signature.PolicyRequirements, error) {
		var relaxed signature.PolicyRequirements
		for _, r := range list {
			// The library has no other way to tell of which type a requirement is.
			text, err := json.Marshal(r)
			var is struct{ Type string }
			if err == nil {
				err = json.Unmarshal(text, &is)
			}
			if err != nil {
				return nil, err
			}
			if is.Type == "signedBy" || is.Type == "sigstoreSigned" {
				r = signature.NewPRInsecureAcceptAnything()
			}
			relaxed = append(relaxed, r)
		}
		return relaxed, nil
	}
	var err error
	out := &signature.Policy{Transports: map[string]signature.PolicyTransportScopes{}}
	if out.Default, err = relax(p.Default); err != nil {
		return nil, err
	}
	for transport, scopes := range p.Transports {
		out.Transports[transport] = signature.PolicyTransportScopes{}
		for scope, list := range scopes {
			if out.Transports[transport][scope], err = relax(list); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}
