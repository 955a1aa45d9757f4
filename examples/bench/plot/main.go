// Command plot draws the measurements of results.csv: files.svg, the time to make an image against the number of its files,
// and bytes.svg, the time to read a tree against its size. It works in the directory where results.csv is.
package main

import (
	"cmp"
	"encoding/csv"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
)

// measurement is a line of results.csv.
type measurement struct {
	what, program string
	size, seconds float64
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

func run() error {
	all, err := load("results.csv")
	if err != nil {
		return err
	}
	if err := draw("files.svg", "An image from a dumpfile", "files", "s", plain, all, "image from a dumpfile, files"); err != nil {
		return err
	}
	return draw("bytes.svg", "A tree of random content, sha512", "size of the tree", "s", binary, all, "digest of random content", "import of random content")
}

func load(path string) ([]measurement, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines, err := csv.NewReader(f).ReadAll()
	if err != nil || len(lines) == 0 {
		return nil, fmt.Errorf("%s: %d lines, %v", path, len(lines), err)
	}
	var all []measurement
	for k, fields := range lines[1:] { // what, size, program, seconds, peak
		size, err1 := strconv.ParseFloat(fields[1], 64)
		seconds, err2 := strconv.ParseFloat(fields[3], 64)
		if err := cmp.Or(err1, err2); err != nil {
			return nil, fmt.Errorf("%s: line %d: %w", path, k+2, err)
		}
		all = append(all, measurement{fields[0], fields[2], size, seconds})
	}
	return all, nil
}

// draw makes a drawing of the measurements of these names, one line for each program.
func draw(path, title, x, y string, ticks func(min, max float64) []plot.Tick, all []measurement, names ...string) error {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker, p.Y.Tick.Marker = plot.TickerFunc(ticks), plot.TickerFunc(plain)
	p.Legend.Top, p.Legend.Left = true, true
	p.Add(plotter.NewGrid())
	for dash, name := range names {
		var programs []string
		points := map[string]plotter.XYs{}
		for _, m := range all {
			if m.what == name {
				if points[m.program] == nil {
					programs = append(programs, m.program)
				}
				points[m.program] = append(points[m.program], plotter.XY{X: m.size, Y: m.seconds})
			}
		}
		for k, program := range programs {
			slices.SortFunc(points[program], func(a, b plotter.XY) int { return cmp.Compare(a.X, b.X) })
			line, marks, err := plotter.NewLinePoints(points[program])
			if err != nil {
				return err
			}
			line.Width, line.Color, line.Dashes = vg.Points(1.5), plotutil.Color(k), plotutil.Dashes(dash)
			marks.Color, marks.Shape = plotutil.Color(k), plotutil.Shape(k)
			p.Add(line, marks)
			label := program
			if len(names) > 1 {
				verb, _, _ := strings.Cut(name, " ")
				label = verb + ", " + program
			}
			p.Legend.Add(label, line, marks)
		}
	}
	// Whole decades on the axis of time.
	p.Y.Min, p.Y.Max = math.Pow(10, math.Floor(math.Log10(p.Y.Min))), math.Pow(10, math.Ceil(math.Log10(p.Y.Max)))
	return p.Save(16*vg.Centimeter, 11*vg.Centimeter, path)
}

// plain has a mark at every power of ten.
func plain(low, high float64) (ticks []plot.Tick) {
	for n := math.Floor(math.Log10(low)); n <= math.Ceil(math.Log10(high)); n++ {
		v := math.Pow(10, n)
		label := strconv.FormatFloat(v, 'f', -1, 64)
		for k := len(label) - 3; k > 0 && v >= 1000; k -= 3 {
			label = label[:k] + "," + label[k:]
		}
		ticks = append(ticks, plot.Tick{Value: v, Label: label})
	}
	return ticks
}

// binary has a mark at every fourth power of two.
func binary(low, high float64) (ticks []plot.Tick) {
	for v := low; v <= high*1.01; v *= 4 {
		label := fmt.Sprintf("%.0f MiB", v/(1<<20))
		if v >= 1<<30 {
			label = fmt.Sprintf("%.0f GiB", v/(1<<30))
		}
		ticks = append(ticks, plot.Tick{Value: v, Label: label})
	}
	return ticks
}
