"""lm-evaluation-harness on weights made from each prompt: whole tasks, and its command line."""

import hashlib
import json
import string
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from asked import RECIPES, SOME, causal

import ttq_jax as ttq
from ttq_jax.commands import lm_eval as lm_eval_command
from ttq_jax.commands.main import main
from ttq_jax.config import ConfigError
from ttq_jax.evaluation import harness

TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "choices",
        "doc_to_target": "label", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "answers": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "answer",
        "generation_kwargs": {"until": [], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "prose": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, model):
    """Three tasks over one file of six documents; half of the answers are the model's own."""
    home = tmp_path_factory.mktemp("tasks")
    questions = [f"{i}: what is a {topic}? " for i, topic in enumerate(
        ("stone", "light", "glass", "paper", "river", "cloud"))]  # fmt: skip
    own = [ttq.generate(model, [q[:-1]], recipe=RECIPES["fast"], max_new_tokens=16).texts[0]
           for q in questions]  # fmt: skip
    stop = next(c for c in own[1] if c in string.printable)
    documents = [
        {"question": question[:-1], "choices": ["nothing", "a kind.", f"{i} times"], "label": i % 3,
         "answer": own[i].split(stop)[0] if i % 2 else "something else",
         "text": f"{i} notes on {question[14:19]}, of which there is no more to be said here."}
        for i, question in enumerate(questions)
    ]  # fmt: skip
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    for name, task in TASKS.items():
        if name == "answers":
            task["generation_kwargs"]["until"] = [stop]
        # JSON is YAML.
        (home / f"{name}.yaml").write_text(json.dumps({
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(home / "data.jsonl")}}, **task,
        }))  # fmt: skip
    return home, documents, stop


@pytest.fixture
def quiet_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def evaluate(adapter, home, names=tuple(TASKS), **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(home), include_defaults=False)
    return lm_eval.simple_evaluate(
        adapter, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options
    )


def test_tasks_give_what_the_protocol_gives(model, tasks, quiet_datasets):
    home, documents, stop = tasks
    recipe = RECIPES["fast"]
    adapter = harness.TTQModel(model, recipe)
    made = evaluate(adapter, home)
    encode = model.tokenizer.encode
    right, right_norm, exact, nll, words, size = [], [], [], 0.0, 0, 0
    for document in documents:
        choices = document["choices"]
        each = [
            causal(model, recipe, encode(document["question"]), encode(f" {choice}"))
            for choice in choices
        ]
        right.append(np.argmax(each) == document["label"])
        lengths = [len(choice) for choice in choices]
        right_norm.append(np.argmax(np.divide(each, lengths)) == document["label"])
        answer = ttq.generate(model, [document["question"]], recipe=recipe, max_new_tokens=16)
        exact.append(answer.texts[0].split(stop)[0] == document["answer"])
        whole = [256, *encode(document["text"])]
        assert len(whole) == 61
        for start, end in ((1, 32), (32, 61)):
            nll -= causal(model, recipe, whole[:start], whole[start:end])
        words += len(document["text"].split())
        size += len(document["text"].encode())
    results = made["results"]
    assert 0 < np.mean(right) < 1 and 0 < np.mean(exact) < 1
    assert results["choices"]["acc,none"] == pytest.approx(np.mean(right))
    assert results["choices"]["acc_norm,none"] == pytest.approx(np.mean(right_norm))
    assert results["answers"]["exact_match,none"] == pytest.approx(np.mean(exact))
    got = results["prose"]
    assert got["bits_per_byte,none"] == pytest.approx(nll / size / np.log(2), rel=1e-4)
    assert np.log(got["word_perplexity,none"]) == pytest.approx(nll / words, rel=1e-4)
    said = made["config"]["ttq"]
    assert said["effective_bits"] == pytest.approx(adapter.effective_bits, abs=1e-4)
    # Two projections at 3 bits and some, the others at 32.
    assert 20 < said["effective_bits"] < 28
    assert said["recipe"] == recipe.describe() and said["method"] == "custom"
    assert said["model"] == "model" and "window before" in said["weights_from"][
        "loglikelihood_rolling"]  # fmt: skip
    assert {"jax", "ttq_jax"} <= said["versions"].keys()


