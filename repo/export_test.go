package repo

// SetNoUnnamed makes imports do without unnamed files, until the function it returns is called.
func SetNoUnnamed(v bool) (restore func()) {
	old := noUnnamed
	noUnnamed = v
	return func() { noUnnamed = old }
}
