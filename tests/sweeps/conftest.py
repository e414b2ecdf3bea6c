import pytest
from tiny_files import write_model


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory with a tiny model, two texts and nothing else."""
    root = tmp_path_factory.mktemp("sweeps")
    write_model(root / "model")
    for name, line in (("sums", "Line {i}: {j} is the square.\n"), ("words", "word {i} {j};\n")):
        text = "".join(line.format(i=i, j=i * i) for i in range(300))
        (root / f"{name}.txt").write_text(text, "utf-8")
    return root


@pytest.fixture(scope="session")
def sweep_file(place):
    """A sweep of 14 cells on it, of which 2 are illegal."""
    path = place / "sweep.toml"
    path.write_text(
        f"""
        model = "tiny={place}/model"
        corpus = ["sums={place}/sums.txt", "words={place}/words.txt"]
        window = 48
        prompt_tokens = 24
        max_windows = 2
        group_size = 16

        [[part]]
        recipe = ["none", "ttq"]
        bits = [3, 4]

        [[part]]
        recipe = "awq"
        bits = 3
        calibration = ["sums={place}/sums.txt", "words={place}/words.txt[50%:]"]
        calibration_tokens = 96

        [[part]]
        recipe = "ttq"
        bits = 6

        [[part]]
        recipe = "ttq"
        bits = 2
        "scale.alpha" = 0.25
        """
    )
    return path
