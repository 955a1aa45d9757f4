package xz

// The planner chooses the symbols that cost least together. It goes from place to place, and writes down for each place that a symbol
// leads to what the cheapest way there costs. Where all ways meet, the best one is known, and it goes there. A match that is long enough
// ends the search: it is taken.
//
// It knows the prices as they are when it begins. Besides single symbols it tries steps of several: what was repeated is often broken by a
// single byte, and goes on behind it with the same distance, which costs little then.

const maxPlan = 2048 // bytes that are planned at once, but for the last step

// step leads to a place: perhaps a symbol first, perhaps a literal, and a symbol.
type step struct {
	first   op // n is 0: none
	literal bool
	op
}

// node is a place that the steps lead to.
type node struct {
	coding
	price uint32
	from  int32
	step
}

type planner struct {
	nodes [maxPlan + 2*maxMatch + 2]node
	end   int // the farthest one that is reached
	ops   []op
	found []match // at a place that has been looked at, but not planned
	place int     // that one
}

func (p *planner) reset() { p.found, p.place = p.found[:0], -1 }

// matches returns those of a place, which is the next one, or the same again.
func (e *encoder) matches(place int) []match {
	if e.place != place {
		e.place = place
		e.found = e.finder.find(e.found[:0])
	}
	return e.found
}

// plan returns the next symbols.
func (e *encoder) plan() []op {
	if e.coded >= refresh {
		e.prices.update(&e.probs)
	}
	e.ops = e.ops[:0]
	if o, ok := e.sure(); ok {
		e.finder.skip(int(o.n) - 1)
		return append(e.ops, o)
	}
	e.nodes[0] = node{coding: e.coding}
	e.end = 0
	i := 0
	for {
		found := e.matches(e.at + i)
		if k := len(found) - 1; i > 0 && k >= 0 && found[k].n >= nice {
			break
		}
		e.spread(i, e.at+i, found)
		i++
		if i == e.end || i == maxPlan {
			break
		}
		n := &e.nodes[i]
		n.coding = e.nodes[n.from].coding.afterStep(&n.step)
	}
	for i > 0 {
		n := &e.nodes[i]
		e.ops = append(e.ops, n.op)
		if n.literal {
			e.ops = append(e.ops, op{1, literal})
		}
		if n.first.n > 0 {
			e.ops = append(e.ops, n.first)
		}
		i = int(n.from)
	}
	for l, r := 0, len(e.ops)-1; l < r; l, r = l+1, r-1 {
		e.ops[l], e.ops[r] = e.ops[r], e.ops[l]
	}
	return e.ops
}

// sure returns a match at the next place that is taken without a search. A repeated one costs less than others.
func (e *encoder) sure() (op, bool) {
	found := e.matches(e.at)
	limit := min(maxMatch, len(e.data)-e.at)
	for k, distance := range e.last {
		if back := e.at - int(distance) - 1; back >= 0 {
			if n := common(e.data, back, e.at, 0, limit); n >= nice {
				return op{uint32(n), uint32(k)}, true
			}
		}
	}
	if k := len(found) - 1; k >= 0 && found[k].n >= nice {
		return op{found[k].n, found[k].distance + 4}, true
	}
	return op{}, false
}

// afterStep returns what is known after a step.
func (c coding) afterStep(s *step) coding {
	if s.first.n > 0 {
		c = c.after(s.first)
	}
	if s.literal {
		c = c.after(op{1, literal})
	}
	return c.after(s.op)
}

// reach is a step to a node that costs so much.
func (e *encoder) reach(to int, price uint32, from int, s step) {
	for e.end < to {
		e.end++
		e.nodes[e.end].price = endless
	}
	if n := &e.nodes[to]; price < n.price {
		n.price, n.from, n.step = price, int32(from), s
	}
}

