"""The `grade` command."""

import argparse
from pathlib import Path

from course_utils.course.chapters import UsageError


def add(commands: argparse._SubParsersAction) -> None:
    """Put `grade` beside the other commands."""

    def do(options: argparse.Namespace) -> int:
        from course_utils.course.grading import grade
        from course_utils.course.grading.walls import Limits

        if options.seconds < 1 or (options.jobs is not None and options.jobs < 1):
            raise UsageError("--seconds and --jobs must be 1 or more.")
        limits = Limits(cpu=options.seconds, wall=2.5 * options.seconds)
        result = grade.grade(
            Path(options.submissions),
            Path(options.out),
            options.chapters,
            limits=limits,
            slots=options.jobs,
            seed=options.seed,
        )
        print(grade.table(result))
        return 0

    parser = commands.add_parser(
        "grade", help="for teachers: judge what a class handed in, and write grades and feedback"
    )
    parser.add_argument("submissions", metavar="SUBMISSIONS", help="a folder or zip")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--chapters", nargs="+", metavar="CHAPTER", help="those handed in")
    parser.add_argument("--seconds", type=float, default=60, help="of processor an exercise, 60")
    parser.add_argument("--jobs", type=int, help="learners at once; as many as cores")
    parser.add_argument("--seed", type=int, help="of the checks' draws; a new one by default")
    parser.set_defaults(do=do)
