package gvariant

import "fmt"

// Check looks at the whole value and returns an error that is ErrNotNormal, or tells of a bad type or too deep a value, if there is
// any other form that GLib would write. A value that passes is what Encode makes of its parts.
func (v Value) Check() error {
	var err error
	switch v.kind() {
	case 0:
		return v.want("a value")
	case 'b':
		_, err = v.Bool()
	case 's', 'o', 'g':
		_, err = v.String()
	case 'a':
		err = v.checkArray()
	case '(', '{':
		err = v.checkTuple()
	case 'm', 'v':
		var n int
		if n, err = v.Len(); err == nil && n > 0 {
			err = v.checkAt(0)
		}
	}
	return err
}

func (v Value) checkAt(i int) error {
	kid, err := v.At(i)
	if err != nil {
		return err
	}
	return kid.Check()
}

func (v Value) checkArray() error {
	end, n, err := v.elements()
	if err != nil {
		return err
	}
	kid := v.l.kids[0]
	switch kid.kind() {
	case 'y', 'n', 'q', 'i', 'u', 'h', 'x', 't', 'd':
		return nil // any bytes are numbers
	}
	at := 0
	for i := range n {
		e, err := v.element(i)
		if err != nil {
			return err
		}
		start := pad(at, kid.align)
		if err := v.checkZero(at, start); err != nil {
			return err
		}
		at = start + len(e.data)
		if err := e.Check(); err != nil {
			return fmt.Errorf("%s: element %d: %w", v.l.text, i, err)
		}
	}
	if at != end {
		return v.fail("the elements end at %d, the framing offsets begin at %d", at, end)
	}
	return nil
}

func (v Value) checkTuple() error {
	at := 0
	for i, kid := range v.l.kids {
		start, end, err := v.member(i)
		if err != nil {
			return err
		}
		if err := v.checkZero(at, start); err != nil {
			return err
		}
		at = end
		if kid.size > 0 && len(kid.kids) == 0 && kid.kind() != 'b' && kid.kind() != '(' {
			continue // any bytes are a number
		}
		if err := v.checkAt(i); err != nil {
			return fmt.Errorf("%s: member %d: %w", v.l.text, i, err)
		}
	}
	if v.l.size > 0 {
		return v.checkZero(at, len(v.data))
	}
	width := offsetSize(len(v.data))
	if n := v.l.framed(); width > 1 && n > 0 && offsetSize(at+n*(width/2)) < width {
		return v.fail("framing offsets of %d bytes are too large", width)
	}
	return nil
}

// checkZero looks at padding.
func (v Value) checkZero(start, end int) error {
	for _, b := range v.data[start:end] {
		if b != 0 {
			return v.fail("padding before %d is not zero", end)
		}
	}
	return nil
}
