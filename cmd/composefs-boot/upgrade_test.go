package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"go.podman.io/image/v5/pkg/sysregistriesv2"

	"github.com/composefs-boot/composefs-boot/internal/vm"
)

// upgradeScript runs in the guest, at each of its boots.
const upgradeScript = `#!/bin/sh
run() {
	"$@" > /run/out 2>&1
	echo "exit $?: $*" >> /run/out
	sed 's/^/upgrade-test: /' /run/out
}
boot=$(($(cat /var/lib/boot 2>/dev/null || echo 0) + 1))
echo $boot > /var/lib/boot
echo "upgrade-test: $(cat /proc/cmdline)"
echo "upgrade-test: boot $boot, version $(cat /usr/lib/version-of-test), etc $(cat /etc/kept 2>/dev/null || echo empty)"
for k in $(seq 60); do grep -q '^e[^ ]*.00000000' /proc/net/route && break; sleep 1; done
case $boot in
1)
	echo changed > /etc/kept
	rm /etc/issue
	run composefs-boot upgrade --check
	run composefs-boot -q upgrade --dry-run
	run composefs-boot -q --json upgrade ;;
2)
	[ -e /etc/issue ] && echo "upgrade-test: ISSUE IS BACK"
	run composefs-boot -q upgrade
	run composefs-boot -q rollback ;;
3)
	run composefs-boot -q upgrade
	run composefs-boot prune --dry-run
	run composefs-boot prune --keep 1
	run composefs-boot -q --system fsck ;;
esac
run composefs-boot status
sync
echo "upgrade-test: done"
`

// upgradeTree makes a Debian that runs a script at each of its boots, and can reach a registry by the name that it has on this machine, too.
func upgradeTree(t *testing.T, tree, script, registry string) {
	t.Helper()
	bin := vm.Programs(t)
	for _, args := range [][]string{{"cp", "-a", vm.Cache(t, "os/trixie"), tree}, {"cp", filepath.Join(bin, "composefs-boot"), filepath.Join(tree, "usr/bin")}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for name, content := range map[string]string{
		"usr/libexec/upgrade-test": script,
		"usr/lib/systemd/system/upgrade-test.service": "[Unit]\nAfter=multi-user.target\n[Service]\nType=oneshot\nExecStart=/usr/libexec/upgrade-test\n" +
			"StandardOutput=journal+console\n",
		"etc/systemd/network/10-test.network": "[Match]\nName=e*\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\n",
		"etc/containers/registries.conf":      registriesConf(strings.Replace(registry, "127.0.0.1", "10.0.2.2", 1)),
	} {
		path := filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	wants := filepath.Join(tree, "etc/systemd/system/multi-user.target.wants")
	for _, unit := range []string{"upgrade-test.service", "systemd-networkd.service"} {
		if err := os.Symlink("/usr/lib/systemd/system/"+unit, filepath.Join(wants, unit)); err != nil {
			t.Fatal(err)
		}
	}
}

func registriesConf(registry string) string {
	return fmt.Sprintf("[[registry]]\nprefix = \"registry.example\"\nlocation = %q\ninsecure = true\n", registry)
}

// counter is a registry that counts the bytes of blobs that it gives.
type counter struct {
	http.Handler
	blobs atomic.Int64
}

func (c *counter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
		w = countingWriter{w, &c.blobs}
	}
	c.Handler.ServeHTTP(w, r)
}

type countingWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w countingWriter) Write(b []byte) (int, error) {
	w.n.Add(int64(len(b)))
	return w.ResponseWriter.Write(b)
}

