package remote

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// cookies returns where the cookies of the remote are, "" if it can have none.
func (c *Config) cookies() string {
	if c.dir == "" {
		return ""
	}
	return filepath.Join(c.dir, c.Name+".cookies.txt")
}

// readCookies reads a file of cookies as browsers and curl export them, the Netscape format: a cookie in each line, fields with tabs between
// them: domain; TRUE if it is for hosts below that, too; path; TRUE if it is for HTTPS alone; when it expires, in seconds since 1970, 0 for
// never; name; value. Before the domain may stand #HttpOnly_. A file that is not there has none.
func readCookies(path string) (http.CookieJar, error) {
	if path == "" {
		return nil, nil
	}
	b, err := readKeyfile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		return nil, err
	}
	number := 0
	for line := range strings.Lines(string(b)) {
		number++
		line = strings.TrimPrefix(strings.TrimRight(line, "\r\n"), "#HttpOnly_")
		if line == "" || line[0] == '#' {
			continue
		}
		if err := setCookie(jar, strings.Split(line, "\t")); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", path, number, err)
		}
	}
	return jar, nil
}

func setCookie(jar http.CookieJar, f []string) error {
	if len(f) != 7 {
		return fmt.Errorf("%d fields: want domain, TRUE or FALSE, path, TRUE or FALSE, time, name and value, with tabs between them", len(f))
	}
	expires, err := strconv.ParseInt(f[4], 10, 64)
	if err != nil {
		return fmt.Errorf("time %.40q: want seconds since 1970", f[4])
	}
	host := strings.TrimPrefix(f[0], ".")
	c := &http.Cookie{Name: f[5], Value: f[6], Path: f[2], Secure: f[3] == "TRUE"}
	if f[1] == "TRUE" {
		c.Domain = host
	}
	if expires > 0 {
		c.Expires = time.Unix(expires, 0)
	}
	u := &url.URL{Scheme: "https", Host: host, Path: f[2]}
	if err := c.Valid(); err != nil {
		return err
	}
	jar.SetCookies(u, []*http.Cookie{c})
	return nil
}
