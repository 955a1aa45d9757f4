package disk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// features are those of the file system: what mke2fs sets for ext4 by default since 1.43, but for the journal, and verity. None
// of it is newer than the kernels that can boot composefs. They are named in full since defaults change, and hosts change them.
const features = "none,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super," +
	"large_file,huge_file,dir_nlink,extra_isize,metadata_csum,verity"

// toolEnv is the whole environment of the tools. libext2fs takes every time from the first variable (from 1.47.1 on from
// the second, too), and no configuration file of the host is read.
func (p *Plan) toolEnv() []string {
	now := strconv.FormatInt(p.layout.Time.Unix(), 10)
	return []string{"E2FSPROGS_FAKE_TIME=" + now, "SOURCE_DATE_EPOCH=" + now, "MKE2FS_CONFIG=/dev/null", "LC_ALL=C"}
}

// mke2fs makes the empty file system in its place in the image. The storage is all zeros: writing them would only make
// the image less sparse.
func (p *Plan) mke2fs(ctx context.Context, out *os.File) error {
	tool, err := findTool("mke2fs")
	if err != nil {
		return err
	}
	seed, size := p.layout.Seed, p.Root.Size
	journal := []string{"-J", fmt.Sprintf("size=%d", journalSize(size)>>20), "-O", features + ",has_journal"}
	if journalSize(size) == 0 {
		journal = []string{"-O", features}
	}
	cmd := exec.CommandContext(ctx, tool, append(journal, "-q", "-F", "-b", strconv.Itoa(blockSize), "-I", strconv.Itoa(inodeSize),
		"-m", "0", "-N", fmt.Sprint(inodeCount(size, int64(len(p.nodes)))),
		"-U", ID(seed, RootFilesystem), "-L", p.layout.Root.Label,
		"-E", fmt.Sprintf("offset=%d,hash_seed=%s,root_owner=0:0,nodiscard,lazy_itable_init=0,lazy_journal_init=0,"+
			"assume_storage_prezeroed=1", p.Root.Offset, ID(seed, rootHashSeed)),
		"/dev/fd/3", fmt.Sprint(size/blockSize))...)
	cmd.Env = p.toolEnv()
	cmd.ExtraFiles = []*os.File{out}
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mke2fs: %w: %s", err, bytes.TrimSpace(text))
	}
	return nil
}

// debugfs is a running debugfs that takes commands. It carries them out one after the other while the caller goes on.
type debugfs struct {
	cmd    *exec.Cmd
	in     *os.File
	out    *bufio.Writer
	copied chan struct{} // gets a value for every file that was written
	ended  chan struct{} // closed when debugfs told its last line
	failed error         // what it complained about first; to be read after ended
}

// stageName is the path at which debugfs finds a stage.
func stageName(k int) string { return fmt.Sprintf("/dev/fd/%d", 4+k) }

// startDebugfs starts debugfs on the root file system in out. There must not be more writes that were not waited for than
// there are stages.
func (p *Plan) startDebugfs(ctx context.Context, out *os.File, stages []*os.File) (*debugfs, error) {
	tool, err := findTool("debugfs")
	if err != nil {
		return nil, err
	}
	d := &debugfs{copied: make(chan struct{}, len(stages)), ended: make(chan struct{})}
	d.cmd = exec.CommandContext(ctx, tool, "-w", "-f", "-", fmt.Sprintf("/dev/fd/3?offset=%d", p.Root.Offset))
	d.cmd.Env = p.toolEnv()
	d.cmd.ExtraFiles = append([]*os.File{out}, stages...)
	commands, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	answers, stdout, err := os.Pipe()
	if err != nil {
		commands.Close()
		in.Close()
		return nil, err
	}
	// One pipe for both, so that a complaint comes after the echo of its command.
	d.cmd.Stdin, d.cmd.Stdout, d.cmd.Stderr = commands, stdout, stdout
	err = d.cmd.Start()
	commands.Close()
	stdout.Close()
	if err != nil {
		in.Close()
		answers.Close()
		return nil, err
	}
	d.in, d.out = in, bufio.NewWriter(in)
	go d.listen(answers)
	return d, nil
}

// listen reads what debugfs prints: "debugfs: " and the command before it is carried out, and complaints. It does not stop
// on a bad command, and old ones exit with 0 nevertheless. That a file is copied shows only in the next command: the
// inode's number comes before the copying.
func (d *debugfs) listen(answers *os.File) {
	defer close(d.ended)
	defer answers.Close()
	lines := bufio.NewScanner(answers)
	command := ""
	for lines.Scan() {
		line := lines.Text()
		echo, isEcho := strings.CutPrefix(line, "debugfs: ")
		switch {
		case d.failed != nil:
		case isEcho:
			if strings.HasPrefix(command, "write ") {
				d.copied <- struct{}{}
			}
			command = echo
		case strings.HasPrefix(line, "Allocated inode: "), strings.HasPrefix(line, "debugfs 1."): // what it always says
		default:
			d.failed = fmt.Errorf("debugfs: %s: %s", command, strings.TrimSpace(line))
			d.in.Close() // the sender must not go on
		}
	}
	if err := lines.Err(); err != nil && d.failed == nil {
		d.failed = fmt.Errorf("debugfs: %w", err)
		d.in.Close()
	}
	io.Copy(io.Discard, answers)
}

// maxCommand is the longest line that debugfs reads at once, less something.
const maxCommand = 8000

// do sends a command. Arguments are quoted. An error of the command is returned by this or a later call.
func (d *debugfs) do(command string, args ...string) error {
	line := []byte(command)
	for _, a := range args {
		line = append(line, ` "`...)
		line = append(line, strings.ReplaceAll(a, `"`, `""`)...)
		line = append(line, '"')
	}
	if len(line) > maxCommand {
		return fmt.Errorf("debugfs: %s of %.80q...: longer than %d bytes", command, args[0], maxCommand)
	}
	if _, err := d.out.Write(append(line, '\n')); err != nil {
		return d.died(err)
	}
	return nil
}

// wait waits until the oldest write command that was not waited for is done. Another command must have come after it.
func (d *debugfs) wait() error {
	select {
	case <-d.copied:
		return nil
	case <-d.ended:
		return d.died(io.ErrUnexpectedEOF)
	}
}

// died returns why commands cannot be sent any more.
func (d *debugfs) died(err error) error {
	d.in.Close()
	<-d.ended
	if d.failed != nil {
		return d.failed
	}
	return fmt.Errorf("debugfs: ended early: %w", err)
}

// close lets debugfs finish the file system and end. It must be called once, also after errors.
func (d *debugfs) close() error {
	flushed := d.out.Flush()
	if err := d.in.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	<-d.ended
	err := d.cmd.Wait()
	if d.failed != nil {
		return d.failed
	}
	return errors.Join(flushed, err)
}
