//go:build containers_image_openpgp

package transport_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

// claim is what is signed, by containers-signature(5) and by cosign: this manifest has this name.
func claim(kind, image string, digest v1.Hash) []byte {
	return fmt.Appendf(nil, `{"critical":{"identity":{"docker-reference":%q},"image":{"docker-manifest-digest":%q},"type":%q},"optional":{}}`,
		image, digest, kind)
}

// signedBy makes an OpenPGP key, and returns the public one and what signs.
func signedBy(t *testing.T) (public string, sign func([]byte) string) {
	t.Helper()
	key, err := openpgp.NewEntity("test", "", "test@example.com", nil)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := key.Serialize(&out); err != nil {
		t.Fatal(err)
	}
	return out.String(), func(payload []byte) string {
		var out bytes.Buffer
		w, err := openpgp.Sign(&out, key, nil, nil)
		if err == nil {
			_, err = w.Write(payload)
		}
		if err == nil {
			err = w.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
}

// sigstoreKey makes a key like cosign's, and returns the public one and what signs.
func sigstoreKey(t *testing.T) (public string, sign func([]byte) string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), func(payload []byte) string {
		sum := sha256.Sum256(payload)
		signature, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		return base64.StdEncoding.EncodeToString(signature)
	}
}

// configure writes policy.json, and registries.d with a lookaside directory, which it returns.
func configure(t *testing.T, policy string) (lookaside string) {
	t.Helper()
	dir := t.TempDir()
	t.Setenv("XDG_CONFIG_HOME", dir)
	t.Setenv("CONTAINERS_POLICY_JSON", write(t, filepath.Join(dir, "policy.json"), policy, 0o644))
	lookaside = filepath.Join(dir, "lookaside")
	registries := filepath.Join(dir, "containers/registries.d")
	if err := os.MkdirAll(registries, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(registries, "test.yaml"), "default-docker:\n  lookaside: file://"+lookaside+"\n  use-sigstore-attachments: true\n", 0o644)
	return lookaside
}

func digestOfManifest(t *testing.T, image v1.Image) v1.Hash {
	t.Helper()
	d, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// An image with a signature by OpenPGP is accepted if the signature is good, by the right key, for this image and this name: from a
// registry, alone or out of an index, where it is beside it, and from a directory, where it is with it.
func TestSignedByOpenPGP(t *testing.T) {
	public, sign := signedBy(t)
	_, signOther := signedBy(t)
	address := debian(t, "")
	image := imageOf(t, "amd64", layer(71, 3))
	other := digestOfManifest(t, imageOf(t, "amd64", layer(72, 3)))
	digest := digestOfManifest(t, image)
	push(t, address+"/os:1", image)
	ref, err := name.ParseReference(address+"/os:all", name.Insecure)
	if err == nil {
		err = remote.WriteIndex(ref, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: image,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}}))
	}
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "dir")
	save(t, "dir:"+dir, image)
	key := write(t, filepath.Join(t.TempDir(), "key.gpg"), public, 0o644)
	lookaside := configure(t, fmt.Sprintf(`{"default": [{"type": "reject"}], "transports": {
		"docker": {"": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": %q, "signedIdentity": {"type": "matchRepository"}}]},
		"dir": {"": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": %q, "signedIdentity": {"type": "exactReference", "dockerReference": %q}}]}}}`,
		key, key, address+"/os:1"))
	const kind = "atomic container signature"
	payload := claim(kind, address+"/os:1", digest)
	for what, c := range map[string]struct{ signature, err string }{
		"valid":       {sign(payload), ""},
		"none":        {"", "signature was required, but no signature exists"},
		"other-key":   {signOther(payload), "refuses it"},
		"other-image": {sign(claim(kind, address+"/os:1", other)), "refuses it"},
		"other-name":  {sign(claim(kind, address+"/other:1", digest)), "refuses it"},
		"other-kind":  {sign(claim("something", address+"/os:1", digest)), "refuses it"},
		"not-signed":  {string(payload), "refuses it"},
		"cut":         {sign(payload)[:100], "refuses it"},
		"changed":     {strings.Replace(sign(payload), "atomic", "atomiC", 1), "refuses it"},
	} {
		beside := filepath.Join(lookaside, "os@"+strings.Replace(digest.String(), ":", "=", 1))
		if err := os.MkdirAll(beside, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{filepath.Join(beside, "signature-1"), filepath.Join(dir, "signature-1")} {
			os.Remove(file)
			if c.signature != "" {
				write(t, file, c.signature, 0o644)
			}
		}
		for _, image := range []string{"docker://" + address + "/os:1", "docker://" + address + "/os:all", "docker://" + address + "/os@" + digest.String(), "dir:" + dir} {
			mustAccept(t, what, image, c.err)
		}
	}
}

