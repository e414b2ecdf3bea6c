"""The fuzzer sees every outcome, and what ends a process, and damages a file the same way again."""

import dataclasses
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
import fuzz_kinds  # noqa: E402
from fuzz_files import GOOD, damaged_file, judged, outcomes, random_of  # noqa: E402

from ttq_jax.config import ConfigError  # noqa: E402


def test_a_seed_names_a_file(tmp_path):
    (tmp_path / "recipe.toml").write_text("[grid]\nbits = 4\n")
    kind = next(kind for kind in fuzz_kinds.KINDS if kind.name == "recipe")
    made = [damaged_file(kind, 3, case, tmp_path)[2] for case in range(20)]
    assert made == [damaged_file(kind, 3, case, tmp_path)[2] for case in range(20)]
    assert len(set(made)) > 15
    assert random_of(3, kind, 0).random() != random_of(4, kind, 0).random()


def fails(error):
    def read(place):
        raise error

    return read


@pytest.mark.parametrize(
    ("read", "changes", "expected"),
    [
        (fails(ConfigError("no")), {}, "refused"),
        (fails(ConfigError("x" * 5000)), {}, "refused at length"),
        (fails(ConfigError("a\nb")), {}, "refused at length"),
        (fails(KeyError("a")), {}, "other exception: KeyError"),
        (fails(MemoryError()), {}, "other exception: MemoryError"),
        (lambda place: 1, {}, "as before"),
        (lambda place: 2, {}, "as the file says"),
        (lambda place: 2, {"fixed": True}, "changed"),
        (lambda place: 2, {"agrees": lambda ours, said: False}, "not what the file says"),
        (lambda place: 2, {"says": lambda data: 0}, "not what the file says"),
        (lambda place: 2, {"says": lambda data: 1 / 0}, "read, though another reader refuses it"),
    ],
)
def test_every_outcome_has_its_name(tmp_path, read, changes, expected):
    kind = fuzz_kinds.Kind(name="x", folder="", files=("f",), read=read, **changes)
    before = fuzz_kinds.digest(1)
    assert judged(kind, tmp_path, before, b"whole", b"other")[0] == expected
    assert (expected in GOOD) == (expected in {"refused", "as before", "as the file says"})


ENDS = {
    "aborts": (lambda: os.abort(), "the process ended with status -6"),
    "takes memory": (lambda: bytearray(2**33), "other exception: MemoryError"),
    "takes time": (lambda: time.sleep(60), "more than 1 seconds"),
}


if __name__ == "__main__":  # a process that has started none of jax's threads
    import tempfile

    import fuzz_files

    fuzz_files._SECONDS = 1
    end, _ = ENDS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "files"
        (root / "in").mkdir(parents=True)
        (root / "in" / "f").write_bytes(b"sound")

        def read(place):
            return 0 if (place / "f").read_bytes() == b"sound" else end()

        made = fuzz_kinds.Kind(name="x", folder="in", files=("f",), read=read)
        shorter = dataclasses.replace(made, changes=(lambda rng, data: data[:-1],))
        print([one.what for one in outcomes(shorter, root, 0, 2)])


@pytest.mark.parametrize("end", ENDS)
def test_a_case_that_ends_its_process_is_counted(end):
    done = subprocess.run(
        [sys.executable, __file__, end], capture_output=True, text=True, timeout=100,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.stdout.strip() == str([ENDS[end][1]] * 2), done.stdout + done.stderr[-1500:]


def test_damage_is_never_nothing():
    kind = fuzz_kinds.KINDS[0]
    for case in range(300):
        assert kind.damaged(random.Random(case), b'{"a": [1, 2]}') != b'{"a": [1, 2]}'
