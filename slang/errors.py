"""The one error that a person can mend: what is wrong, where, and what to do, in one line."""


class UserError(Exception):
    """`str()` is the whole message, such as `data/train.jsonl: not there; run make_jsonl.py first`."""
