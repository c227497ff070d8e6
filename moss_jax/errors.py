"""The one error that people are meant to read."""


class MossError(ValueError):
    """Bad input, told in one line: what is wrong, where, and what would be right.

    Further lines may follow (a list of tensor names, say). Programmers catch it; the command line prints it on stderr
    and exits with code 2. Anything else that escapes is a bug of ours and keeps its traceback.
    """
