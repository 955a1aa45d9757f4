package transport_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"go.podman.io/storage/pkg/reexec"
	"golang.org/x/sys/unix"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/erofs"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
)

var (
	ctx   = context.Background()
	plain = new(true) // HTTP
	quick = oci.Retry{Attempts: 8, Wait: time.Millisecond, Idle: 10 * time.Second}
)

// TestMain keeps the configuration of the machine away.
func TestMain(m *testing.M) {
	if reexec.Init() { // the storage library unpacks layers in another process, which is this program again
		return
	}
	if image := os.Getenv("TEST_PULL_IMAGE"); image != "" {
		os.Exit(pullAlone(image, os.Getenv("TEST_PULL_REPO")))
	}
	home, err := os.MkdirTemp("", "transport-test-")
	if err != nil {
		panic(err)
	}
	os.WriteFile(filepath.Join(home, "registries.conf"), nil, 0o644)
	for k, v := range map[string]string{"HOME": home, "XDG_CONFIG_HOME": home, "XDG_RUNTIME_DIR": home, "XDG_DATA_HOME": home,
		"CONTAINERS_REGISTRIES_CONF": filepath.Join(home, "registries.conf"), "DOCKER_CONFIG": home} {
		os.Setenv(k, v)
	}
	code := m.Run()
	os.RemoveAll(home)
	os.Exit(code)
}

// pullAlone is the program that is started, and killed. It prints how much memory it took; what the parent sees of that is its own.
func pullAlone(image, path string) int {
	var most uint64
	if _, err := fmt.Sscan(os.Getenv("TEST_PULL_FILE_SIZE"), &most); err == nil {
		signal.Ignore(unix.SIGXFSZ)
		unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: most, Max: most})
	}
	r, err := repo.Open(path, repo.Options{})
	if err == nil {
		_, err = pullTo(r, image, transport.Options{SkipVerify: plain, Retry: quick}, oci.PullOptions{Tag: "os"})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	status, _ := os.ReadFile("/proc/self/status")
	os.Stdout.Write(regexp.MustCompile(`VmHWM:.*`).Find(status))
	return 0
}

// alone is the command for pullAlone.
func alone(image string, r *repo.Repo, env ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), "TEST_PULL_IMAGE="+image, "TEST_PULL_REPO="+r.Path()), env...)
	return cmd
}

// debian starts the CNCF registry, as Debian has it, and returns its address. What follows http: in its configuration, indented, is
// added.
func debian(t testing.TB, config string) string {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "config.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: info}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp:\n  addr: 127.0.0.1:0\n%s", dir, config)
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	path, err := exec.LookPath("docker-registry")
	if err != nil {
		t.Fatal("docker-registry is missing: run internal/setup packages")
	}
	cmd := exec.Command(path, "serve", file)
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	address := regexp.MustCompile(`listening on (127\.0\.0\.1:\d+)`)
	for lines := bufio.NewScanner(log); lines.Scan(); {
		if found := address.FindStringSubmatch(lines.Text()); found != nil {
			go io.Copy(io.Discard, log)
			return found[1]
		}
	}
	t.Fatal("docker-registry does not listen")
	return ""
}

// google starts the registry of go-containerregistry.
func google(t testing.TB) string {
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

// layer is an archive with files of all sizes, that can hardly be compressed.
func layer(seed uint64, files int) []byte {
	random := rand.New(rand.NewPCG(seed, 1))
	noise := rand.NewChaCha8([32]byte{byte(seed)})
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	w.WriteHeader(&tar.Header{Name: "usr/", Typeflag: tar.TypeDir, Mode: 0o755})
	for k := range files {
		content := make([]byte, []int{10, 64, 65, 4096, 100_000, 300_000}[random.IntN(6)])
		noise.Read(content)
		w.WriteHeader(&tar.Header{Name: fmt.Sprintf("usr/%d-%d", seed, k), Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))})
		w.Write(content)
	}
	w.Close()
	return out.Bytes()
}

