package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/composefs-boot/composefs-boot/repo"
	"github.com/composefs-boot/composefs-boot/repo/digestcache"
	"github.com/composefs-boot/composefs-boot/repo/fstree"
	"github.com/composefs-boot/composefs-boot/repo/fsverity"
	"github.com/composefs-boot/composefs-boot/repo/oci"
	"github.com/composefs-boot/composefs-boot/repo/oci/transport"
	"github.com/composefs-boot/composefs-boot/repo/ostree"
	"github.com/composefs-boot/composefs-boot/repo/ostree/remote"
	"github.com/composefs-boot/composefs-boot/repo/scan"
)

// imageFlags say how an OCI image is reached, in skopeo's words.
type imageFlags struct {
	platform          string
	authFile, certDir string
	tlsVerify         bool
	tlsVerifyGiven    func() bool
	referrers         bool   // of registries, too
	artifactType      string // only these; "" for all
}

func (f *imageFlags) add(c *cobra.Command) {
	flags := c.Flags()
	flags.StringVar(&f.platform, "platform", "", "which image of an index, by `OS/ARCHITECTURE` [default: "+oci.ThisPlatform().String()+"]")
	flags.StringVar(&f.authFile, "authfile", "", "`FILE` with credentials for registries [default: that of podman, or of docker]")
	flags.StringVar(&f.certDir, "cert-dir", "", "`DIR` with *.crt of the registry's authority, *.cert and *.key of this machine")
	flags.BoolVar(&f.tlsVerify, "tls-verify", true, "want HTTPS of a registry, and a certificate that is trusted [default: as registries.conf says]")
	flags.Lookup("tls-verify").DefValue = "" // pflag would print another default
	f.tlsVerifyGiven = func() bool { return flags.Changed("tls-verify") }
}

// sourceFlags say how sources are reached that are no directories.
type sourceFlags struct {
	imageFlags
	commitFlags
}

func (f *sourceFlags) add(c *cobra.Command) {
	f.imageFlags.add(c)
	f.commitFlags.add(c)
}

const imageNames = `An IMAGE is docker://HOST/NAME:TAG or docker://HOST/NAME@DIGEST in a registry, oci:DIR[:TAG], oci-archive:FILE[:TAG],
docker-archive:FILE[:NAME:TAG], dir:DIR, or containers-storage:NAME of podman. Credentials, mirrors and signature policies are those
of container engines on this machine.`

// openImage opens what the name of an OCI image names.
func (f imageFlags) openImage(ctx context.Context, image string) (*transport.Image, error) {
	if !transport.Is(image) {
		return nil, usageError{fmt.Errorf("image %q: want TRANSPORT:REFERENCE, docker://... for example, or one of %s", image,
			strings.Join(transport.Names, ", "))}
	}
	return transport.Open(ctx, image, f.options())
}

func (f imageFlags) options() transport.Options {
	o := transport.Options{AuthFile: f.authFile, CertDir: f.certDir, Retry: oci.DefaultRetry}
	if f.tlsVerifyGiven != nil && f.tlsVerifyGiven() {
		o.SkipVerify = new(!f.tlsVerify)
	}
	return o
}

// pulled is an image that was pulled, and the artifacts that refer to it.
type pulled struct {
	oci.PullResult
	Referrers []oci.Digest
}

// pull pulls an OCI image into a repository, and the artifacts that refer to it: those of a layout, and of a registry if they are asked
// for, since there may be more of them than of the image.
func (a *app) pull(ctx context.Context, r *repo.Repo, image string, f imageFlags, o oci.PullOptions) (result pulled, err error) {
	if f.platform != "" {
		if o.Platform, err = oci.ParsePlatform(f.platform); err != nil {
			return result, usageError{err}
		}
	}
	source, err := f.openImage(ctx, image)
	if err != nil {
		return result, err
	}
	defer source.Close()
	o.Lock, o.Retry, o.Resume, o.Progress = a.lock(), oci.DefaultRetry, source.Remote(), &oci.Progress{}
	p := a.startProgress(func() progressEvent {
		return progressEvent{What: "pulling " + image, Bytes: o.Progress.Bytes.Load(), Total: o.Progress.Total.Load()}
	})
	defer p.end()
	result.PullResult, err = oci.Pull(ctx, r, source, o)
	if err == nil && (f.referrers || !source.Remote()) {
		result.Referrers, err = oci.PullReferrers(ctx, r, source, result.Image.Digest, f.artifactType, o)
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", image, err)
	}
	return result, err
}

