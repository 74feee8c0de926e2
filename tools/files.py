"""Files that the tools read and write, by the rules of the library.

Inputs are regular files: a pipe, a device or a folder in their place is an error, not a wait.  An
output has another name until it is whole, and is never one of the inputs.
"""
import contextlib
import errno
import os
import secrets
import stat


class ConvertError(Exception):
    """What is wrong with a file, in one line for a person."""


NAME_BYTES = 200                 # of a name that its unfinished file keeps: systems allow 255
KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"),
         (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))

inputs = {}                      # (device, inode) of the files opened to be read: their paths


def shown(value, n=80):
    """A value of a file, for a message: its first n characters."""
    try:
        return repr(value)[:n]
    except (RecursionError, ValueError):                 # nested too deeply, too many digits
        return type(value).__name__


def line(text, n=600):
    """Text with names of a file in it as one line that a terminal takes."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode()
                   for c in text[:n + 1])
    return text if len(text) <= n else text[:n] + "..."


def print_any(stream):
    """What the stream's encoding does not have is escaped, as on stderr."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _check_regular(path, info):
    if not stat.S_ISREG(info.st_mode):
        kind = next((name for is_one, name in KINDS if is_one(info.st_mode)), "something else")
        raise ConvertError("%s: found %s, expected a regular file" % (path, kind))


def open_input(path):
    """A regular file, open to read bytes."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    # Opening a pipe that nobody writes into would wait.
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        fd = os.open(path, flags)
    except (OSError, ValueError) as e:
        raise ConvertError("%s: cannot read: %s" % (path, getattr(e, "strerror", None) or e))
    try:
        info = os.fstat(fd)
        _check_regular(path, info)
        inputs[info.st_dev, info.st_ino] = path
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_input(path, max_bytes):
    """All bytes of a regular file that has at most max_bytes of them."""
    with open_input(path) as f:
        try:
            data = f.read(max_bytes + 1)
        except OSError as e:
            raise ConvertError("%s: cannot read: %s" % (path, e.strerror))
    if len(data) > max_bytes:
        raise ConvertError("%s: found %d bytes, expected at most %d"
                           % (path, os.path.getsize(path), max_bytes))
    return data


def read_text(path, max_bytes):
    """The same as text: UTF-8, lines end with a newline."""
    try:
        return read_input(path, max_bytes).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as e:
        raise ConvertError("%s: not valid UTF-8: %s" % (path, e))


class Output:
    """A binary file to write, for a `with` statement, which gives the open file.

    Whatever leaves the block early, Ctrl-C too, removes what was written, and what stood under the
    path stays.  A link is followed: the file that it leads to is replaced.  Its mode is kept.
    """

    def __init__(self, path):
        self.path, self.target = path, os.path.realpath(path)
        self.file = self.part = self.old = None
        try:
            self.old = os.stat(self.target)
        except FileNotFoundError:
            return
        except OSError as e:
            self._fail(e)
        _check_regular(path, self.old)
        source = inputs.get((self.old.st_dev, self.old.st_ino))
        if source is not None:
            raise ConvertError("%s: found the input %s there, expected another file"
                               % (path, source))
        effective = os.access in os.supports_effective_ids
        if not os.access(self.target, os.W_OK, effective_ids=effective):
            raise ConvertError("%s: cannot write: %s" % (path, os.strerror(errno.EACCES)))

    def _fail(self, e):
        raise ConvertError("%s: cannot write: %s" % (self.path, e.strerror or e))

    def __enter__(self):
        folder, name = os.path.split(self.target)
        stem = os.fsencode(name)[:NAME_BYTES].decode("utf-8", "ignore")
        self.part = os.path.join(folder, "%s.%s.part" % (stem, secrets.token_hex(8)))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        try:
            fd = os.open(self.part, flags, 0o666 if self.old is None else 0o600)
            self.file = os.fdopen(fd, "wb")
            self._keep_mode(fd)
        except OSError as e:
            self._discard()
            self._fail(e)
        except BaseException:
            # Ctrl-C may come when the file is there and nothing else knows of it.
            self._discard()
            raise
        return self.file

    def _keep_mode(self, fd):
        if self.old is None or not hasattr(os, "fchmod"):
            return
        with contextlib.suppress(PermissionError):       # only root may give files away
            os.fchown(fd, self.old.st_uid, self.old.st_gid)
        os.fchmod(fd, self.old.st_mode & 0o777)

    def __exit__(self, kind, error, _):
        try:
            if error is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.part, self.target)
        except OSError as e:
            self._discard()
            self._fail(e)
        except BaseException:
            self._discard()
            raise
        if error is None:
            sync_folder(os.path.dirname(self.target))
            return
        self._discard()
        if isinstance(error, OSError) and error.filename is None:
            self._fail(error)

    def _discard(self):
        with contextlib.suppress(OSError):               # what cannot be written is not wanted
            if self.file is not None:
                self.file.close()
        with contextlib.suppress(FileNotFoundError):
            os.remove(self.part)


def sync_folder(path):
    """Let the new name of a file outlive a power failure, where a folder can be opened for that.
    The file is whole either way."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
