package main

import (
	"bytes"
	"encoding/json"
	"io"
	"io/fs"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// dealOut deals the files of a tree out to layers, as lists for tar; directories are in the first. Hard links stay together. What is in
// except, relative to the tree, is in none.
func dealOut(t *testing.T, tree string, layers int, except ...string) []string {
	t.Helper()
	lists := make([]string, layers)
	err := filepath.WalkDir(tree, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		k := 0
		if !e.IsDir() {
			k = int(info.Sys().(*syscall.Stat_t).Ino % uint64(layers))
		}
		rel, err := filepath.Rel(tree, path)
		if !slices.Contains(except, rel) {
			lists[k] += rel + "\x00"
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return lists
}

// layerOf packs files of a tree, a list of names that end with NUL, as a layer.
func layerOf(t *testing.T, tree, list string) v1.Layer {
	t.Helper()
	cmd := exec.Command("tar", "--create", "--format=posix", "--numeric-owner", "--xattrs", "--xattrs-include=security.capability",
		"--directory="+tree, "--no-recursion", "--null", "--files-from=-")
	cmd.Stdin, cmd.Stderr = strings.NewReader(list), os.Stderr
	archive, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive)), nil },
		tarball.WithCompressionLevel(1), tarball.WithMediaType(types.OCILayer))
	if err != nil {
		t.Fatal(err)
	}
	return layer
}

func imageOf(t *testing.T, layers ...v1.Layer) v1.Image {
	t.Helper()
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.AppendLayers(image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err == nil {
		config = config.DeepCopy()
		config.OS, config.Architecture = "linux", "amd64"
		image, err = mutate.ConfigFile(image, config)
	}
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// imageOfTree packs a directory as an OCI image.
func imageOfTree(t *testing.T, tree string, layers int) v1.Image {
	t.Helper()
	var all []v1.Layer
	for _, list := range dealOut(t, tree, layers) {
		all = append(all, layerOf(t, tree, list))
	}
	return imageOf(t, all...)
}

// runJSON runs a command with --json, which has to go well.
func runJSON(t *testing.T, to any, args ...string) {
	t.Helper()
	var out, errs bytes.Buffer
	if code := run(t.Context(), append([]string{"composefs-boot", "--quiet", "--json"}, args...), nil, &out, &errs); code != 0 {
		t.Fatalf("%s: %d: %s", strings.Join(args, " "), code, errs.String())
	}
	if err := json.Unmarshal(out.Bytes(), to); err != nil {
		t.Fatal(err)
	}
}

// A whole system is the same from its directory and from a registry or layout, whichever command reads it, and boots.
func TestSystemFromImage(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	tree, dir := vm.Cache(t, "os/trixie"), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	image := imageOfTree(t, tree, 6)
	l, err := layout.Write(in("layout"), empty.Index)
	if err == nil {
		err = l.AppendImage(image)
	}
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	ref, err := name.ParseReference(server.Listener.Addr().String()+"/os:1", name.Insecure)
	if err == nil {
		err = remote.Write(ref, image)
	}
	if err != nil {
		t.Fatal(err)
	}
	docker := "docker://" + ref.Name()

	var want imageResult
	runJSON(t, &want, "--no-repo", "compute-id", "--bootable", tree)
	got := map[string]string{}
	var one imageResult
	runJSON(t, &one, "--no-repo", "compute-id", "--bootable", "oci:"+in("layout"))
	got["compute-id of the layout"] = one.Digest
	runJSON(t, &one, "--no-repo", "compute-id", "--tls-verify=false", "--bootable", docker)
	got["compute-id"] = one.Digest
	runJSON(t, &struct{}{}, "--repo", in("repo"), "init", "--insecure")
	runJSON(t, &one, "--repo", in("repo"), "create-image", "--tls-verify=false", "--bootable", docker, "my-os")
	got["create-image"] = one.Digest
	var pulled ociPullResult
	runJSON(t, &pulled, "--repo", in("repo"), "oci", "pull", "--tls-verify=false", "--bootable", docker, "my-os")
	if pulled.Stats.Present != 6 || pulled.Stats.Objects != 0 {
		t.Errorf("pulled after create-image: %+v", pulled.Stats)
	}
	for _, i := range pulled.Images {
		if i.Bootable {
			got["oci pull"] = i.ID
		}
	}
	for _, target := range []string{"esp", "root", "state/esp"} {
		if err := os.MkdirAll(in(target), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var installed installResult
	runJSON(t, &installed, "install", docker, "--tls-verify=false", "--disk", in("disk.img"), "--karg", "console=ttyS0",
		"--karg", "composefs.show", "--karg", "systemd.journald.forward_to_console=0")
	got["install --disk"] = installed.Digest
	installRoot := []string{"install", docker, "--tls-verify=false", "--insecure", "--root", in("root"), "--root-arg", "root=LABEL=os", "--esp", in("esp")}
	runJSON(t, &installed, append(installRoot, "--dry-run")...)
	got["install --root --dry-run"] = installed.Digest
	if entries, _ := os.ReadDir(in("root")); len(entries) > 0 {
		t.Errorf("a dry run has written %v", entries)
	}
	runJSON(t, &installed, installRoot...)
	got["install --root"] = installed.Digest
	runJSON(t, &installed, "--repo", in("root/composefs"), "oci", "prepare-boot", "--bootdir", in("state/esp"), "--entry-id", "other",
		"--cmdline", "root=LABEL=os", docker)
	got["oci prepare-boot"] = installed.Digest
	for what, digest := range got {
		if digest != want.Digest {
			t.Errorf("%s: %s, want %s", what, digest, want.Digest)
		}
	}
	entry, err := os.ReadFile(in("state/esp/loader/entries/other.conf"))
	if err != nil || !strings.Contains(string(entry), "options composefs.digest=?v1-sha512-12:"+want.Digest+" root=LABEL=os\n") {
		t.Errorf("%v: %s", err, entry)
	}
	if _, err := os.Stat(in("state/esp/EFI/BOOT")); err == nil {
		t.Error("oci prepare-boot has written a boot loader")
	}
	if left, _ := os.ReadDir(os.Getenv("TMPDIR")); len(left) > 0 {
		t.Errorf("left in the temporary directory: %v", left)
	}
	m := vm.Start(t, vm.Config{Disks: []string{in("disk.img")}})
	const never = "Kernel panic|does not boot|not found in"
	m.Expect(`Command line: .*composefs.digest=\S+`+want.Digest, never)
	m.Expect(`composefs-show: done`, never)
	m.Stop()
}
