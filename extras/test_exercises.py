"""Tests of exercises.py: each exercise refuses the blank and a wrong answer, and takes the right one.

Here functions of loaded modules get the code of the copy, so that all exercises take less than a minute.
`python -m extras.test_exercises [NUMBER ..]` does the same by copies and the command, as a student would.
"""
import ast
import contextlib
import importlib
import inspect
import io
import json
import multiprocessing
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest

import data
from extras.exercises import CODE, EXERCISES, HERE, Report, blank, main, node_ids
from extras.test_formats import idx_pair
from test_all import raises, run

# number: (file, what stands in a function of the exercise, a typical wrong answer)

WRONG = {1: ("data.py", "generator(self.seed, purpose, p)", "generator(self.seed, p)"),
         2: ("train.py", "step * cfg.batch + data.rank() * size", "step * cfg.batch"),
         3: ("model.py", "image.permute(0, 5, 1, 3, 2, 4)", "image.permute(0, 5, 1, 4, 2, 3)"),
         4: ("model.py", "(q @ k.mT / math.sqrt(q.shape[-1]))", "(q @ k.mT)"),
         5: ("model.py", "x, 1 + scale[:, None]", "x, scale[:, None]"),
         6: ("losses.py", "* x + expand_dims(t, x) * e", "* e + expand_dims(t, x) * x"),
         7: ("losses.py", "else e - x\n", "else x - e\n"),
         8: ("train.py", "list(net.parameters()), 1 - d)", "list(net.parameters()), d)"),
         9: ("train.py", '    model.load_weights(ema, content["ema"], path, processes.scatter)\n', ""),
         10: ("sample.py", "(v + velocity(ahead, r, y)) / 2", "(v + velocity(ahead, r, y))"),
         11: ("sample.py", "return v_ref + guidance * (v - v_ref)", "return v + guidance * (v - v_ref)"),
         12: ("fid.py", "cov2.trace() - 2 * root", "cov2.trace() - root"),
         13: ("extras/bias.py", "(pairs.sum() + pairs.diagonal().sum())", "pairs.sum()"),
         14: ("losses.py", "v - expand_dims(t - r, x) * dudt", "v + expand_dims(t - r, x) * dudt"),
         15: ("losses.py", "- c) / (s - s_r)).mean()", "- c)).mean()"),
         16: ("sample.py", "x = (1 - r) * x + r * draws", "x = x + r * draws"),
         17: ("losses.py", "F.softplus(fake - real).mean() +", "F.softplus(real - fake).mean() +"),
         18: ("losses.py", "(fake + 1).square().mean()", "(fake - 1).square().mean()")}


def answers(number: int) -> dict[str, dict[str, str]]:
    """{answer: {file: its text}}: right, the copy's blank, wrong."""
    functions = [part.split(":") for part in EXERCISES[number].functions.split()]
    right = {file: (HERE / file).read_text() for file, _ in functions}
    blanked, (file, old, new) = dict(right), WRONG[number]
    for own, name in functions:
        blanked[own] = blank(blanked[own], name, number)
    assert right[file].count(old) == 1 and old not in blanked[file], number
    return dict(right=right, blank=blanked, wrong=right | {file: right[file].replace(old, new)})


def promises(text: str) -> set:
    """What functions take and say: arguments and docstrings."""
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {(node.name, ast.dump(node.args), ast.get_docstring(node)) for node in functions}


def put(file: str, name: str, text: str) -> None:
    """Give a function of a loaded module, under all of its names, the code that it has in the text."""
    module, codes = importlib.import_module(file.removesuffix(".py").replace("/", ".")), {}

    def walk(code):
        for part in code.co_consts:
            if isinstance(part, types.CodeType):
                codes[part.co_qualname] = part
                walk(part)

    walk(compile(text, file, "exec"))
    first = name.partition(".")[0]
    name = name if inspect.isclass(getattr(module, first)) else first  # a function in a function: the outer
    inspect.unwrap(operator.attrgetter(name)(module)).__code__ = codes[name]


def names_of(*numbers: int) -> list[str]:
    """Names of the tests, without those whose other processes read the files."""
    names = dict.fromkeys(name for number in numbers for name in node_ids(number))
    return [name for name in names if "two_processes" not in name]


class Grades:
    """A plugin of pytest that runs the tests of each exercise with each answer, in forks of this process."""

    def __init__(self, report):
        self.report, self.found = report, {}

    def pytest_runtestloop(self, session):
        self.found["right"] = forked(self.grade, session.items)
        for number in EXERCISES:
            items = [item for item in session.items if item.nodeid in names_of(number)]
            for answer in ("blank", "wrong"):
                self.found[f"{number} {answer}"] = forked(self.grade, items, number, answer)
        return True

    def grade(self, items, number=0, answer="right") -> list[str]:
        """What a student reads, up to the first failure."""
        functions = EXERCISES[number].functions.split() if number else []
        for file, name in (part.split(":") for part in functions):
            put(file, name, answers(number)[answer][file])
        for item in items:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if any(line.startswith("fails: ") for line in self.report.lines):
                break
        return self.report.lines