// A machine that was installed from a registry upgrades itself to a second version, for which it downloads one layer of six, keeps its
// state, returns to the first version, stays as it is when the registry is gone, and removes the second version.
func TestGuestUpgrades(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	counted := &counter{Handler: registry.New(registry.Logger(log.New(io.Discard, "", 0)))}
	server := httptest.NewServer(counted)
	defer server.Close()
	address := server.Listener.Addr().String()
	t.Setenv("CONTAINERS_REGISTRIES_CONF", in("registries.conf"))
	sysregistriesv2.InvalidateCache() // other tests have read another one
	t.Cleanup(sysregistriesv2.InvalidateCache)
	if err := os.WriteFile(in("registries.conf"), []byte(registriesConf(address)), 0o644); err != nil {
		t.Fatal(err)
	}
	const docker = "docker://registry.example/os:stable"
	upgradeTree(t, in("tree"), upgradeScript, address)

	// Each version has the last layer of its own.
	const last, large = "usr/lib/version-of-test", "usr/lib/version-of-test.data"
	var layers []v1.Layer
	push := func(version string) (digest string, download int64) {
		data := make([]byte, 1<<20)
		rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%32s", version)))).Read(data)
		for name, content := range map[string][]byte{last: []byte(version + "\n"), large: data} {
			if err := os.WriteFile(in("tree/"+name), content, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if layers == nil {
			for _, list := range dealOut(t, in("tree"), 5, last, large) {
				layers = append(layers, layerOf(t, in("tree"), list))
			}
		}
		layer := layerOf(t, in("tree"), "usr\x00usr/lib\x00"+last+"\x00"+large+"\x00")
		image := imageOf(t, append(layers[:5:5], layer)...)
		ref, err := name.ParseReference(address+"/os:stable", name.Insecure)
		if err == nil {
			err = remote.Write(ref, image)
		}
		if err != nil {
			t.Fatal(err)
		}
		var id imageResult
		runJSON(t, &id, "--no-repo", "compute-id", "--bootable", in("tree"))
		config, err := image.RawConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		bytes, err := layer.Size()
		if err != nil {
			t.Fatal(err)
		}
		return id.Digest, bytes + int64(len(config))
	}
	one, _ := push("one")
	var installed installResult
	runJSON(t, &installed, "install", docker, "--disk", in("disk.img"), "--karg", "console=ttyS0", "--karg", "quiet")
	if installed.Digest != one {
		t.Errorf("installed %s, want %s", installed.Digest, one)
	}
	two, download := push("two")
	counted.blobs.Store(0)

	start := func(digest, said string) *vm.Machine {
		m := vm.Start(t, vm.Config{Disks: []string{in("disk.img")}, Network: true})
		const never = "Kernel panic|does not boot|not found in"
		m.Expect(`upgrade-test: .*composefs.digest=\S+`+digest+` root=UUID=\S+ rw console=ttyS0 quiet`, never)
		m.Expect("upgrade-test: "+said, never)
		return m
	}
	const never = `upgrade-test: exit [1-9]|ISSUE IS BACK|Kernel panic`
	m := start(one, "boot 1, version one, etc empty")
	m.Expect(`upgrade-test: new +1.0 MiB of 1[0-9.]+ MiB, 1 of 6 layers`, never)
	if counted.blobs.Load() > 64<<10 {
		t.Errorf("%d bytes of blobs downloaded to look for an upgrade", counted.blobs.Load())
	}
	m.Expect(`upgrade-test: pulled +1.0 MiB, 1 layers, 1 new objects of 1.0 MiB`, never)
	m.Expect(`exit 0: composefs-boot -q upgrade --dry-run`, never)
	m.Expect(`exit 0: composefs-boot -q --json upgrade`, never)
	m.Expect(two[:12]+" .* next ", never)
	m.Expect(`upgrade-test: done`, never)
	m.Stop()
	var result upgradeResult
	_, text, _ := strings.Cut(m.Console(), "--dry-run\n")
	text, _, _ = strings.Cut(regexp.MustCompile(`(?m)^.*upgrade-test: `).ReplaceAllString(text, ""), "exit 0")
	if err := json.Unmarshal([]byte(text), &result); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if result.Install.Digest != two || result.Booted != one || result.Image != docker {
		t.Errorf("%+v", result)
	}
	// The config is read to look for an upgrade, three times, and by both pulls.
	if got := counted.blobs.Load(); got < download || got > download+64<<10 {
		t.Errorf("%d bytes of blobs downloaded, want the last layer's and the config's %d", got, download)
	}

	m = start(two, "boot 2, version two, etc changed")
	m.Expect(`upgrade-test: Up to date`, never)
	m.Expect(`upgrade-test: next    boots `+one, never)
	m.Expect(`upgrade-test: done`, never)
	m.Stop()
	server.Close()

	m = start(one, "boot 3, version one, etc changed")
	m.Expect(`upgrade-test: composefs-boot: .*registry.example.*nothing has changed: the machine boots as before`, never)
	m.Expect(`upgrade-test: exit 1: composefs-boot -q upgrade`, "exit 0")
	m.Expect(`exit 0: composefs-boot prune --dry-run`, never)
	m.Expect(`upgrade-test: removed +`+two[:12], "")
	m.Expect(`upgrade-test: freed +\S+ .*iB on the ESP, \d+ objects`, "")
	m.Expect(`exit 0: composefs-boot prune --keep 1`, "exit [1-9]")
	m.Expect(`upgrade-test: status: ok`, "exit [1-9]: composefs-boot -q --system fsck")
	m.Expect(one[:12]+" .* booted, next ", "")
	m.Expect(`upgrade-test: done`, "")
	_, status, _ := strings.Cut(m.Console(), "prune --keep 1\n")
	if strings.Contains(status, two[:12]) {
		t.Errorf("version two is still there:\n%s", status)
	}
}
