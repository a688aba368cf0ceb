"""Exercises that grade themselves: write the body of a function again until its tests pass.

    python -m extras.exercises                     the exercises, by the lessons of extras/course.md
    python -m extras.exercises 7 FOLDER            a copy of the code without the bodies of exercise 7
    python -m extras.exercises 7 FOLDER --check    run the tests that guard them, and say what still fails

Signatures and docstrings stay: they say what to write. All else in the copy works and may be used.
"""
import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import data
from data import option

HERE = Path(data.__file__).parent


@dataclass(frozen=True)
class Exercise:
    lesson: int     # of course.md
    title: str
    functions: str  # FILE:NAME, NAME with the class or function around it
    tests: str      # what guards them: names of tests, each of seconds


EXERCISES = dict(enumerate((
    Exercise(1, "Random numbers by (seed, purpose, index), and an order for each epoch",
             "data.py:Draws.normal data.py:Draws.uniform data.py:index_at",
             "test_data_draws_do_not_depend_on_the_batch "
             "test_data_epochs_are_permutations_and_steps_can_be_sought"),
    Exercise(1, "One batch on many processes", "train.py:positions_from train.py:Replicated.exchange",
             "test_train_positions_cover_every_image_once test_train_two_processes_equal_one[fm]"),
    Exercise(2, "From an image to tokens and back", "model.py:PatchEmbed.forward model.py:DiT.unpatchify",
             "test_model_pieces_follow_dit test_model_golden_dit_sit_and_cafm"),
    Exercise(2, "Attention", "model.py:attention_plain model.py:Attention.forward",
             "test_model_attention_and_all_its_derivatives test_model_golden_dit_sit_and_cafm"),
    Exercise(2, "A block with adaLN-zero", "model.py:modulate model.py:Block.forward",
             "test_model_pieces_follow_dit test_model_golden_dit_sit_and_cafm"),
    Exercise(3, "Times, and points between data and noise", "losses.py:logit_normal losses.py:interpolate",
             "test_losses_times_and_dropped_labels test_losses_fm_values"),
    Exercise(3, "Flow matching", "losses.py:velocity_target losses.py:fm",
             "test_losses_fm_values test_losses_are_stationary_at_exact_networks[fm-10]"),
    Exercise(3, "Learning rate and averaged weights", "train.py:learning_rate train.py:update_ema",
             "test_train_pieces"),
    Exercise(3, "Resuming bit for bit", "train.py:resume",
             "test_train_resume_is_bitwise[fm-1] test_train_resume_is_bitwise[cafm-2]"),
    Exercise(4, "Solvers: Euler and Heun", "sample.py:euler sample.py:heun",
             "test_sample_steps_and_grids_are_the_textbook_ones "
             "test_sample_solvers_reach_the_exact_flow_map_with_their_order"),
    Exercise(4, "Classifier-free guidance", "sample.py:guided.velocity",
             "test_sample_guidance test_sample_guidance_sharpens_as_theory_says"),
    Exercise(5, "The Frechet distance", "fid.py:sqrt_spectrum fid.py:frechet_distance",
             "test_fid_frechet_golden test_fid_frechet_closed_forms test_fid_frechet_rank_deficient"),
    Exercise(5, "What few images add to it", "extras/bias.py:small_sample_bias",
             "test_metrics_bias_is_what_few_images_add"),
    Exercise(6, "MeanFlow: a derivative along the flow, and a target of it",
             "model.py:time_derivative losses.py:meanflow",
             "test_model_time_derivative test_losses_meanflow_pieces test_losses_one_step_oracles"),
    Exercise(7, "Consistency training", "losses.py:ect",
             "test_losses_ect_is_edms test_losses_one_step_oracles"),
    Exercise(7, "Sampling a consistency model", "losses.py:jump sample.py:renoise",
             "test_losses_consistency_has_its_boundary test_sample_renoise_keeps_a_gaussian "
             "test_sample_steps_and_grids_are_the_textbook_ones"),
    Exercise(8, "Adversarial flow: two losses", "losses.py:afm_D losses.py:afm_G",
             "test_losses_afm_values test_losses_are_stationary_at_exact_networks[afm-8]"),
    Exercise(8, "Continuous adversarial flow: slopes, and two losses of them",
             "model.py:input_gradient model.py:along losses.py:cafm_D losses.py:cafm_G",
             "test_model_input_gradient_and_losses_on_it[points] test_losses_cafm_value_and_optimum_of_D "
             "test_losses_cafm_gradient_of_G test_losses_are_stationary_at_exact_networks[cafm-8]"),
), 1))

PARTS = "*.py", "extras/*.py", "README.md", "extras/*.md", ".pytest.ini", "requirements.txt"
CODE = sorted(path for part in PARTS for path in HERE.glob(part))  # with the tests


def blank(text: str, name: str, number: int) -> str:
    """A file's text without the body of function NAME, CLASS.NAME or FUNCTION.NAME; its docstring stays."""
    node, lines = ast.parse(text), text.splitlines(keepends=True)
    for part in name.split("."):
        node, = (n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part)
    first = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
    error = f'raise NotImplementedError("exercise {number}: {name} is yours to write")\n'
    lines[first:node.end_lineno] = [" " * node.body[0].col_offset + error]
    return "".join(lines)