def forked(work, *given):
    """work(*given) in a fork of this process."""
    ours, theirs = multiprocessing.Pipe(False)
    child = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(work(*given)))
    child.start()
    theirs.close()
    answer = ours.recv()  # EOFError where the child died
    child.join()
    return answer


def grade_all() -> None:
    importlib.import_module("torch._dynamo")  # which optimizers load, once for all
    report = Report()
    grades = Grades(report)
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-p", "no:cacheprovider", *names_of(*EXERCISES)], [report, grades])
    print(json.dumps(grades.found))


@pytest.fixture(scope="module")
def grades() -> dict:
    return json.loads(alone("from extras import test_exercises as t\nt.grade_all()").stdout.splitlines()[-1])


def alone(script: str, folder: Path = HERE) -> subprocess.CompletedProcess:
    """A script in a process of its own, which has time also where others work."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True,
                          timeout=1200)


@pytest.mark.parametrize("number", EXERCISES)
def test_exercises_tell_right_from_wrong(grades, number):
    """The blanked copy has all arguments and docstrings, and fails by its NotImplementedError; the original
    passes all tests of the exercise, each of which there is; a typical wrong answer fails by what it
    computes."""
    assert len(node_ids(number)) == len(EXERCISES[number].tests.split())
    right, blanked, _ = answers(number).values()
    assert all(promises(blanked[file]) <= promises(right[file]) for file in right)
    keys = "right", f"{number} blank", f"{number} wrong"
    right, blanked, wrong = ("\n".join(grades[key]) for key in keys)
    assert right.count("passes: ") == len(names_of(*EXERCISES)) and "fails: " not in right, right
    assert "fails: " in blanked and f"NotImplementedError: exercise {number}: " in blanked, blanked
    assert "fails: " in wrong and "NotImplementedError" not in wrong, wrong


def hand_in(number: int, answer: str, folder: Path) -> tuple[int, str, float]:
    """The command's exit status, what it prints, and seconds, for a copy with that answer in it."""
    if not folder.exists():
        main([str(number), str(folder)])
    for file, text in answers(number)[answer].items():
        (folder / file).write_text(text)
    began, done = time.time(), run("-m", "extras.exercises", number, folder, "--check")
    return done.returncode, done.stdout + done.stderr, time.time() - began


def test_exercises_by_the_command(tmp_path, capsys):
    """List, copy, check: the copy differs in bodies only; a check says in sentences what fails and prints
    numbers of what passes. A folder that is there, one without a copy, a number that is not, an error of
    syntax or import: one line that names it."""
    main([])
    listed = capsys.readouterr().out
    assert all(e.title in listed and e.functions in listed for e in EXERCISES.values())
    folder = tmp_path / "mine"
    main(["10", str(folder)])
    assert f"  euler in {folder / 'sample.py'}" in capsys.readouterr().out.splitlines()
    pairs = {path: folder / path.relative_to(HERE) for path in CODE}
    assert [a.name for a, b in pairs.items() if a.read_bytes() != b.read_bytes()] == ["sample.py"]
    raises(lambda: main(["10", str(folder)]), "mine exists", "--check")
    raises(lambda: main(["11", str(folder), "--check"]), "mine holds no copy of exercise 11")
    raises(lambda: main(["10", str(tmp_path), "--check"]), "no copy of exercise 10")
    raises(lambda: main(["99", str(folder)]), "exercise 99", f"from 1 to {len(EXERCISES)}")
    raises(lambda: main(["1"]), "folder ''")

    status, told, _ = hand_in(10, "wrong", folder)
    assert status == 2 and "error: exercise 10 is not solved yet" in told and "Traceback" not in told
    assert "fails:  For dx/dt = t steps can be summed by hand" in told and "AssertionError: heun" in told
    status, told, _ = hand_in(10, "right", folder)
    assert status == 0 and told.count("passes: ") == 2 and "Exercise 10 is solved" in told
    assert "abs(found - order) < 0.15 and " in told and " < 0.15" in told.split("and fine")[1]
    for line, words in (("def f(:", "sample.py, line 1: invalid"), ("x = y", "name 'y' is not defined")):
        (folder / "sample.py").write_text(line)
        done = run("-m", "extras.exercises", "10", folder, "--check")
        told = done.stdout + done.stderr
        assert done.returncode == 2 and words in told and "Traceback" not in told, told


