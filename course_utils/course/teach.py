"""The commands `class` and `slides`, for teachers. What they need is imported when they run."""

import argparse
from pathlib import Path

from course_utils import ROOT
from course_utils.course.chapters import chapters, writable


def add(commands: argparse._SubParsersAction) -> None:
    """Put both beside the other commands."""
    _class(commands)
    _slides(commands)


def _class(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("class", help="for teachers: what a class needs")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _pack(actions)
    _wheels(actions)


def _pack(actions: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import pack

        target = pack.pack(Path(options.out), options.chapters)
        print(f"{target}: {target.stat().st_size / 1e6:.0f} MB")
        return 0

    action = actions.add_parser("pack", help="one zip: student notebooks, data, set-up")
    action.add_argument("chapters", nargs="*", metavar="CHAPTER")
    action.add_argument("--out", default=str(ROOT / "build" / "class.zip"), metavar="FILE")
    action.set_defaults(do=do)


def _wheels(actions: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import wheels

        print(wheels.collect(writable(Path(options.out))))
        return 0

    action = actions.add_parser(
        "wheels", help="a folder of all packages, from which a room without a network is set up"
    )
    action.add_argument("--out", default=str(ROOT / "build" / "wheels"), metavar="DIR")
    action.set_defaults(do=do)


def _slides(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course.slides import make

        folder = writable(Path(options.out))
        for chapter in chapters(options.chapters):
            print(make.make(chapter, folder))
        return 0

    parser = commands.add_parser(
        "slides", help="a chapter as slides that need no network; S opens the speaker's notes"
    )
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER")
    parser.add_argument("--out", default=str(ROOT / "build" / "slides"), metavar="DIR")
    parser.set_defaults(do=do)
