"""The one error for anything a user can mend: one sentence, exit code 2."""


class SettingsError(Exception):
    """Bad input (no ValueError: parsers would catch it and print their own words). The message is one sentence: what, where, what was found, what is needed."""
