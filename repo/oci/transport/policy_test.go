//go:build containers_image_openpgp

package transport_test

import (
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// The policy of the machine is asked about every image, out of an index or not, from every transport.
func TestPolicy(t *testing.T) {
	address := google(t)
	image := imageOf(t, "amd64", layer(41, 3))
	push(t, address+"/os:1", image)
	ref, err := name.ParseReference(address+"/os:all", name.Insecure)
	if err == nil {
		err = remote.WriteIndex(ref, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}}))
	}
	if err != nil {
		t.Fatal(err)
	}
	local := saveAll(t, image)
	p := oci.PullOptions{Tag: "a", Platform: oci.Platform{OS: "linux", Architecture: "amd64"}}
	images := append(local, "docker://"+address+"/os:1", "docker://"+address+"/os:all")
	for policy, text := range map[string]string{
		`{"default": [{"type": "reject"}]}`:                                                "policy.json, refuses it",
		`{"default": [{"type": "sigstoreSigned", "keyPath": "/nowhere"}]}`:                 "policy.json, refuses it",
		`{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/nowhere"}]}`: "policy.json, refuses it",
		`{"default": [`: "invalid policy",
		`{"default": [{"type": "insecureAcceptAnything"}]}`: "",
	} {
		t.Setenv("CONTAINERS_POLICY_JSON", write(t, filepath.Join(t.TempDir(), "policy.json"), policy, 0o644))
		for _, image := range images {
			_, err := pull(t, newRepo(t), image, transport.Options{SkipVerify: plain, Retry: quick}, p)
			if (err == nil) != (text == "") || err != nil && !contains(err, text) {
				t.Errorf("%s: %s: %v", policy, image, err)
			}
		}
	}
}