COURSE = (HERE / "extras/course.md").read_text()
BLOCKS = re.findall(r"(?s)```sh\n(.*?)```", COURSE)
COMMANDS = re.findall(r"(?m)^(python .*?) +# (\d+ s|\d+ min|minutes)\b", "".join(BLOCKS))
SHORT = {"train.py": "--steps 4 --sample_every 0 --score 10", "losses.py": "--steps 4", "fid.py": "--num 20",
         "sample.py": "--n 20 --steps 2"}

SCRIPT = """
import runpy, shlex, sys
for line in open("commands"):
    _, *sys.argv = shlex.split(line)
    if sys.argv[0] == "-c":
        exec(sys.argv[1], {})
        continue
    if sys.argv[0] == "-m":
        del sys.argv[0]
    try:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("failed:", line, file=sys.stderr)
"""


def run_all(lines: list[str], folder: Path) -> None:
    """Run these commands, one after another, in a copy of the code."""
    for path in CODE:
        (folder / path.relative_to(HERE)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.relative_to(HERE))
    (folder / "commands").write_text("\n".join(lines))
    done = alone(SCRIPT, folder)
    assert done.returncode == 0 and "failed:" not in done.stderr, done.stderr[-3000:]


def test_exercises_course_commands_run(tmp_path):
    """In a copy every command of course.md runs, one after another: those of up to 10 seconds as they stand,
    the others in few steps or images. Each has its time behind it; --check is tested above."""
    assert len(COMMANDS) == "".join(BLOCKS).count("\n")
    run_all([line if re.fullmatch(r"(\d|10) s", seconds) else f"{line} {SHORT[line.split()[1]]}"
             for line, seconds in COMMANDS if "--check" not in line], tmp_path)
    pictures = re.findall(r"--out (\S+\.png)", COURSE)
    assert all((tmp_path / name).exists() for name in ["data.png", *pictures])


def test_exercises_readme_commands_run(tmp_path):
    """The same of README.md, but for torchrun's lines: one process instead of two."""
    text = (HERE / "README.md").read_text()
    text = re.sub(r" *\\\n *", " ", text)
    blocks = "".join(block for kind, block in re.findall(r"(?s)```(\w*)\n(.*?)```", text) if not kind)
    starts = r"pip .*? && |torchrun --\S+ (?:-- )?"
    lines = re.findall(rf"(?m)^(?:{starts})?(?:python )?(\w+\.py.*?)(?:  +.*)?$", blocks)
    assert len(lines) == blocks.count("\n") - 1  # but for the tests
    for k, image in enumerate(data.glyphs(40, 40)[0]):
        path = tmp_path / f"FOLDER/{k % 10}/{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.grid(image[None]).save(path)
    (tmp_path / "MNIST").mkdir()
    for name, content in idx_pair(data.glyphs(60, 28)[0][:, 0].numpy(), [k % 10 for k in range(60)]).items():
        (tmp_path / f"MNIST/train-{name}").write_bytes(content)
    short = SHORT | {"train.py": SHORT["train.py"] + " --batch 8 --net depth=1 --sample_steps 2"}
    run_all([f"python {line} {short.get(line.split()[0], '')}" for line in lines], tmp_path)
    made = "glyphs ect mf afm cafm two mine mnist".split()
    assert all((tmp_path / f"runs/{name}/final.json").exists() for name in made)


def test_exercises_are_all_in_the_course():
    """Each lesson lists its exercises, and has three questions with answers."""
    lessons = re.split(r"(?m)^## \d\. ", COURSE)[1:]
    assert len(lessons) == 8
    for k, lesson in enumerate(lessons, 1):
        listed = {int(n) for n in re.findall(r"\d+", lesson.rpartition("**Exercise")[2])}
        assert listed == {number for number, e in EXERCISES.items() if e.lesson == k}, k
        assert lesson.count("<details>") == lesson.count("</details>") == 3
        assert all(f"\n**{word}**" in lesson for word in ("Read", "See")) and "```sh\n" in lesson


@pytest.mark.parametrize("page", ["README.md", "extras/README.md", "extras/course.md"])
def test_exercises_links_of_pages_resolve(page):
    """Links and pictures lead to files, and what stands behind # to a heading there."""
    for file, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", (HERE / page).read_text()):
        target = ((HERE / page).parent / file) if file else HERE / page
        assert target.exists(), file
        if heading:
            titles = re.findall(r"(?m)^#+ (.*)", target.read_text().lower())
            assert heading in [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles], heading


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for number in map(int, sys.argv[1:] or EXERCISES):
            for answer, expected in dict(blank=2, right=0, wrong=2).items():
                status, told, seconds = hand_in(number, answer, Path(scratch, str(number)))
                verdict = "as expected" if status == expected else f"NOT AS EXPECTED\n{told}"
                print(f"{number:3} {answer:6} {seconds:3.0f} s {verdict}", flush=True)
