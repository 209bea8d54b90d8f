"""The one exception a user sees: what is wrong, with the value seen, and what to do about it."""


class Error(Exception):
    """`problem` is one sentence with the offending value in it; `fix` is one sentence that says what to do. Both name
    settings in backticks, as Python has them; see `spelling`."""

    def __init__(self, problem: str, fix: str = ""):
        super().__init__(f"{problem} {fix}".strip())
        self.problem, self.fix = problem, fix