// treeSource is what a tree is made of: a directory, an OCI image, or an OSTree commit.
type treeSource struct {
	a      *app
	name   string
	image  *oci.Image     // nil: none
	commit *ostree.Stored // nil: none
	from   *upgradesFrom  // where the commit comes from, if that is a web server
	repo   *repo.Repo     // with the image or commit
	end    func()
}

// fromDirectory reports whether what a source is named by is the path of a directory.
func fromDirectory(name string) bool { return !transport.Is(name) && !isCommit(name) }

// openTree opens a source. An OCI image or OSTree commit is pulled into the repository, or into a temporary one if r is nil. The image
// gets a tag, and the commit the name of its ref, if the tag is not "".
func (a *app) openTree(ctx context.Context, name string, r *repo.Repo, alg fsverity.Algorithm, f sourceFlags, tag string) (*treeSource, error) {
	s := &treeSource{a: a, name: name, repo: r, end: func() {}}
	if fromDirectory(name) {
		return s, nil
	}
	if r == nil {
		dir, err := os.MkdirTemp("", "composefs-boot-")
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, "repo")
		if _, err = repo.Init(path, repo.Config{Algorithm: alg, Insecure: true}); err == nil {
			s.repo, err = repo.Open(path, repo.Options{})
		}
		if err != nil {
			os.RemoveAll(dir)
			return nil, err
		}
		s.end = func() {
			s.repo.Close()
			os.RemoveAll(dir)
		}
	}
	var err error
	if isCommit(name) {
		var remotes *remote.Store
		if remotes, err = a.remotesFor(r); err == nil {
			err = s.pullCommit(ctx, remotes, f.commitFlags, tag != "")
		}
	} else {
		var result pulled
		result, err = a.pull(ctx, s.repo, name, f.imageFlags, oci.PullOptions{Tag: tag})
		s.image = result.Image
	}
	if err != nil {
		s.end()
		return nil, err
	}
	return s, nil
}

// pullCommit pulls the commit that the source names, which gets the name of the ref if it is to stay.
func (s *treeSource) pullCommit(ctx context.Context, remotes *remote.Store, f commitFlags, stay bool) error {
	name, err := parseCommit(s.name)
	if err != nil {
		return err
	}
	from, err := s.a.openCommits(ctx, name, remotes, f)
	if err != nil {
		return err
	}
	defer from.close()
	pulled, err := from.pull(ctx, s.repo, stay, remote.PullOptions{})
	if err != nil {
		return err
	}
	s.commit = pulled.Stored
	if from.config != nil {
		s.from = &upgradesFrom{from.config, name.ref}
	}
	return nil
}

// checksum returns that of an OSTree commit, "" for others.
func (s *treeSource) checksum() string {
	if s.commit == nil {
		return ""
	}
	return s.commit.Checksum.String()
}

// manifest returns the digest of an OCI image, "" for a directory.
func (s *treeSource) manifest() string {
	if s.image == nil {
		return ""
	}
	return string(s.image.Digest)
}

// open opens files of the tree.
func (s *treeSource) open() fstree.Open {
	switch {
	case s.image != nil:
		return oci.Files(s.repo)
	case s.commit != nil:
		return ostree.Files(s.repo)
	}
	return scan.Files(s.name)
}

// cache is that of a directory, see treeFlags.
func (s *treeSource) cache(t treeFlags, alg fsverity.Algorithm) *digestcache.Cache {
	if !fromDirectory(s.name) {
		return nil
	}
	return t.cache(s.name, alg)
}

// read makes the tree, and hands the contents of a directory to the sink.
func (s *treeSource) read(ctx context.Context, sink fstree.Sink, cache *digestcache.Cache, t treeFlags) (*fstree.Tree, error) {
	if s.commit != nil {
		return s.readCommit(t)
	}
	if s.image == nil {
		return s.a.read(ctx, s.name, sink, cache, t)
	}
	mode, err := t.xattrMode()
	if err != nil {
		return nil, err
	}
	tree, err := s.image.Tree(ctx, s.repo, sink, oci.Limits{})
	if err == nil && !t.asIs {
		err = tree.MakeContainerRoot(mode)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.name, err)
	}
	return tree, nil
}

// readBootable makes the tree, bootable if that is asked for.
func (s *treeSource) readBootable(ctx context.Context, sink fstree.Sink, alg fsverity.Algorithm, t treeFlags) (*fstree.Tree, error) {
	tree, err := s.read(ctx, sink, s.cache(t, alg), t)
	if err == nil {
		err = bootable(tree, s.open(), s.name, t)
	}
	return tree, err
}
