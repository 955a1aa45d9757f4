package xz

// The model of LZMA: what is coded, and with which probabilities. Each symbol is a literal, a byte; or a match, a length of 2 to 273 and a
// distance. A distance that is one of the last four different ones is coded by its number: a repeated match; one of a single byte is short.
// The probabilities depend on the kinds of the last symbols, the state, and on the place in the data, by which structures of 2, 4... bytes
// are noticed.

const (
	probBits  = 11
	probInit  = 1 << (probBits - 1)
	probMove  = 5
	states    = 12 // what the last ones were: literals and kinds of matches
	litStates = 7  // below this, a literal was last
	posStates = 16
	minMatch  = 2
	maxMatch  = 273
)

type prob = uint16

// lengths codes the length of a match.
type lengths struct {
	choice, choice2 prob
	low, mid        [posStates][8]prob
	high            [256]prob
}

// probs has all probabilities.
type probs struct {
	match, long                [states][posStates]prob
	rep, repG0, repG1, repG2   [states]prob
	slot                       [4][64]prob
	special                    [128]prob
	align                      [16]prob
	matchLength, repeatedMatch lengths
	literal                    [0x300 << 4]prob
}

func (p *probs) init() {
	fill := func(b []prob) {
		for i := range b {
			b[i] = probInit
		}
	}
	for i := range p.match {
		fill(p.match[i][:])
		fill(p.long[i][:])
	}
	for _, b := range []*[states]prob{&p.rep, &p.repG0, &p.repG1, &p.repG2} {
		fill(b[:])
	}
	for i := range p.slot {
		fill(p.slot[i][:])
	}
	fill(p.special[:])
	fill(p.align[:])
	for _, l := range []*lengths{&p.matchLength, &p.repeatedMatch} {
		l.choice, l.choice2 = probInit, probInit
		for i := range l.low {
			fill(l.low[i][:])
			fill(l.mid[i][:])
		}
		fill(l.high[:])
	}
	fill(p.literal[:])
}

// What the state is after another symbol.

func afterLiteral(state int) int {
	switch {
	case state < 4:
		return 0
	case state < 10:
		return state - 3
	}
	return state - 6
}

func afterMatch(state int) int {
	if state < litStates {
		return 7
	}
	return 10
}

func afterRepeated(state int) int {
	if state < litStates {
		return 8
	}
	return 11
}

func afterShort(state int) int {
	if state < litStates {
		return 9
	}
	return 11
}