// What refers to an image needs no signature: it is often one itself. The image does, and so does an image that refers to it.
func TestReferrersAndPolicy(t *testing.T) {
	public, sign := signedBy(t)
	address := withReferrers(t)
	image := imageOf(t, "amd64", layer(75, 3))
	digest := digestOfManifest(t, image)
	push(t, address+"/os:1", image)
	ref, err := name.NewRepository(address+"/os", name.Insecure)
	if err == nil {
		err = remote.WriteLayer(ref, static.NewLayer([]byte("{}"), "application/vnd.oci.empty.v1+json"))
	}
	if err != nil {
		t.Fatal(err)
	}
	text := artifact("test", oci.Digest(digest.String()))
	member := artifact("test", oci.DigestOf(nil))
	putManifest(t, address, text)
	putManifest(t, address, member)
	putIndex(t, address, artifactIndex("test", oci.Digest(digest.String()), member))
	key := write(t, filepath.Join(t.TempDir(), "key.gpg"), public, 0o644)
	lookaside := configure(t, fmt.Sprintf(`{"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": %q, "signedIdentity": {"type": "matchRepository"}}]}`, key))
	beside := filepath.Join(lookaside, "os@"+strings.Replace(digest.String(), ":", "=", 1))
	if err := os.MkdirAll(beside, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(beside, "signature-1"), sign(claim("atomic container signature", address+"/os:1", digest)), 0o644)
	o := transport.Options{SkipVerify: plain, Retry: quick}
	if got, err := pullWithReferrers(t, newRepo(t), "docker://"+address+"/os:1", o, ""); err != nil || len(got) != 2 {
		t.Error(got, err)
	}
	mustAccept(t, "artifact", "docker://"+address+"/os@"+string(oci.DigestOf([]byte(text))), "no signature exists")
	referring, ok := mutate.Subject(image, v1.Descriptor{MediaType: types.OCIManifestSchema1, Digest: digest, Size: 1}).(v1.Image)
	if !ok {
		t.Fatal("not an image")
	}
	push(t, address+"/os:2", referring)
	if _, err := pullWithReferrers(t, newRepo(t), "docker://"+address+"/os:1", o, ""); !contains(err, "no signature exists") {
		t.Error(err)
	}
}

// What the policy rejects is not taken, be it what it may.
func TestRejectedReferrers(t *testing.T) {
	address := withReferrers(t)
	image := imageOf(t, "amd64", layer(76, 3))
	digest := oci.Digest(digestOfManifest(t, image).String())
	push(t, address+"/os:1", image)
	ref, err := name.NewRepository(address+"/os", name.Insecure)
	if err == nil {
		err = remote.WriteLayer(ref, static.NewLayer([]byte("{}"), "application/vnd.oci.empty.v1+json"))
	}
	if err != nil {
		t.Fatal(err)
	}
	const signed = `{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/nowhere"}`
	for what, put := range map[string]func(){
		"manifest": func() { putManifest(t, address, artifact("test", digest)) },
		"index":    func() { putIndex(t, address, artifactIndex("test/index", digest)) },
	} {
		put()
		for policy, text := range map[string]string{
			`{"default": [{"type": "insecureAcceptAnything"}]}`: "",
			`{"default": [` + signed + `]}`:                     "",
			`{"default": [{"type": "reject"}]}`:                 "policy.json, refuses it",
			`{"default": [` + signed + `, {"type": "reject"}]}`: "policy.json, refuses it",
			`{"default": [{"type": "insecureAcceptAnything"}], "transports": {"docker": {"` + address + `/os": [{"type": "reject"}]}}}`:    "policy.json, refuses it",
			`{"default": [{"type": "insecureAcceptAnything"}], "transports": {"docker": {"` + address + `/other": [{"type": "reject"}]}}}`: "",
			`{"default": [{"type": "reject"}], "transports": {"docker": {"": [` + signed + `]}}}`:                                          "",
			`{"default": [{"type": "signedBaseLayer", "baseLayerIdentity": {"type": "matchExact"}}]}`:                                      "policy.json, refuses it",
		} {
			t.Setenv("CONTAINERS_POLICY_JSON", write(t, filepath.Join(t.TempDir(), "policy.json"), policy, 0o644))
			source, err := transport.Open(ctx, "docker://"+address+"/os:1", transport.Options{SkipVerify: plain, Retry: quick})
			if err != nil {
				t.Fatal(err)
			}
			_, err = oci.PullReferrers(ctx, newRepo(t), source, digest, "", oci.PullOptions{})
			source.Close()
			if (err == nil) != (text == "") || err != nil && !contains(err, text) {
				t.Errorf("%s: %s: %v", what, policy, err)
			}
		}
	}
}

