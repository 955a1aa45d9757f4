package remote

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync/atomic"
)

// mirrors are servers that have the same files.
type mirrors struct {
	urls []*url.URL
	best atomic.Int32 // the one that has worked
	// summary is what a metalink says of the summary, nil without one.
	summary *pinned
}

// What is before the URL of a list of servers, in place of the URL of one.
const (
	mirrorListPrefix = "mirrorlist="
	metalinkPrefix   = "metalink="
)

// resolveMirrors makes the list of servers of a URL, which may be that of a list: mirrorlist=URL, a URL in each line, or metalink=URL.
func (c *client) resolveMirrors(ctx context.Context, text string) (*mirrors, error) {
	bare, list := strings.CutPrefix(text, mirrorListPrefix)
	bare, meta := strings.CutPrefix(bare, metalinkPrefix)
	u, err := parseURL(bare, "file")
	if err != nil {
		return nil, err
	}
	if !list && !meta {
		return &mirrors{urls: []*url.URL{u}}, nil
	}
	content, err := c.get(ctx, &mirrors{urls: []*url.URL{u}}, "", maxMirrorList)
	if err != nil {
		return nil, fmt.Errorf("list of mirrors %s: %w", u.Redacted(), err)
	}
	if meta {
		m, err := parseMetalink(content)
		if err != nil {
			return nil, fmt.Errorf("metalink %s: %w", u.Redacted(), err)
		}
		return m, nil
	}
	m := &mirrors{}
	for line := range strings.Lines(string(content)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' || len(m.urls) == maxMirrors {
			continue
		}
		if u, err := parseURL(line); err == nil {
			m.urls = append(m.urls, u)
		}
	}
	if len(m.urls) == 0 {
		return nil, fmt.Errorf("list of mirrors %s: no URL of http or https in it", u.Redacted())
	}
	return m, nil
}

const (
	maxMirrorList = 1 << 20
	maxMirrors    = 32
)

// parseURL reads a URL of http or https, or of another scheme that may be.
func parseURL(s string, more ...string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, err
	case slices.Contains(more, u.Scheme):
		if u.Host != "" && u.Host != "localhost" || !path.IsAbs(u.Path) {
			return nil, fmt.Errorf("%s: want an absolute path on this machine, %s:///PATH", u.Redacted(), u.Scheme)
		}
		u.Host = ""
	case u.Scheme != "http" && u.Scheme != "https" || u.Host == "":
		return nil, fmt.Errorf("%s: not a URL of http or https", u.Redacted())
	}
	return u, nil
}

// metalink is what of a metalink is read: of version 3, as ostree reads it.
type metalink struct {
	Files []struct {
		Name   string `xml:"name,attr"`
		Size   *int64 `xml:"size"`
		Hashes []struct {
			Type string `xml:"type,attr"`
			Hex  string `xml:",chardata"`
		} `xml:"verification>hash"`
		URLs []metalinkURL `xml:"resources>url"`
	} `xml:"files>file"`
}

type metalinkURL struct {
	Preference int    `xml:"preference,attr"` // of 100
	URL        string `xml:",chardata"`
}

// pinned is a file whose content is known before it comes.
type pinned struct {
	size int64 // bytes; negative: not known
	hash crypto.Hash
	sum  []byte
}

func (p *pinned) check(content []byte) error {
	h := p.hash.New()
	h.Write(content)
	if p.size >= 0 && int64(len(content)) != p.size || !bytes.Equal(h.Sum(nil), p.sum) {
		return fmt.Errorf("it has %d bytes and the %v %x, not what the metalink says", len(content), p.hash, h.Sum(nil))
	}
	return nil
}

// parseMetalink returns the servers that have a summary, and what that must be.
func parseMetalink(b []byte) (*mirrors, error) {
	var doc metalink
	if err := xml.Unmarshal(b, &doc); err != nil {
		return nil, err
	}
	for _, f := range doc.Files {
		if f.Name != "summary" {
			continue
		}
		p := &pinned{size: -1}
		if f.Size != nil {
			p.size = *f.Size
		}
		for _, h := range f.Hashes {
			hash := map[string]crypto.Hash{"sha256": crypto.SHA256, "sha512": crypto.SHA512}[h.Type]
			sum, err := hex.DecodeString(strings.TrimSpace(h.Hex))
			if hash > p.hash && err == nil && len(sum) == hash.Size() {
				p.hash, p.sum = hash, sum
			}
		}
		if p.hash == 0 {
			return nil, errors.New("no sha256 or sha512 of the summary in it")
		}
		slices.SortStableFunc(f.URLs, func(a, b metalinkURL) int { return cmp.Compare(b.Preference, a.Preference) })
		m := &mirrors{summary: p}
		for _, one := range f.URLs {
			dir, ok := strings.CutSuffix(strings.TrimSpace(one.URL), "/summary")
			if u, err := parseURL(dir); ok && err == nil && len(m.urls) < maxMirrors {
				m.urls = append(m.urls, u)
			}
		}
		if len(m.urls) == 0 {
			return nil, errors.New("no URL of http or https of a summary in it")
		}
		return m, nil
	}
	return nil, errors.New("no file summary in it")
}
