"""The one error for anything a user can mend: one sentence, exit code 2."""


class SettingsError(Exception):
    """Bad input. The message is one sentence: what, where, what was found, what is needed.

    No ValueError: parsers catch those, and print them in words of their own.
    """