def test_unquantized_tasks_give_what_the_adapter_for_transformers_gives(
    model, reference, tasks, quiet_datasets
):
    home = tasks[0]
    ours, theirs = (
        evaluate(lm, home)["results"] for lm in (harness.TTQModel(model, None), reference)
    )
    for name in TASKS:
        numbers = {key: value for key, value in theirs[name].items() if isinstance(value, float)}
        assert numbers
        for key, value in numbers.items():
            assert ours[name][key] == pytest.approx(value, rel=1e-4), (name, key)


def command_line(monkeypatch, capsys, *arguments):
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(lm_eval_command, "keep_compiled_programs", lambda *_: None)
    # Thousands of tasks need not be looked through for one of ours.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    # Else lm_eval would go on to log to what is stderr now.
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True)
    code = main(["lm-eval", *map(str, arguments)])
    return code, capsys.readouterr()


def test_the_command_line(directory, tasks, tmp_path, quiet_datasets, monkeypatch, capsys):
    code, said = command_line(
        monkeypatch, capsys, "--model", "ttq", "--tasks", "choices", "--include_path", tasks[0],
        "--model_args", f"model={directory},recipe=fast,bits=3", f"select={SOME}", "--limit", 3,
        "--output_path", tmp_path,
    )  # fmt: skip
    assert code == 0, said.err
    assert "ttq: fast, 3 bits, group 64, coded scales, moments prompt + weights prior" in said.err
    assert "|choices" in said.out
    (written,) = tmp_path.rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["n-samples"]["choices"]["effective"] == 3
    config = results["config"]["ttq"]
    assert (config["method"], config["recipe"]) == ("fast", RECIPES["fast"].describe())
    assert str(directory) not in json.dumps(config)


def test_results_that_lm_eval_cannot_save_are_an_error(
    directory, tasks, tmp_path, quiet_datasets, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    code, said = command_line(
        monkeypatch, capsys, "--model", "ttq", "--tasks", "choices", "--include_path", tasks[0],
        "--model_args", f"model={directory},recipe=fast,bits=3", f"select={SOME}", "--limit", 1,
        "--output_path", tmp_path / "file" / "results.json", "--debug",
    )  # fmt: skip
    assert code == 2
    assert "|choices" in said.out, "lm_eval has printed them"
    last = said.err.splitlines()[-1]
    assert last.startswith("ttq: error: lm_eval could not save its results: [Errno 17] File exists")
    assert "Traceback" in said.err, "as --debug asks"


def test_unusable_input_is_one_line(tasks, monkeypatch, capsys):
    code, said = command_line(
        monkeypatch, capsys, "--model", "ttq", "--tasks", "choices", "--include_path", tasks[0],
        "--model_args", "model=smollm2,bist=3",
    )  # fmt: skip
    last = said.err.splitlines()[-1]
    assert code == 2 and last.startswith("ttq: error: ") and "did you mean bits?" in last
    assert "Traceback" not in said.err


def test_what_lm_eval_refuses_is_no_mistake_of_ours(directory, tasks, monkeypatch, capsys):
    code, said = command_line(
        monkeypatch, capsys, "--model", "ttq", "--tasks", "chioces", "--include_path", tasks[0],
        "--model_args", f"model={directory}",
    )  # fmt: skip
    last = said.err.splitlines()[-1]
    assert code == 2 and "chioces" in last
    assert last.startswith("ttq: error: lm_eval: ValueError: ") and "mistake" not in last


def test_a_calibration_text_is_named_by_its_hash(directory, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Some prose to calibrate on. " * 20)
    adapter = harness.TTQModel.create_from_arg_string(
        f"model={directory},recipe=awq,bits=3,scale.steps=2,select=layers/v,calibration={corpus},"
        "calibration_tokens=128",
        {"batch_size": 1, "device": "cuda:0"},
    )
    said = adapter.get_model_info()["ttq"]
    assert (said["method"], said["calibration"]) == ("awq", "corpus.txt")
    assert said["calibration_sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert said["calibration_tokens"] == 128
    assert str(tmp_path) not in json.dumps(said)


def test_chat_templates_are_refused(model, tasks, quiet_datasets):
    with pytest.raises(ConfigError, match="leave out --apply_chat_template"):
        evaluate(harness.TTQModel(model, None), tasks[0], ["choices"], apply_chat_template=True)


def test_without_lm_eval_the_extra_is_named():
    program = (
        "import runpy, sys; sys.modules['lm_eval'] = None; sys.argv = ['ttq', 'lm-eval']\n"
        "runpy.run_module('ttq_jax', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        'ttq: error: lm_eval is not installed; run: pip install "ttq-jax[lm-eval]"\n'
    )
    assert not done.stdout
