"""The README's commands, run as a reader would, one after another in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


# each command gets a process of its own; what they all import of others' is there before they part
RUN = """
import os, sys, json
import numpy, torch, transformers
from transformers import AutoModelForCausalLM

for arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv = ["expertier", *arguments]
        from experiments.cli import main
        sys.exit(main())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"{arguments} ended with {status}")
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_every_command_of_the_readme_works_as_printed(tmp_path):
    (tmp_path / "runs").mkdir()
    (yaml,) = blocks("yaml")
    (tmp_path / "cluster.yaml").write_text(yaml)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    commands = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 8
    arguments = [shlex.split(command) for command in commands]
    assert {program for program, *_ in arguments} == {"expertier"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([rest for _, *rest in arguments])],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (program,) = blocks("python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True, capture_output=True)


def test_the_file_map_names_files_that_exist():
    for name in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / name).exists(), name


def test_the_list_of_files_is_complete_and_up_to_date():
    printed = subprocess.run([sys.executable, "docs/file_map.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert listed == printed.stdout, "run `make files`"


def test_every_file_says_what_it_is():
    listed = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert "|  |" not in listed
