"""The one exception for what a user can put right."""


class UserError(Exception):
    """One clear sentence: the option or file, what was given, what is allowed. The CLI prints it and exits with 2.

    Anything else that goes wrong is a bug and keeps its traceback.
    """
