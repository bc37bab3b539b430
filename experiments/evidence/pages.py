"""What every HTML page of ours shares: one palette, one style sheet, and where its numbers come from."""

import shlex
import sys
from datetime import datetime

from .record import device, versions

INK, ACCENT, SOFT = "#1f2933", "#0b7285", "#adb5bd"
COLOURS = (ACCENT, "#e8590c", "#5f3dc4", "#2b8a3e", "#c2255c", "#1971c2", "#a0522d", "#495057")
"""Told apart by people with any colour vision only together with MARKERS or LINES, which change after eight."""
# shapes and dashes that stay distinct at 4 points and in grey
MARKERS, LINES = ("o", "s", "^", "D", "v"), ("-", "--", ":", "-.", (0, (5, 1, 1, 1)))
STYLE = """
:root { --ink: #1f2933; --soft: #66788a; --rule: #dde3e8; --accent: #0b7285; --bad: #c92a2a; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; }
h2 { margin-top: 2.4rem; border-top: 1px solid var(--rule); padding-top: 1.2rem; }
p.lead { color: var(--soft); margin-top: 0; }
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: left; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; }
pre { background: #f5f7f9; padding: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
pre b { color: var(--accent); font-weight: 400; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
.trouble { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--rule); border-radius: .5rem; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.5rem; color: var(--accent); }
"""


def provenance() -> dict[str, str]:
    """Command, date, machine and versions, each as a line for a page."""
    machine, found = device(), versions()
    name = sys.argv[0].rsplit("/", 1)[-1]
    is_ours = name in ("expertier", "cli.py")
    threads = f", {machine['cpu_threads']} threads" if "cpu_threads" in machine else ""
    return {
        "command": shlex.join(["expertier", *sys.argv[1:]]) if is_ours else "called from Python",
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "machine": f"{machine.get('gpu', machine['cpu'])}{threads}, {machine['system']}",
        "versions": ", ".join(f"{package} {number}" for package, number in found.items()),
    }