def write(number: int, folder: Path) -> None:
    """A copy of the code in a new folder, without the bodies of the exercise's functions."""
    if folder.exists():
        raise ValueError(f"{folder} exists: name a new folder, or give --check to test what is in it")
    for path in CODE:
        target = folder / path.relative_to(HERE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    print(f"{EXERCISES[number].title}: write the bodies of")
    for file, name in (f.split(":") for f in EXERCISES[number].functions.split()):
        (folder / file).write_text(blank((folder / file).read_text(), name, number))
        print(f"  {name} in {folder / file}")
    (folder / "exercise.txt").write_text(f"{number}\n")
    print(f"then: python -m extras.exercises {number} {folder} --check")


def node_ids(number: int) -> list[str]:
    """pytest's names FILE::TEST of the tests that guard an exercise."""
    texts = {path.relative_to(HERE): path.read_text() for path in CODE if path.name.startswith("test_")}
    return [f"{path}::{test}" for test in EXERCISES[number].tests.split() for path, text in texts.items()
            if f"\ndef {test.partition('[')[0]}(" in text]


class Report:
    """A plugin of pytest: for each test a line with its claim, and lines with the numbers it compared."""

    def __init__(self):
        self.claims, self.numbers, self.lines = {}, [], []

    def pytest_collection_modifyitems(self, items):
        docs = {item.nodeid: " ".join((item.obj.__doc__ or item.name).split()) for item in items}
        self.claims = {key: re.split(r"(?<=\.) (?=[A-Z])", doc)[0] for key, doc in docs.items()}

    def pytest_assertion_pass(self, orig, expl):
        values = plain(expl)
        if re.search(r"\d\.\d.* [<>=]+ |[<>=]+ .*\d\.\d", values) and len(values) < 60:
            self.numbers.append(f"        {orig}:   {values}")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            file, message = Path(crash.path if crash else ""), crash.message if crash else report.longreprtext
            line = file.read_text().splitlines()[crash.lineno - 1].strip() if file.is_file() else ""
            compared = re.findall(r"(?m)(?<=\n)assert .*", message)[:1]
            said = " ".join(map(plain, [message, *compared]))
            self.lines += [f"fails:  {self.claims[report.nodeid]}", f"        {said}"]
            self.lines += [f"        ({file.name}, line {crash.lineno}: {line})"] if line else []
        elif report.when == "call":
            self.lines += [f"passes: {self.claims[report.nodeid]}", *[*dict.fromkeys(self.numbers)][-3:]]
        self.numbers = self.numbers if report.when == "setup" else []


def plain(text: str) -> str:
    """The first line, tensors of one number as that number."""
    return re.sub(r"tensor\((-?[\d.e+-]+)[^()]*(<\w+>)?\)", r"\1", (text.splitlines() or [""])[0])


def run_tests(ids: list[str], *more: str) -> tuple[int, list[str]]:
    """pytest's exit status for these tests, in this process and folder, and what to print."""
    import pytest
    report, options = Report(), "-rE -p no:cacheprovider -o enable_assertion_pass_hook=true".split()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main([*options, *more, *ids], [report])
    return int(status), report.lines or re.findall("(?m)^ERROR.*", output.getvalue())


def check(number: int, folder: Path) -> None:
    """Run the exercise's tests, in a process of its own in the folder; ValueError if not all pass."""
    note = folder / "exercise.txt"
    if not note.exists() or note.read_text().strip() != str(number):
        raise ValueError(f"{folder} holds no copy of exercise {number}: without --check one is written")
    for path in folder.glob("**/*.py"):
        try:
            ast.parse(path.read_text())
        except SyntaxError as error:
            raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from None
    script = ("import sys\nfrom extras import exercises\n"
              f"status, lines = exercises.run_tests({node_ids(number)})\n"
              "print(*lines, sep='\\n')\nsys.exit(status)")
    done = subprocess.run([sys.executable, "-B", "-c", script], cwd=folder, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] if done.returncode > 1 else []
        raise ValueError(" ".join([f"exercise {number} is not solved yet", *last]))
    print(f"Exercise {number} is solved: {EXERCISES[number].title}.")


@dataclass
class Config:
    number: str = option("", "which exercise; none: list them")
    folder: str = option("", "the folder of the copy")
    check: bool = option(False, "run the tests of the exercise in that folder")


def main(argv: list[str] | None = None) -> None:
    cfg = data.parse(Config, argv, __doc__, ("number", "folder"))
    if not cfg.number:
        for number, e in EXERCISES.items():
            print(f"{number:3}  {e.title} (lesson {e.lesson})\n     {e.functions}")
    elif cfg.number not in map(str, EXERCISES) or not cfg.folder:
        raise ValueError(f"exercise {cfg.number}, folder {cfg.folder!r}: expected a number from 1 to "
                         f"{len(EXERCISES)} and the folder of its copy")
    else:
        (check if cfg.check else write)(int(cfg.number), Path(cfg.folder))


if __name__ == "__main__":
    data.run_cli(main)
