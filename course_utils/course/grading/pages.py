"""The class and each learner as pages that need nothing from elsewhere."""

import html
import re
from collections import defaultdict

STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--line:#bbb;--soft:#555}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#161616;--line:#555;--soft:#b5b5b5}}
body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;
color:var(--ink);background:var(--paper)}
a{color:inherit}table{border-collapse:collapse}.wide{overflow-x:auto}
td,th{border:1px solid var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font:inherit}small{color:var(--soft)}
.passed{background:#d9f0d3;color:#0b3d16}.wrong{background:#fddbc7;color:#67001f}
.none{background:#e8e8e8;color:#333}.error{background:#e7d4e8;color:#40004b}
"""
_CLASS = {"passed": "passed", "wrong": "wrong", "not attempted": "none", "error": "error"}
_MARK = {"passed": "✓", "wrong": "✗", "not attempted": "–", "error": "!"}


def page(title: str, body: str) -> str:
    """A whole page; `title` is plain text, `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def feedback(row: dict) -> str:
    """What one learner is told: each exercise, its status, and the check's message, which ends in
    the smallest case that fails.
    """
    e = html.escape
    count = len(row["exercises"])
    body = f"<p>{row['passed']} of {count} exercises passed.</p>"
    body += "<table><thead><tr><th scope='col'>exercise</th><th scope='col'>status</th>"
    body += "<th scope='col'>what the check says</th></tr></thead><tbody>"
    for name, outcome in row["exercises"].items():
        status, said = outcome["status"], f"<pre>{e(outcome['message'])}</pre>"
        if outcome.get("printed"):
            said += f"<details><summary>your code printed</summary><pre>{e(outcome['printed'])}"
            said += "</pre></details>"
        body += f"<tr><th scope='row'>{e(name)}</th>"
        body += f"<td class='{_CLASS[status]}'>{status}</td><td>{said}</td></tr>"
    body += "</tbody></table>"
    if row["flags"]:
        body += "<h2>What was odd</h2><ul>"
        body += "".join(f"<li>{e(flag)}</li>" for flag in row["flags"]) + "</ul>"
    return page(f"Feedback for {row['name']}", body)


def overview(result: dict) -> str:
    """The class: a map of learners × exercises, the commonest wrong messages, who is flagged."""
    body = f"<p>{len(result['learners'])} learners, {len(result['exercises'])} exercises. Seed"
    body += f" {result['seed']}.</p>"
    if result["walls_missing"]:
        body += f"<p><b>On this machine {html.escape('; '.join(result['walls_missing']))}.</b></p>"
    return page("The class", body + _map(result) + _messages(result) + _flagged(result))


def _map(result: dict) -> str:
    e = html.escape
    legend = ", ".join(f"{mark} {status}" for status, mark in _MARK.items())
    out = f"<h2>Who passed what</h2><p>{legend}.</p><div class='wide'><table><thead><tr>"
    out += "<th scope='col'>learner</th>"
    out += "".join(f"<th scope='col'>{e(n)}</th>" for n in result["exercises"])
    out += "<th scope='col'>passed</th></tr></thead><tbody>"
    for row in result["learners"]:
        out += f"<tr><th scope='row'><a href='feedback/{e(row['key'], quote=True)}.html'>"
        out += f"{e(row['name'])}</a></th>"
        for name in result["exercises"]:
            status = row["exercises"][name]["status"]
            told = f"<td class='{_CLASS[status]}' title='{e(name)}: {status}'>"
            out += told + f"<span aria-label='{status}'>{_MARK[status]}</span></td>"
        out += f"<td>{row['passed']}</td></tr>"
    return out + "</tbody></table></div>"


def _messages(result: dict) -> str:
    rows = commonest(result)
    if not rows:
        return "<h2>The commonest wrong answers</h2><p>None.</p>"
    out = "<h2>The commonest wrong answers</h2><table><thead><tr><th scope='col'>exercise</th>"
    out += "<th scope='col'>learners</th><th scope='col'>the misconception</th>"
    out += "<th scope='col'>one of the messages</th></tr></thead><tbody>"
    for name, count, belief, message in rows:
        out += f"<tr><th scope='row'>{html.escape(name)}</th><td>{count}</td>"
        out += f"<td>{html.escape(belief)}</td><td><pre>{html.escape(message)}</pre></td></tr>"
    return out + "</tbody></table>"


def commonest(result: dict, most: int = 20) -> list[tuple[str, int, str, str]]:
    """(exercise, how many learners, misconception, a message) of wrong answers, the commonest
    first. Messages that differ in their numbers only are one.
    """
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in result["learners"]:
        for name, outcome in row["exercises"].items():
            if outcome["status"] == "wrong":
                text = outcome["message"]
                groups[name, misconception(text) or alike(text)].append(text)
    found = [
        (name, len(texts), misconception(texts[0]), min(texts, key=lambda t: (len(t), t)))
        for (name, _), texts in groups.items()
    ]
    return sorted(found, key=lambda f: (-f[1], f[0], f[3]))[:most]


def alike(message: str) -> str:
    """The message without what differs from draw to draw: its numbers, and how many there were."""
    return re.sub(r"[-−]?#(?:[,\s]+[-−]?#)*", "#", re.sub(r"\d[\d.,e+-]*\b|\bnan\b", "#", message))


def misconception(message: str) -> str:
    """What the check believes that the learner believes: the message's last sentence, where it
    says something that is no number; empty where it names none.
    """
    sentences = re.split(r"(?<=[.?!])\s+", message.strip())
    last = sentences[-1] if len(sentences) > 1 else ""
    return last if re.fullmatch(r"[A-Z][^\d]{8,200}[.?!]", last) else ""


def _flagged(result: dict) -> str:
    rows = [row for row in result["learners"] if row["flags"]]
    out = "<h2>Flagged</h2>"
    if result["flags"]:
        out += f"<ul>{''.join(f'<li>{html.escape(flag)}</li>' for flag in result['flags'])}</ul>"
    if not rows:
        return f"{out}<p>No learner.</p>"
    out += "<table><thead><tr><th scope='col'>learner</th>"
    out += "<th scope='col'>what was odd</th></tr></thead><tbody>"
    for row in rows:
        told = "<br>".join(html.escape(flag[:300]) for flag in row["flags"][:20])
        out += f"<tr><th scope='row'>{html.escape(row['name'])}</th><td>{told}</td></tr>"
    return out + "</tbody></table>"
