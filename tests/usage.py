"""A command that is typed wrongly."""

from collections.abc import Callable


def refused(main: Callable[[list[str]], int], typed: list[str], capsys) -> str:
    """What a command says on the error stream, which must be one line, beside a bad exit code and nothing else."""
    try:
        code = main(typed)
    except SystemExit as e:  # argparse's own way out
        code = e.code
    out, err = capsys.readouterr()
    assert code not in (0, None)
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    return err