// mustAccept pulls an image, and wants this error, or none.
func mustAccept(t *testing.T, what, image, text string) {
	t.Helper()
	_, err := pull(t, newRepo(t), image, transport.Options{SkipVerify: plain, Retry: quick},
		oci.PullOptions{Tag: "a", Platform: oci.Platform{OS: "linux", Architecture: "amd64"}})
	if (err == nil) != (text == "") || err != nil && !contains(err, text) {
		t.Errorf("%s: %s: %v", what, image, err)
	}
}

// The same with a signature as cosign makes it, which is an image beside the image.
func TestSignedBySigstore(t *testing.T) {
	public, sign := sigstoreKey(t)
	_, signOther := sigstoreKey(t)
	image := imageOf(t, "amd64", layer(73, 3))
	other := digestOfManifest(t, imageOf(t, "amd64", layer(74, 3)))
	digest := digestOfManifest(t, image)
	configure(t, fmt.Sprintf(`{"default": [{"type": "reject"}], "transports": {"docker": {"": [{"type": "sigstoreSigned", "keyData": %q,
		"signedIdentity": {"type": "matchRepository"}}]}}}`, base64.StdEncoding.EncodeToString([]byte(public))))
	const kind = "cosign container image signature"
	for what, c := range map[string]struct {
		payload func(address string) []byte
		sign    func([]byte) string
		err     string
	}{
		"valid":       {func(a string) []byte { return claim(kind, a+"/os", digest) }, sign, ""},
		"none":        {nil, nil, "no signature exists"},
		"other-key":   {func(a string) []byte { return claim(kind, a+"/os", digest) }, signOther, "refuses it"},
		"other-image": {func(a string) []byte { return claim(kind, a+"/os", other) }, sign, "refuses it"},
		"other-name":  {func(a string) []byte { return claim(kind, a+"/other", digest) }, sign, "refuses it"},
		"other-kind":  {func(a string) []byte { return claim("something", a+"/os", digest) }, sign, "refuses it"},
		"changed": {func(a string) []byte { return claim(kind, a+"/os", digest) }, func(b []byte) string {
			return sign(append(b, ' '))
		}, "refuses it"},
		"no-signature": {func(a string) []byte { return claim(kind, a+"/os", digest) }, func([]byte) string { return "AAAA" }, "refuses it"},
	} {
		address := google(t)
		push(t, address+"/os:1", image)
		if c.payload != nil {
			payload := c.payload(address)
			attached := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
			attached, err := mutate.Append(attached, mutate.Addendum{
				Layer:       static.NewLayer(payload, "application/vnd.dev.cosign.simplesigning.v1+json"),
				Annotations: map[string]string{"dev.cosignproject.cosign/signature": c.sign(payload)},
			})
			if err != nil {
				t.Fatal(err)
			}
			push(t, address+"/os:"+strings.Replace(digest.String(), ":", "-", 1)+".sig", attached)
		}
		mustAccept(t, what, "docker://"+address+"/os:1", c.err)
	}
}
