"""The commands `contribute` and `book`. What they need is imported when they run."""

import argparse
from pathlib import Path


def add(commands: argparse._SubParsersAction) -> None:
    """Put both beside the other commands."""
    _contribute(commands)
    _book(commands)


def _contribute(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils import claims, ledger
        from course_utils.course import atlas, contribute

        source = Path(options.ledger) if options.ledger else ledger.path()
        folder = Path(options.out) if options.out else atlas.FOLDER
        path = contribute.contribute(source, options.name, options.commit, folder)
        kept = atlas.read(path)
        print(f"{path}: {len(kept.rows)} verdicts of {kept.label}, {kept.date}.")
        if left := sorted(set(claims.registry()) - set(kept.rows)):
            print(f"No answer to {len(left)} of {len(claims.registry())}: {', '.join(left)}.")
        print("Look it through, commit this one file, and open a pull request.")
        return 0

    parser = commands.add_parser(
        "contribute", help="check a ledger of your machine and write it for the atlas"
    )
    parser.add_argument("ledger", nargs="?", help="ledger.json of `course run`; your own if absent")
    parser.add_argument("--name", help="of the file, e.g. zen4-vnni-bf16; from the card by default")
    parser.add_argument("--commit", help="of the course that measured; HEAD of this copy if absent")
    parser.add_argument("--out", metavar="DIR", help="datasets/ledgers by default")
    parser.set_defaults(do=do)


def _book(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import atlas
        from course_utils.course.book import make

        out = Path(options.out) if options.out else make.OUT
        print(make.make(out, Path(options.ledgers) if options.ledgers else atlas.FOLDER))
        return 0

    parser = commands.add_parser("book", help="make the book: the chapters, the atlas, Guess first")
    parser.add_argument("--out", metavar="DIR", help="build/book by default")
    parser.add_argument("--ledgers", metavar="DIR", help="datasets/ledgers by default")
    parser.set_defaults(do=do)
