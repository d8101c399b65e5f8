"""The `course` command."""

import argparse
import contextlib
import json
import os
import select
import sys
from pathlib import Path

from course_utils import ROOT
from course_utils.course import publish, teach
from course_utils.course.chapters import (
    EDITIONS,
    NOTEBOOKS,
    PROFILES,
    UsageError,
    chapters,
    one_of,
    writable,
)
from course_utils.course.grading import command


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 something failed, 2 something asked for does not exist, 130
    interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="course", description="Efficient Deep Learning, Measured."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parts = (_doctor, _selftest, _lab, _reset, _progress, _check, _build, _run, _report, _data)
    for add in (*parts, teach.add, command.add, publish.add, _badges):
        add(commands)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "lab":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        status = options.do(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _reader_is_gone():
            raise  # another pipe broke, one of a child say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        return 1
    except UsageError as error:
        print(f"course {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"course {options.command}: interrupted; what was finished is whole.", file=sys.stderr
        )
        return 130


def _reader_is_gone() -> bool:
    """Whether nobody can read what is printed any more (`course doctor | head -3`)."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, or no poll
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    return False


def _doctor(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import doctor

        found = doctor.examine()
        print(json.dumps(found, indent=2) if options.json else doctor.text(found))
        return 1 if found["problems"] else 0

    parser = commands.add_parser(
        "doctor", help="what this machine can do, what will be skipped, what is broken"
    )
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(do=do)


def _selftest(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import selftest

        return 0 if selftest.run()["passed"] else 1

    parser = commands.add_parser(
        "selftest", help="does the instrument keep its promise here? A minute or two, nothing else"
    )
    parser.set_defaults(do=do)


def _lab(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        first, root = _opened(options.update_only), ROOT
        if options.update_only:
            return 0
        if not first.is_relative_to(root):
            root = first.parent
        command = [
            sys.executable,
            "-m",
            "jupyter",
            "lab",
            "--ip=127.0.0.1",
            f"--ServerApp.root_dir={root}",
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--allow-root")
        os.chdir(root)
        command.append(f"--LabApp.default_url=/lab/tree/{first.relative_to(root).as_posix()}")
        os.execv(sys.executable, [*command, *options.rest])

    parser = commands.add_parser(
        "lab",
        help="copy the chapters into workbook/, keep what you wrote there, and open them in"
        " JupyterLab (further options go to jupyter lab)",
    )
    parser.add_argument("--update-only", action="store_true", help="copy, and open nothing")
    parser.set_defaults(do=do)


def _opened(strict: bool) -> Path:
    """The first chapter of the reader's workbook, brought up to date; where that can't be written,
    the shipped one.
    """
    from course_utils.course import workbook

    shipped = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not shipped:
        raise UsageError("notebooks/ is empty; build the chapters with: course build")
    try:
        changes = workbook.update(shipped)
    except UsageError as error:
        if strict:
            raise
        print(f"{error} What you write in notebooks/ is not kept apart.", file=sys.stderr)
        return shipped[0]
    for change in changes:
        if change.what != "unchanged":
            print(change)
    print(f"Your copy: {workbook.FOLDER}")
    return workbook.FOLDER / shipped[0].name


def _reset(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import workbook

        for chapter in chapters(options.chapters):
            kept = workbook.reset(chapter.learner)
            old = f"; your old copy lies in {kept}" if kept else ""
            print(f"{chapter.name}: fresh{old}")
        return 0

    parser = commands.add_parser(
        "reset", help="put a fresh copy of a chapter into your workbook and keep the old one"
    )
    parser.add_argument("chapters", nargs="+", metavar="CHAPTER")
    parser.set_defaults(do=do)


def _progress(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils import ledger
        from course_utils.course import progress, workbook

        rows = progress.gather(chapters(), workbook.FOLDER, ledger.events())
        print(progress.table(rows))
        print(progress.write(writable(workbook.FOLDER), rows))
        return 0

    parser = commands.add_parser(
        "progress", help="how far you are: cells run, predictions, exercises, verdicts"
    )
    parser.set_defaults(do=do)


def _check(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import check

        wrong = False
        for path in check.notebooks(options.notebooks):
            print(path.name)
            for result in check.check(path):
                print(f"  {result!r}", flush=True)
                wrong = wrong or result.status == "wrong"
        return 1 if wrong else 0

    parser = commands.add_parser(
        "check", help="check the answers in your notebooks without opening them"
    )
    parser.add_argument("notebooks", nargs="*", metavar="CHAPTER|FILE.ipynb")
    parser.set_defaults(do=do)


def _build(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import build
        from course_utils.course import edition as pages

        wanted = chapters(options.chapters)
        edition = one_of(options.edition, EDITIONS, "edition")
        profile = one_of(options.profile, PROFILES, "profile")
        default = NOTEBOOKS if edition == "learner" else ROOT / "build" / edition
        folder = writable(Path(options.out) if options.out else default)
        if edition == "learner" and not (options.mix or options.out or options.keep_outputs):
            pages.refuse_a_mixture(wanted)
        for chapter in wanted:
            if edition == "learner":
                path = build.write_learner(
                    chapter, profile, keep_outputs=options.keep_outputs, folder=folder
                )
            else:
                path = build.write(chapter, edition, folder)
            print(path)
        return 0

    parser = commands.add_parser(
        "build", help="make an edition of the notebooks from their sources"
    )
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER")
    parser.add_argument("--edition", default="learner", help=", ".join(EDITIONS))
    parser.add_argument(
        "--profile", default="fast", help="of the learner edition, which is executed"
    )
    parser.add_argument(
        "--keep-outputs", action="store_true", help="execute only chapters whose code changed"
    )
    parser.add_argument(
        "--mix", action="store_true", help="although other chapters were built on another machine"
    )
    parser.add_argument("--out", metavar="DIR")
    parser.set_defaults(do=do)


def _run(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import run

        wanted = chapters(options.chapters)
        profile = one_of(options.profile, PROFILES, "profile")
        edition = one_of(options.edition, EDITIONS, "edition")
        folder = writable(Path(options.out))
        outcomes = run.run(wanted, profile, edition, folder)
        _write_json(folder / "ledger.json", run.ledger(outcomes, profile))
        print(run.table(outcomes))
        return 1 if any(o.error for o in outcomes) else 0

    parser = commands.add_parser(
        "run", help="execute chapters from end to end; writes notebooks and ledger.json"
    )
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER")
    parser.add_argument(
        "--profile", default=os.environ.get("COURSE_PROFILE", "fast"), help=", ".join(PROFILES)
    )
    parser.add_argument(
        "--edition", default="instructor", help="instructor (exercises solved), learner or student"
    )
    parser.add_argument("--out", default=str(ROOT / "build" / "run"), metavar="DIR")
    parser.set_defaults(do=do)


def _report(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils import ledger
        from course_utils.course import report, room

        folder = writable(Path(options.out))
        if options.room:
            if options.ledgers:
                raise UsageError("either --class FOLDER or ledgers, not both.")
            print(room.write(Path(options.room), folder))
            return 0
        ledgers = [Path(p) for p in options.ledgers] or [ledger.path()]
        for path in report.report(ledgers, folder):
            print(path)
        return 0

    parser = commands.add_parser(
        "report", help="one page and one picture from the ledgers of one or many machines"
    )
    parser.add_argument("ledgers", nargs="*", metavar="LEDGER", help="your own by default")
    parser.add_argument(
        "--class",
        dest="room",
        metavar="DIR|ZIP",
        help="of a room: what learners handed in, as `course grade` takes it; writes class.html",
    )
    parser.add_argument("--out", default=str(ROOT / "build" / "report"), metavar="DIR")
    parser.set_defaults(do=do)


def _data(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils import data

        if not options.full:
            raise UsageError(
                "the embedded data need no fetching; the whole data set comes with: course data"
                " --full"
            )
        try:
            added = data.fetch_full()
        except (data.DataError, OSError) as error:
            print(f"course data: {error}", file=sys.stderr)
            return 1
        print(
            f"{len(added)} files added, the others were there and whole."
            if added
            else "All four files are there and whole."
        )
        return 0

    parser = commands.add_parser("data", help="fetch all 70,000 images of Fashion-MNIST (30 MB)")
    parser.add_argument("--full", action="store_true")
    parser.set_defaults(do=do)


def _badges(commands: argparse._SubParsersAction) -> None:
    def do(options: argparse.Namespace) -> int:
        from course_utils.course import badges, build

        badges.stamp(options.repo)
        for chapter in chapters():
            if chapter.learner.is_file():
                build.write_learner(chapter, "fast", keep_outputs=True)
        return 0

    parser = commands.add_parser(
        "badges", help="stamp Colab and Binder links into README and notebooks"
    )
    parser.add_argument(
        "--repo",
        required=True,
        metavar="OWNER/NAME",
        help="the repository on GitHub; '' removes the links",
    )
    parser.set_defaults(do=do)


def _write_json(path: Path, value: object) -> None:
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
