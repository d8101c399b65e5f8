"""Links that open the course in Colab and Binder, made from the one setting in pyproject.toml."""

import re

from course_utils import ROOT
from course_utils.course.chapters import UsageError, chapters

START, END = "<!-- badges -->", "<!-- /badges -->"
COLAB = "https://colab.research.google.com/github/{repo}/blob/main/notebooks/{name}.ipynb"
BINDER = "https://mybinder.org/v2/gh/{repo}/HEAD?urlpath=lab/tree/notebooks/{name}.ipynb"


def stamp(repo: str) -> None:
    """Write `repo` into pyproject.toml and the links into README.md. The notebooks take them from
    there when they are built again.
    """
    if repo and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(
            f"--repo is {repo!r}; it must be OWNER/NAME, as GitHub spells it, or '' for none."
        )
    settings = ROOT / "pyproject.toml"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(
        re.sub(r'(?m)^repository = ".*"$', f'repository = "{repo}"', text), encoding="utf-8"
    )
    readme = ROOT / "README.md"
    parts = re.split(
        f"({re.escape(START)}.*?{re.escape(END)})", readme.read_text(encoding="utf-8"), flags=re.S
    )
    if len(parts) != 3:
        raise UsageError(f"README.md must hold {START} … {END} once.")
    readme.write_text(parts[0] + START + links(repo) + END + parts[2], encoding="utf-8")


def links(repo: str, name: str | None = None) -> str:
    """Markdown links for one chapter, or for the first one; nothing without a repository."""
    if not repo:
        return ""
    name = name or chapters()[0].name
    colab, binder = COLAB.format(repo=repo, name=name), BINDER.format(repo=repo, name=name)
    return f"[Open in Colab]({colab}) · [Open in Binder]({binder})"
