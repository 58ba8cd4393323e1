"""Without OpenFold3 the package imports, and says what is missing."""

import sys

import pytest
from torch import nn

from pairformer_fast import accelerate, cli


def test_a_model_of_no_known_package():
    with pytest.raises(ValueError, match="Linear has no module of a package that can be accelerated"):
        accelerate(nn.Linear(2, 2))


def test_command_names_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("openfold3", "pairformer_fast.integrations.open"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openfold3", None)
    monkeypatch.setattr(sys, "argv", ["pairformer-fast", "openfold3", "predict"])
    with pytest.raises(SystemExit) as info:
        cli.main()
    assert info.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "pip install 'pairformer_fast[openfold]'" in line