// spread tries all steps from a node, at a place with these matches.
func (e *encoder) spread(i, place int, found []match) {
	n := e.nodes[i]
	data := e.data
	state := n.state
	posState := place & (1<<placeBits - 1)
	limit := min(maxMatch, len(data)-place)
	isMatch := e.probs.match[state][posState]
	afterMatch := state >= litStates
	var matched byte
	if back := place - int(n.last[0]) - 1; back >= 0 {
		matched = data[back]
	}
	value := data[place]

	price := n.price + bitPrice(isMatch, 0) + literalPrice(e.literals(place), value, afterMatch, matched)
	e.reach(i+1, price, i, step{op: op{1, literal}})
	matchPrice := n.price + bitPrice(isMatch, 1)
	repPrice := matchPrice + bitPrice(e.rep[state], 1)
	if matched == value && place > int(n.last[0]) {
		short := repPrice + bitPrice(e.repG0[state], 0) + bitPrice(e.long[state][posState], 0)
		e.reach(i+1, short, i, step{op: op{1, 0}})
	}
	if limit < minMatch {
		return
	}
	if matched != value {
		c := n.coding.after(op{1, literal})
		e.again(i, place+1, price, c, step{literal: true})
	}

	// Repeated matches.
	least := uint32(minMatch) // what other matches have to have
	for k := range uint32(4) {
		back := place - int(n.last[k]) - 1
		if back < 0 || data[back] != value || data[back+1] != data[place+1] {
			continue
		}
		length := uint32(common(data, back, place, 2, limit))
		price := repPrice + e.which(k, state, posState)
		lengths := &e.lengths[1][posState]
		for l := length; l >= minMatch; l-- {
			e.reach(i+int(l), price+lengths[l], i, step{op: op{l, k}})
		}
		if k == 0 {
			least = length + 1
		}
		e.behind(i, place, price+lengths[length], n.coding, op{length, k}, n.last[k])
	}

	// Other matches, for each length the nearest one.
	price = matchPrice + bitPrice(e.rep[state], 0)
	lengths := &e.lengths[0][posState]
	l := least
	for _, m := range found {
		for ; l <= m.n; l++ {
			e.reach(i+int(l), price+lengths[l]+e.prices.distance(m.distance, int(min(l-minMatch, 3))), i, step{op: op{l, m.distance + 4}})
		}
		if m.n >= least {
			e.behind(i, place, price+lengths[m.n]+e.prices.distance(m.distance, int(min(m.n-minMatch, 3))), n.coding, op{m.n, m.distance + 4}, m.distance)
		}
	}
}

// which returns the price of which of the last distances is repeated, for more than a byte.
func (e *encoder) which(k uint32, state, posState int) uint32 {
	switch k {
	case 0:
		return bitPrice(e.repG0[state], 0) + bitPrice(e.long[state][posState], 1)
	case 1:
		return bitPrice(e.repG0[state], 1) + bitPrice(e.repG1[state], 0)
	}
	return bitPrice(e.repG0[state], 1) + bitPrice(e.repG1[state], 1) + bitPrice(e.repG2[state], k-2)
}

// behind tries a match, the byte after it, and the same distance again.
func (e *encoder) behind(i, place int, price uint32, c coding, o op, distance uint32) {
	end := place + int(o.n)
	if end+2 >= len(e.data) {
		return
	}
	back := end - int(distance) - 1
	if e.data[back+1] != e.data[end+1] || e.data[back+2] != e.data[end+2] {
		return
	}
	c = c.after(o)
	price += bitPrice(e.probs.match[c.state][end&(1<<placeBits-1)], 0) + literalPrice(e.literals(end), e.data[end], true, e.data[back])
	e.again(i, end+1, price, c.after(op{1, literal}), step{first: o, literal: true})
}

// again tries the last distance, at a place that is reached with a price.
func (e *encoder) again(i, place int, price uint32, c coding, s step) {
	back := place - int(c.last[0]) - 1
	limit := min(nice, len(e.data)-place)
	if back < 0 || limit < minMatch {
		return
	}
	length := common(e.data, back, place, 0, limit)
	if length < minMatch {
		return
	}
	posState := place & (1<<placeBits - 1)
	price += bitPrice(e.probs.match[c.state][posState], 1) + bitPrice(e.rep[c.state], 1) + e.which(0, c.state, posState) + e.lengths[1][posState][length]
	s.op = op{uint32(length), 0}
	e.reach(place-e.at+length, price, i, s)
}
