"""Flags of examples that make no sense are refused in one line, before anything is computed."""

import sys
from pathlib import Path

import pytest
from test_zoo import load

WRONG = {
    "deblurring": ["--epochs 0", "--epochs -3", "--output x.foo", "--output folder"],
    "deq_transformer": [
        *("--steps 0", "--steps -1", "--width 0", "--width 3", "--context 0", "--test-characters 0"),
        *("--test-characters 64", "--test-characters -5", "--context 100000000"),
    ],
    "implicit_graph_network": ["--lengths 0", "--lengths 10 -3", "--width 0", "--steps 0"],
    "mdeq": ["--epochs 0", "--channels 0", "--channels -2", "--channels 3"],
    "monotone_operator_network": ["--epochs 0", "--width 1", "--width 0"],
    "../hopfield": [
        "--per-class 0",
        "--per-class -1",
        "--noise nan",
        "--noise inf",
        "--noise -1",
        "--output /dev/null",
    ],
}


@pytest.mark.parametrize(("name", "flags"), [(name, flags) for name, many in WRONG.items() for flags in many])
def test_flags(
    name: str, flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = load(name).main
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert f"error: {'cannot write the plot' if 'null' in flags else ''}" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
