"""What Ray's errors say, in one line: theirs hold the traceback of another process."""


def last_line(error: Exception) -> str:
    """The last line of an error's message, or its name."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
