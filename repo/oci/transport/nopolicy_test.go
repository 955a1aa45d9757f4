//go:build !containers_image_openpgp

package transport_test

import (
	"path/filepath"
	"testing"

	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// A program that cannot check signatures takes no image where there is a policy.
func TestNoPolicy(t *testing.T) {
	t.Setenv("CONTAINERS_POLICY_JSON", write(t, filepath.Join(t.TempDir(), "policy.json"), "{}", 0o644))
	for _, image := range saveAll(t, imageOf(t, "amd64", layer(41, 3))) {
		if _, err := pull(t, newRepo(t), image, transport.Options{}, oci.PullOptions{}); !contains(err, "-tags containers_image_openpgp") {
			t.Errorf("%s: %v", image, err)
		}
	}
}
