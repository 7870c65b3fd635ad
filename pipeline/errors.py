"""The one exception for what a user can put right."""

import errno

NOT_WRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO}


class UserError(Exception):
    """One clear sentence: the option or file, what was given, what is allowed. The CLI prints it and exits with 2.

    Anything else that goes wrong is a bug and keeps its traceback.
    """


def for_the_user(error: BaseException, where: str) -> UserError | None:
    """What the machine lacks, in a sentence: disk or memory. None for any other error. where: what was being done."""
    if isinstance(error, UserError):
        return error
    doing = where[:1].upper() + where[1:]
    if isinstance(error, OSError) and error.errno in NOT_WRITTEN:
        return UserError(f"{doing}: {error.filename or 'a file'} cannot be written: {error.strerror}; what is finished stays. Make room, and the same command goes on.")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return UserError(f"{doing}: out of memory ({' '.join(str(error).split())[:200]}); what is finished stays. With more actors or GPUs, fewer --dataset-size "
                         "windows, or --activations host or disk, the same command goes on.")
    return None
