package ostree

import (
	"fmt"
	"slices"

	"github.com/composefs-boot/composefs-boot/repo/ostree/gvariant"
)

// Keys of a commit's metadata that say whom it is meant for.
const (
	refBinding        = "ostree.ref-binding"
	collectionBinding = "ostree.collection-binding"
)

// CheckBinding tells why a commit is not meant for a ref of a collection. An empty ref or collection is any; a commit that says nothing is
// meant for any ref, but not for a collection.
func (c *Commit) CheckBinding(ref, collection string) error {
	if ref != "" {
		list, ok, err := c.Metadata.Lookup(refBinding)
		if err != nil {
			return err
		}
		if !ok && collection != "" {
			return fmt.Errorf("it does not say which refs it is meant for (%s goes with the collection %q)", ref, collection)
		}
		if ok {
			refs, err := stringList(list)
			if err != nil {
				return fmt.Errorf("%s: %w", refBinding, err)
			}
			if !slices.Contains(refs, ref) {
				return fmt.Errorf("it is meant for %q, not for the ref %q (--disable-verify-bindings takes it)", refs, ref)
			}
		}
	}
	if collection == "" {
		return nil
	}
	v, ok, err := c.Metadata.Lookup(collectionBinding)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("it does not say which collection it is meant for, which must be %q", collection)
	}
	if is, err := v.String(); err != nil || is != collection {
		return fmt.Errorf("it is meant for the collection %q, not for %q", is, collection)
	}
	return nil
}

func stringList(v gvariant.Value) ([]string, error) {
	if v.Type() != "as" {
		return nil, fmt.Errorf("type %s, and as is expected", v.Type())
	}
	n, err := v.Len()
	if err != nil {
		return nil, err
	}
	list := make([]string, n)
	for i := range list {
		e, err := v.At(i)
		if err != nil {
			return nil, err
		}
		if list[i], err = e.String(); err != nil {
			return nil, err
		}
	}
	return list, nil
}
