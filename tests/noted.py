"""What functions of the tests were called with, in what a cache does not look at."""

import logging


class Calls(logging.Logger):
    """What was noted, one after the other."""

    def __init__(self):
        super().__init__("calls")
        self.noted = []

    def append(self, what):
        self.noted.append(what)

    def clear(self):
        self.noted.clear()

    def __len__(self):
        return len(self.noted)

    def __eq__(self, other):
        return self.noted == other

    __hash__ = logging.Logger.__hash__


CALLS = Calls()
