package ostree

// glibOrder returns the entries of a dictionary in the order in which GVariantDict of GLib writes them. ostree commit makes that of
// a bootable commit so, and the order is part of the checksum: it is that of the slots of a GHashTable with g_str_hash as of GLib 2.60.
//
// A table has a power of two of slots, 8 at first. A key goes to 11 times its hash, modulo a prime below that number; if the slot is
// taken, to the first free one of those 1, 3, 6, 10... behind it. A table that is nearly full gets more than 1.333 times as many slots as it
// has keys, and is filled again. There are at most maxMetadata keys.
func glibOrder(entries []MetadataEntry) []MetadataEntry {
	slots := make([]*MetadataEntry, 8)
	used := 0
	for k := range entries {
		e := &entries[k]
		at := glibSlot(e.Key, len(slots), func(at int) bool { return slots[at] != nil && slots[at].Key != e.Key })
		if slots[at] == nil {
			used++
		}
		slots[at] = e
		if len(slots) <= used+used/16 {
			slots = glibGrow(slots, used)
		}
	}
	var list []MetadataEntry
	for _, e := range slots {
		if e != nil {
			list = append(list, *e)
		}
	}
	return list
}

// glibGrow fills a larger table. It does so in place: a key that goes to the slot of one that has not moved yet takes it, and that one
// moves next.
func glibGrow(slots []*MetadataEntry, used int) []*MetadataEntry {
	size := 8
	for size <= used*1333/1000 {
		size *= 2
	}
	old := len(slots)
	slots = append(slots, make([]*MetadataEntry, size-old)...)
	settled := make([]bool, size)
	for k := range old {
		if settled[k] {
			continue
		}
		var e *MetadataEntry
		for slots[k], e = nil, slots[k]; e != nil; {
			at := glibSlot(e.Key, size, func(at int) bool { return settled[at] })
			settled[at] = true
			slots[at], e = e, slots[at]
		}
	}
	return slots
}

// glibSlot returns the first slot for a key that is not taken.
func glibSlot(key string, size int, taken func(int) bool) int {
	at := int(glibHash(key) * 11 % glibPrimes[size])
	for step := 1; taken(at); step++ {
		at = (at + step) % size
	}
	return at
}

// maxMetadata is how many keys a commit can sensibly have.
const maxMetadata = 1000

// glibPrimes has the largest primes below powers of two.
var glibPrimes = map[int]uint32{8: 7, 16: 13, 32: 31, 64: 61, 128: 127, 256: 251, 512: 509, 1024: 1021, 2048: 2039}

// glibHash is g_str_hash: 33 times the hash so far, and the next byte as a signed number. A table keeps 0 and 1 for its own use.
func glibHash(s string) uint32 {
	h := uint32(5381)
	for _, c := range []byte(s) {
		h = h*33 + uint32(int32(int8(c)))
	}
	return max(h, 2)
}