// imageOf makes an image of layers, with gzip.
func imageOf(t testing.TB, platform string, layers ...[]byte) v1.Image {
	t.Helper()
	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	for _, b := range layers {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil },
			tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithMediaType(types.OCILayer))
		if err == nil {
			image, err = mutate.AppendLayers(image, l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", platform
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return image
}

// sizeOf is the size of the layers and the config, as they are in a registry.
func sizeOf(t testing.TB, image v1.Image) int64 {
	t.Helper()
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	n := m.Config.Size
	for _, l := range m.Layers {
		n += l.Size
	}
	return n
}

// dockerImageOf makes an image in Docker's format, of layers without compression.
func dockerImageOf(t testing.TB, layers ...[]byte) v1.Image {
	t.Helper()
	image := empty.Image
	for _, b := range layers {
		var err error
		if image, err = mutate.AppendLayers(image, static.NewLayer(b, types.DockerUncompressedLayer)); err != nil {
			t.Fatal(err)
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return image
}

// blob is a layer or config as it is in a registry.
type blob struct {
	digest  string
	content []byte
}

func blobsOf(t testing.TB, image v1.Image) []blob {
	t.Helper()
	config, err := image.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	list := []blob{{string(oci.DigestOf(config)), config}}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		list = append(list, blob{string(oci.DigestOf(b)), b})
	}
	return list
}

func push(t testing.TB, ref string, image v1.Image, o ...remote.Option) {
	t.Helper()
	r, err := name.ParseReference(ref, name.Insecure)
	if err == nil {
		err = remote.Write(r, image, o...)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func newRepo(t testing.TB) *repo.Repo {
	t.Helper()
	path := filepath.Join(t.TempDir(), "repo")
	if _, err := repo.Init(path, repo.Config{Algorithm: fsverity.SHA256, Insecure: true}); err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(path, repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// pull opens an image and pulls it, and makes sure that the repository is in order, whether it went well or not.
func pull(t testing.TB, r *repo.Repo, image string, o transport.Options, p oci.PullOptions) (oci.PullResult, error) {
	t.Helper()
	result, err := pullTo(r, image, o, p)
	report, fsckErr := r.Fsck(ctx, repo.FsckOptions{})
	if fsckErr != nil || !report.OK() {
		t.Fatalf("%v, %v", report.Findings, fsckErr)
	}
	if err != nil {
		if tags, _ := oci.Tags(r); len(tags) > 0 {
			t.Errorf("tags after %v: %v", err, tags)
		}
	}
	return result, err
}

func pullTo(r *repo.Repo, image string, o transport.Options, p oci.PullOptions) (oci.PullResult, error) {
	source, err := transport.Open(ctx, image, o)
	if err != nil {
		return oci.PullResult{}, err
	}
	defer source.Close()
	p.Resume, p.Retry = source.Remote(), o.Retry
	return oci.Pull(ctx, r, source, p)
}

// digestOf is the digest of the composefs image.
func digestOf(t testing.TB, result oci.PullResult) fsverity.Digest {
	t.Helper()
	d, ok := result.Image.Find(false, erofs.V1, fstree.XattrsAllowlist)
	if !ok {
		t.Fatal("there is no composefs image")
	}
	return d
}

// An image is the same by tag, by digest and out of an index, from either registry.
func TestRegistries(t *testing.T) {
	amd, arm := imageOf(t, "amd64", layer(1, 10), layer(2, 10)), imageOf(t, "arm64", layer(3, 10))
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: amd, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: arm, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}})
	digest, err := amd.Digest()
	if err != nil {
		t.Fatal(err)
	}
	o := transport.Options{SkipVerify: plain, Retry: quick}
	var want fsverity.Digest
	for registryName, address := range map[string]string{"distribution": debian(t, ""), "go-containerregistry": google(t)} {
		base := "docker://" + address + "/some/os"
		push(t, address+"/some/os:1", amd)
		ref, err := name.ParseReference(address+"/some/os:all", name.Insecure)
		if err == nil {
			err = remote.WriteIndex(ref, index)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			image, platform string
			same            bool
		}{
			{":1", "", true}, {"@" + digest.String(), "", true}, {":all", "linux/amd64", true}, {":all", "linux/arm64", false},
		} {
			var p oci.PullOptions
			if c.platform != "" {
				if p.Platform, err = oci.ParsePlatform(c.platform); err != nil {
					t.Fatal(err)
				}
			}
			result, err := pull(t, newRepo(t), base+c.image, o, p)
			if err != nil {
				t.Errorf("%s %s: %v", registryName, c.image, err)
				continue
			}
			got := digestOf(t, result)
			if want.IsZero() {
				want = got
			}
			if (got == want) != c.same || c.same && string(result.Image.Digest) != digest.String() {
				t.Errorf("%s %s %s: %v", registryName, c.image, c.platform, got)
			}
		}
		for image, text := range map[string]string{
			base + ":2":                           "manifest unknown",
			"docker://" + address + "/other/os:1": "unknown",
			base + "@sha256:" + string(bytes.Repeat([]byte("0"), 64)): "unknown",
		} {
			if _, err := pull(t, newRepo(t), image, o, oci.PullOptions{Tag: "a"}); !contains(err, text) {
				t.Errorf("%s: %v", image, err)
			}
		}
		if _, err := pull(t, newRepo(t), base+":all", o, oci.PullOptions{Platform: oci.Platform{OS: "linux", Architecture: "riscv64"}}); !contains(err, "there are linux/amd64, linux/arm64") {
			t.Error(err)
		}
	}
}

func contains(err error, text string) bool {
	return err != nil && bytes.Contains(bytes.ToLower([]byte(err.Error())), bytes.ToLower([]byte(text)))
}
